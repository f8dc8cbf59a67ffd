"""Small datasets in the folder layouts."""

import numpy as np
import pytest
from sample_images import ramps, save, save_plain


@pytest.fixture
def unaligned(tmp_path):
    """3 images in trainA, 5 in trainB, 1 in testA and testB. A pixel's colour tells the file."""
    for i in range(3):
        save_plain(tmp_path / "trainA" / f"{i}.png", colour=(10 * i, 0, 0))
    for i in range(5):
        save_plain(tmp_path / "trainB" / f"{i}.png", colour=(0, 10 * i, 0))
    for side in "AB":
        save_plain(tmp_path / f"test{side}" / "0.png")
    return tmp_path


@pytest.fixture
def aligned(tmp_path):
    """4 pairs of ramps in train; the blue channel is 0 in A and 255 in B."""
    for i in range(4):
        save(tmp_path / "train" / f"{i}.png", np.concatenate([ramps(blue=0), ramps(blue=255)], 1))
    return tmp_path


@pytest.fixture
def side_a(tmp_path):
    """An empty folder that is trainA and testA; trainB and testB have one image of 64 x 64 pixels."""
    (tmp_path / "trainA").mkdir()
    save_plain(tmp_path / "trainB" / "0.png", size=(64, 64))
    for side in "AB":
        (tmp_path / f"test{side}").symlink_to(f"train{side}")
    return tmp_path / "trainA"
