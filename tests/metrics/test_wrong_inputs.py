"""Invalid arguments of metrics."""

from __future__ import annotations

import pytest
import torch
from wrong_files import assert_rejected

from srpkd.data.images import ImageFiles
from srpkd.metrics.fidelity import fidelity
from srpkd.metrics.pixels import similarity

# name: (call, error, pattern of its message). The working directory has the files of wrong_files.py.
WRONG = {
    # --- scores ---
    "paths for images": (
        lambda: fidelity(["a.png"], {}),
        TypeError,
        r"generated: expected ImageFiles\(paths\), received list",
    ),
    "no real images": (lambda: fidelity(ImageFiles(["a.png"]), {}), ValueError, "real={}: expected {name: "),
    "real images by themselves": (
        lambda: fidelity(ImageFiles(["a.png"]), {"test": ImageFiles(["a.png"])}),
        ValueError,
        r"expected {name: \[ImageFiles\(paths\), ...\], ...}",
    ),
    "no score": (
        lambda: fidelity(ImageFiles(["a"]), {"test": [ImageFiles(["a"])]}, fid=False, kid=False),
        ValueError,
        "fid and kid are both False, expected",
    ),
    "a batch of no image": (
        lambda: fidelity(ImageFiles(["a"]), {"test": [ImageFiles(["a"])]}, batch_size=0),
        ValueError,
        "batch_size=0: expected an integer >= 1",
    ),
    "too few pixels for SSIM": (
        lambda: similarity([(torch.ones(3, 8, 8), torch.ones(3, 8, 8))]),
        ValueError,
        "SSIM needs images of at least 11 x 11",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_invalid_input_raises_and_leaves_no_file(files, monkeypatch, call, error, message):
    monkeypatch.chdir(files)
    assert_rejected(files, call, error, message)
