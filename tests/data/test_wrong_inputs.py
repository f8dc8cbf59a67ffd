"""Invalid arguments of datasets and image files."""

from __future__ import annotations

import pytest
from wrong_files import assert_rejected

from srpkd.data.folders import open_dataset
from srpkd.data.images import DataError, ImageFiles
from srpkd.data.synthetic import SyntheticDataset, generate_scenes, write_synthetic
from srpkd.data.validate import validate_dataset
from srpkd.files import WriteError

# name: (call, error, pattern of its message). The working directory has the files of wrong_files.py.
WRONG = {
    # --- data ---
    "no folder": (lambda: open_dataset("none", "aligned"), FileNotFoundError, "none/train: no such folder"),
    "a file for a folder": (lambda: open_dataset("file", "aligned"), FileNotFoundError, "file/train: no such folder"),
    "a number for a folder": (
        lambda: open_dataset(3, "aligned"),
        TypeError,
        r"(expected str, bytes or|argument should be a str or an) os.PathLike object.*, not '?int'?",
    ),
    "a mode misspelt": (
        lambda: open_dataset("pairs", "alignd"),
        ValueError,
        r"dataset_mode='alignd' is not one of 'unaligned', 'aligned'; did you mean 'aligned'\?",
    ),
    "a mode in a list": (
        lambda: open_dataset("pairs", ["aligned"]),
        ValueError,
        r"dataset_mode=\['aligned'\] is not one of",
    ),
    "a size as a text": (
        lambda: open_dataset("pairs", "aligned", load_size="9"),
        TypeError,
        "load_size='9': expected an",
    ),
    "a crop of nothing": (
        lambda: open_dataset("pairs", "aligned", crop_size=0),
        ValueError,
        "crop_size=0: expected an",
    ),
    "less than one image": (
        lambda: open_dataset("pairs", "aligned", max_dataset_size=-1),
        ValueError,
        "_size=-1: expected",
    ),
    "two channels": (
        lambda: open_dataset("pairs", "aligned", input_nc=2),
        ValueError,
        r"input_nc=2: expected 1 \(grey",
    ),
    "a bomb in a folder": (
        lambda: open_dataset("bombs", "unaligned", load_size=8, crop_size=8)[0],
        DataError,
        "bombs/trainA/00000.png: far too large .*decompression bomb.* scale the image down first",
    ),
    "an EPS file": (
        lambda: open_dataset("eps-files", "unaligned", load_size=8, crop_size=8)[0],
        DataError,
        "eps-files/trainA/00000.png: not an image; expected one of BMP",
    ),
    "a bomb to validate": (lambda: validate_dataset("bombs", "unaligned"), DataError, r"00000.png \(far too large"),
    "an EPS file to validate": (
        lambda: validate_dataset("eps-files", "unaligned"),
        DataError,
        r"00000.png \(not an image",
    ),
    "a size as a text to validate": (
        lambda: validate_dataset("pairs", "aligned", load_size="9"),
        DataError,
        "--load_size='9': expected an integer >= 1, received str",
    ),
    "a mode in a list to validate": (
        lambda: validate_dataset("pairs", ["aligned"]),
        DataError,
        r"--dataset_mode=\['aligned'\] is not one of",
    ),
    "scenes as a text": (lambda: generate_scenes("3"), TypeError, "count='3': expected an integer >= 1, received str"),
    "half a pixel": (lambda: generate_scenes(1, 16.5), TypeError, "size=16.5: expected an integer"),
    "a seed too long": (
        lambda: generate_scenes(1, 16, 2**70),
        ValueError,
        f"seed={2**70}, .*integers of at most 40 bits",
    ),
    "no scenes": (
        lambda: SyntheticDataset("scenes"),
        TypeError,
        "scenes: expected SyntheticScenes, as from generate_sc",
    ),
    "zero scenes": (
        lambda: write_synthetic("new", 0, 1, 16),
        ValueError,
        "count_train=0: expected an integer >= 1",
    ),
    "scenes in a file": (
        lambda: write_synthetic("file", 1, 1, 16),
        WriteError,
        "cannot be written: Not a directory; a file",
    ),
    "scenes over others": (
        lambda: write_synthetic("pairs", 1, 1, 16),
        FileExistsError,
        "pairs already has train and test with files",
    ),
    "a bomb among sizes": (
        lambda: ImageFiles(["bomb/00000.png"]).have_same_size(),
        DataError,
        "bomb/00000.png: far too large",
    ),
    "a bomb to score": (lambda: ImageFiles(["bomb/00000.png"])[0], DataError, "bomb/00000.png: far too large"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_invalid_input_raises_and_leaves_no_file(files, monkeypatch, call, error, message):
    monkeypatch.chdir(files)
    assert_rejected(files, call, error, message)
