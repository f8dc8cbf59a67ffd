"""Small image files for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def save(path: Path, array: np.ndarray, **options) -> str:
    """Write an array (H, W, 3) or (H, W) of levels in 0..255 as an image file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)
    return str(path)


def save_deep(path: Path, array: np.ndarray, **options) -> str:
    """Write an array (H, W, C) of uint16 or floats as PNG or TIFF, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array[:, :, 0] if array.shape[2] == 1 else array
    if path.suffix == ".png":
        import imagecodecs  # not on every machine with a GPU, where other tests of the same files run

        path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array), **options))
    else:
        kind = "rgb" if array.ndim == 3 and array.shape[2] >= 3 else "minisblack"
        tifffile.imwrite(path, array, **{"photometric": kind, "metadata": None} | options)
    return str(path)


def save_plain(path: Path, size: tuple[int, int] = (32, 32), colour: tuple[int, int, int] = (100, 100, 100)) -> str:
    """Write an image of one colour; size is (width, height)."""
    return save(path, np.full((size[1], size[0], 3), colour))


def save_all(folder: Path, arrays: Sequence[np.ndarray], suffix: str = ".png") -> Path:
    """Write arrays as files 00.png, 01.png, ..., and return the folder."""
    for index, array in enumerate(arrays):
        save(folder / f"{index:02d}{suffix}", array)
    return folder


def noise(
    count: int, shape: tuple[int, ...] = (12, 12, 3), seed: int = 0, low: int = 0, high: int = 256
) -> list[np.ndarray]:
    """Return arrays of random levels in low..high - 1."""
    return list(np.random.default_rng(seed).integers(low, high, (count, *shape), dtype=np.uint8))


def save_sets(root: Path) -> dict[str, Path]:
    """Write three sets of images of different levels, and return their folders by name."""
    sets = {"generated": noise(6, seed=1, high=200), "real": noise(7, seed=2), "train": noise(5, seed=3, low=60)}
    return {name: save_all(root / name, images) for name, images in sets.items()}


def ramps(width: int = 32, height: int = 32, blue: int = 0) -> np.ndarray:
    """Return (H, W, 3): red encodes the column and green the row, so that crops and flips can be recognised."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 4, np.full_like(x, blue)], -1)


def save_mixed(root: Path) -> Path:
    """Write images of several formats and sizes into a folder and its sub-folders, next to a file that is no image."""
    rng = np.random.default_rng(0)
    for name, *size in [
        ("a.png", 16, 16),
        ("b.jpg", 16, 16),
        ("c.JPEG", 16, 16),
        ("d.bmp", 13, 29),
        ("deep/a.webp", 1, 3),
        ("deep/er/e.tif", 40, 8),
    ]:
        save(root / name, rng.integers(0, 256, (*size, 3)))
    save(root / "grey.png", rng.integers(0, 256, (9, 9)))
    (root / "notes.txt").write_text("no image")
    return root
