"""Folders of image files, in the layouts of junyanz/pytorch-CycleGAN-and-pix2pix (its data/ folder).

`unaligned`  root/trainA, root/trainB, root/testA, root/testB: two kinds of images, no pairs
`aligned`    root/train, root/test: pairs, A in the left half of an image and B in the right half
`single`     root/<phase> if there is one, else root: only A

As there, sub-folders are searched too, and an EXIF orientation is not applied: the pixels are taken as stored.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from ..arguments import check_whole

# what Pillow may take a file for, whatever its name: EPS, for one, would be handed to another program
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
CHOICES = {
    "dataset_mode": ("unaligned", "aligned", "single"),
    "direction": ("AtoB", "BtoA"),
    "preprocess": ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"),
}


class DataError(ValueError):
    """What is wrong with a data set: a heading, and below it the `problems`, numbered."""

    def __init__(self, heading: str, problems: Sequence[str] = ()):
        self.problems = list(problems)
        super().__init__("\n".join([heading, *(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))]))


def open_dataset(
    dataroot: str | Path,
    dataset_mode: str,
    phase: str = "train",
    direction: str = "AtoB",
    preprocess: str = "resize_and_crop",
    load_size: int = 286,
    crop_size: int = 256,
    no_flip: bool = False,
    serial_batches: bool = False,
    max_dataset_size: int | None = None,
    input_nc: int = 3,
    output_nc: int = 3,
) -> FolderDataset:
    """The images under `dataroot` as a data set of
    {"A": (input_nc, H, W), "B": (output_nc, H, W), "A_path": str, "B_path": str}, float32 in [-1, 1].

    "A" is the network's input and "B" its target: direction "BtoA" swaps them here, so nothing later has to.
    `single` has neither "B" nor a direction. One channel means grayscale.

    preprocess, bicubic with antialiasing:
        "resize_and_crop"       to load_size x load_size, then a crop of crop_size
        "crop"                  a crop of crop_size
        "scale_width"           to width load_size, height in proportion but at least crop_size
        "scale_width_and_crop"  both
        "none"                  each side to the nearest multiple of 4
    In training the crop is random and half of the images are mirrored unless `no_flip`; the halves of an
    aligned pair share both. In any other phase nothing is random, as with the public code's test defaults:
    load_size is crop_size (except for "scale_width" alone, which keeps the scale it was trained at), the crop
    is the middle, nothing is mirrored.

    In `unaligned` the length is that of the larger side, the smaller one starts over, and in training B is
    drawn at random unless `serial_batches`. All randomness comes from torch's default generator, which a
    DataLoader seeds in each worker. `max_dataset_size` keeps the first so many files of each folder.

    Raises ValueError for an unknown choice or a size below 1; TypeError for a size that is no integer;
    FileNotFoundError for a missing folder or one without images; DataError, when the item is read, for an image that
    cannot be decoded or is too small for the crop.
    `srpkd.data.examine` finds all of these before training.
    """
    check_choices(dataset_mode=dataset_mode, direction=direction, preprocess=preprocess)
    for name, size in (("load_size", load_size), ("crop_size", crop_size), ("max_dataset_size", max_dataset_size)):
        if size is not None or name != "max_dataset_size":
            check_whole(name, size, least=1)
    for name, channels in (("input_nc", input_nc), ("output_nc", output_nc)):
        if channels not in (1, 3):
            raise ValueError(f"{name}={channels!r}: expected 1 (grey) or 3 (RGB) channels")
    sources = source_folders(dataroot, dataset_mode, phase)
    files = [image_files(source)[:max_dataset_size] for source in sources]
    for source, found in zip(sources, files):
        if not found:
            raise FileNotFoundError(f"{source}: {'no images in it' if source.is_dir() else 'no such folder'}")
    swap, train = direction == "BtoA", phase == "train"
    return FolderDataset(
        files[::-1] if swap else files,
        make_transform(preprocess, load_size, crop_size, flip=not no_flip, train=train),
        channels=(input_nc, output_nc),
        aligned=dataset_mode == "aligned",
        swap=swap,
        random_b=train and not serial_batches,
    )


class FolderDataset(Dataset):
    """See `open_dataset`. `files` has one list of paths, or (unaligned) one for A and one for B."""

    def __init__(
        self,
        files: list[list[str]],
        transform: v2.Transform,
        channels: tuple[int, int],
        aligned: bool,
        swap: bool,
        random_b: bool,
    ):
        self.files, self.transform, self.channels = files, transform, channels
        self.aligned, self.swap, self.random_b = aligned, swap, random_b

    def __len__(self) -> int:
        return max(map(len, self.files))

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        paths = [files[index % len(files)] for files in self.files]
        if self.random_b and len(paths) == 2:
            paths[1] = self.files[1][int(torch.randint(len(self.files[1]), ()))]
        images = [read_image(path) for path in paths]
        if self.aligned:
            paths, images = paths * 2, split_pair(images[0], paths[0])[:: -1 if self.swap else 1]
        images = [image.convert("L") if nc == 1 else image for image, nc in zip(images, self.channels)]
        try:
            # given together, the two images of a pair share their crop and flip
            tensors = self.transform(*images) if self.aligned else [self.transform(image) for image in images]
        except ValueError as error:
            raise DataError(f"{' or '.join(dict.fromkeys(paths))}: {error}") from error
        return dict(zip("AB", tensors)) | dict(zip(("A_path", "B_path"), paths))


def check_choices(**chosen: str) -> None:
    """Raises ValueError for an option whose value is not in `CHOICES`; the nearest is named."""
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            hint = did_you_mean(str(value), CHOICES[name])
            raise ValueError(f"{name} is one of {', '.join(CHOICES[name])}; received {value!r}{hint}")


def did_you_mean(word: str, words: Collection[str], where: Path = Path()) -> str:
    """The nearest of the words, if one is near, as a question in brackets."""
    by_plain = {plain(other): other for other in words}
    near = difflib.get_close_matches(plain(word), by_plain, 1)
    return f" (did you mean {where / by_plain[near[0]]}?)" if near else ""


def plain(name: str) -> str:
    """A name without its case, strokes and dots."""
    return "".join(filter(str.isalnum, name.lower()))


def source_folders(dataroot: str | Path, dataset_mode: str, phase: str) -> list[Path]:
    """Where the images of a data set lie, whether it exists or not: one folder, or (unaligned) A's and B's."""
    root = Path(dataroot)
    if dataset_mode == "unaligned":
        return [root / f"{phase}A", root / f"{phase}B"]
    return [root / phase if dataset_mode == "aligned" or (root / phase).is_dir() else root]


def image_files(folder: str | Path) -> list[str]:
    """All image files in a folder and below it, sorted; none if there is no such folder. Links are followed,
    hidden files and folders (as macOS leaves beside images) are not."""
    found, seen = [], {os.path.realpath(folder)}
    for root, below, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(below) if name[0] != "."}
        below[:] = [name for name, target in real.items() if target not in seen]  # a link may lead back up
        seen.update(real.values())
        found += [os.path.join(root, n) for n in names if n[0] != "." and n.lower().endswith(EXTENSIONS)]
    return sorted(found)


def read_image(path: str) -> Image.Image:
    """The file decoded, as RGB; errors are those of `open_image`."""
    with open_image(path) as image:
        return image.convert("RGB")


@contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The file opened, to be decoded in the block: the one way in which srpkd opens an image.

    Raises:
        DataError: with the path, for one that cannot be decoded, is none of `FORMATS`, or is so large that Pillow takes
            it for a decompression bomb.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # a decoder may raise nearly anything when the bytes are wrong
        raise DataError(f"{path}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """In plain words, why Pillow could not read an image."""
    if isinstance(error, Image.DecompressionBombError):
        return f"far too large ({error}); if it is what you want, scale it down first"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, whatever its name says"
    if isinstance(error, OSError) and error.errno:
        return error.strerror
    return f"damaged or cut short ({error})"


def split_pair(image: Image.Image, path: str) -> list[Image.Image]:
    """The left and the right half of an aligned image. Raises DataError for an odd width."""
    width, height = image.size
    if width % 2:
        raise DataError(f"{path}: {width} pixels wide, which two equal halves cannot be")
    return [image.crop((x, 0, x + width // 2, height)) for x in (0, width // 2)]


def make_transform(preprocess: str, load_size: int, crop_size: int, flip: bool, train: bool) -> v2.Transform:
    """What `open_dataset` does to PIL images. Images given in one call share their crop and flip."""
    load_size = effective_load_size(preprocess, load_size, crop_size, train)
    steps = [v2.Lambda(partial(_scale, preprocess=preprocess, load_size=load_size, crop_size=crop_size))]
    if "crop" in preprocess:
        steps.append(v2.RandomCrop(crop_size) if train else v2.CenterCrop(crop_size))
    if flip and train:
        steps.append(v2.RandomHorizontalFlip())
    # one mean for all channels, be it one or three: [0, 1] to [-1, 1]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]), v2.ToPureTensor()]
    return v2.Compose(steps)


def effective_load_size(preprocess: str, load_size: int, crop_size: int, train: bool) -> int:
    """The load_size in force: outside training an image that will be cropped is scaled to fit the crop."""
    return load_size if train or "crop" not in preprocess else crop_size


def scaled_size(size: tuple[int, int], preprocess: str, load_size: int, crop_size: int) -> tuple[int, int]:
    """(width, height) of an image after scaling and before the crop."""
    width, height = size
    if preprocess == "resize_and_crop":
        return load_size, load_size
    if preprocess.startswith("scale_width"):
        return load_size, max(load_size * height // width, crop_size)
    if preprocess == "none":
        return max(4, round(width / 4) * 4), max(4, round(height / 4) * 4)
    return width, height


def _scale(image: Image.Image, preprocess: str, load_size: int, crop_size: int) -> Image.Image:
    width, height = scaled_size(image.size, preprocess, load_size, crop_size)
    if "crop" in preprocess and min(width, height) < crop_size:
        # said here because the middle crop would pad a small image with black
        raise ValueError(f"{width} x {height} pixels are too few for crop_size {crop_size}")
    return v2.functional.resize(image, [height, width], InterpolationMode.BICUBIC)


class Images(Dataset):
    """Image files as uint8 tensors (3, H, W).

    Args:
        paths: the files.
        size: scale every image to size x size; None leaves it.
        cut: (image, path) -> the part of it that counts.
        resample: how they are scaled; NEAREST keeps the colours of label maps.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        cut: Callable[[Image.Image, str], Image.Image] | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        self.paths, self.size, self.cut, self.resample = list(paths), size, cut, resample

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.paths[index])
        image = self.cut(image, self.paths[index]) if self.cut else image
        if self.size:
            image = image.resize((self.size, self.size), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def one_size(self) -> bool:
        """Whether all images have one size; reads no pixels."""
        if self.size:
            return True
        sizes = set()
        for path in self.paths:
            with open_image(path) as image:
                sizes.add(image.size)
        return len(sizes) == 1
