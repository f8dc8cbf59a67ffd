"""Image files: find them, pair them by name, and decode them safely."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

# The formats that Pillow may decode, by content and not by suffix: for EPS it would start another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")

Crop = Callable[[Image.Image, str], Image.Image]  # (image, its path) -> the part to use


class DataError(ValueError):
    """A dataset or an image file that cannot be used.

    Args:
        heading: the first line of the message.
        problems: listed below it, numbered.
    """

    def __init__(self, heading: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([heading, *(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))]))


def image_files(folder: str | Path) -> list[str]:
    """Return the paths of all image files in a folder and its sub-folders, sorted; empty if there is no such folder.

    Symbolic links are followed. Hidden files and folders, such as those that macOS writes next to images, are skipped.
    """
    found, seen = [], {os.path.realpath(folder)}
    for root, subfolders, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(subfolders) if name[0] != "."}
        subfolders[:] = [name for name, target in real.items() if target not in seen]  # a link may point to a parent
        seen.update(real.values())
        found += [os.path.join(root, n) for n in names if n[0] != "." and n.lower().endswith(EXTENSIONS)]
    return sorted(found)


def find_images(where: str) -> list[str]:
    """Return the image files in a folder, or the files that match a pattern such as ``results/*_fake_B.png``.

    Raises:
        ValueError: no image was found.
    """
    path = os.path.expanduser(where)
    found = image_files(path) if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"{where}: no images found; expected a folder of images or a pattern like 'out/*_fake_B.png'")
    return found


def pair_by_name(generated: Sequence[str], real: Sequence[str]) -> list[tuple[str, str]]:
    """Pair generated with real images by file name.

    Suffixes are ignored, and so are the endings that the public CycleGAN code writes (_fake_B, _real_B, _rec_A, ...).

    Raises:
        ValueError: a generated image has no real one, or two images of one side have the same name.
    """

    def key(path: str) -> str:
        return re.sub(r"_(fake|real|rec)(_[AB])?$", "", Path(path).stem)

    for paths in (generated, real):
        if len({key(path) for path in paths}) < len(paths):
            raise ValueError(
                f"two images in the folder of {paths[0]} have the same name: to pair images by name, give each a "
                "unique name"
            )
    partner = {key(path): path for path in real}
    if unpaired := [path for path in generated if key(path) not in partner]:
        raise ValueError(
            f"{len(unpaired)} of {len(generated)} generated images have no real image of the same name, such as "
            f"{unpaired[0]}; the real images are named like {real[0]}"
        )
    return [(path, partner[key(path)]) for path in generated]


@contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image file; it is decoded inside the block. All of srpkd opens images through this function.

    Raises:
        DataError: the file cannot be decoded, is not in one of `FORMATS`, or is so large that Pillow takes it for a
            decompression bomb. The message is "path: reason".
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        raise DataError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why Pillow could not read an image."""
    if isinstance(error, Image.DecompressionBombError):
        return f"far too large ({error}); if this size is intended, scale the image down first"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image; expected one of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged or truncated ({error})"


def read_image(path: str) -> Image.Image:
    """Decode an image file to RGB. Raises the errors of `open_image`."""
    with open_image(path) as image:
        return image.convert("RGB")


def split_pair(image: Image.Image, path: str) -> tuple[Image.Image, Image.Image]:
    """Return the left half (A) and the right half (B) of an aligned image.

    Raises:
        DataError: the width is odd.
    """
    width, height = image.size
    if width % 2:
        raise DataError(f"{path}: {width} pixels wide; expected an even width: A and B of the same size side by side")
    return image.crop((0, 0, width // 2, height)), image.crop((width // 2, 0, width, height))


def left_half(image: Image.Image, path: str) -> Image.Image:
    """Return A of an aligned image; a `Crop`."""
    return split_pair(image, path)[0]


def right_half(image: Image.Image, path: str) -> Image.Image:
    """Return B of an aligned image; a `Crop`."""
    return split_pair(image, path)[1]


class ImageFiles(Dataset[Tensor]):
    """Dataset of image files as uint8 tensors (3, H, W), for metrics: no augmentation, no normalisation.

    Args:
        paths: the files.
        size: scale every image to size x size; None keeps its own size.
        crop: (image, path) -> the part of the image to use, before scaling.
        resample: Pillow's filter for scaling; use NEAREST to keep the colours of label maps.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        crop: Crop | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        self.paths, self.size, self.crop, self.resample = list(paths), size, crop, resample

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.paths[index])
        if self.crop:
            image = self.crop(image, self.paths[index])
        if self.size:
            image = image.resize((self.size, self.size), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def have_same_size(self) -> bool:
        """Return whether all images have the same size; reads only their headers."""
        if self.size:
            return True
        sizes = set()
        for path in self.paths:
            with open_image(path) as image:
                sizes.add(image.size)
        return len(sizes) == 1


def image_pairs(generated: ImageFiles, real: ImageFiles) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the pairs of two datasets of the same length: two images (3, H, W), uint8.

    Raises:
        ValueError: the images of a pair differ in size.
    """
    for index, (one, other) in enumerate(zip(generated, real, strict=True)):
        if one.shape != other.shape:
            raise ValueError(
                f"{generated.paths[index]} has {tuple(one.shape[1:])} pixels and {real.paths[index]} "
                f"{tuple(other.shape[1:])}: use --size N to scale both to N x N"
            )
        yield one, other
