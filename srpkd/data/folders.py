"""Datasets of image folders, in the layouts of junyanz/pytorch-CycleGAN-and-pix2pix (its data/ folder).

`unaligned`  root/trainA, root/trainB, root/testA, root/testB: images of two domains, not paired
`aligned`    root/train, root/test: pairs, A in the left half of an image and B in the right half; or A and B as two
             files of equal names, in train/A and train/B, A/train and B/train, trainA and trainB, or train_A and
             train_B

The two folders of `unaligned` may have the names of any of these forms too. Folders named val serve as test if there
are no test images. Sub-folders are searched too. An EXIF orientation is applied, and images of more than 8 bits per
channel keep their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import check_choice, check_whole
from . import Direction
from .images import DataError, read_image, split_pair
from .layouts import DatasetMode, FolderLayout, find_layout
from .picture import Picture, picture_size, resize_picture, with_channels

if TYPE_CHECKING:  # functions import torchvision: it takes two seconds, and other data sets do without it
    from torchvision.transforms import v2

Preprocess = Literal["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"]
CHOICES: dict[str, tuple[str, ...]] = {
    "dataset_mode": get_args(DatasetMode),
    "direction": get_args(Direction),
    "preprocess": get_args(Preprocess),
}


def open_dataset(
    dataroot: str | Path,
    dataset_mode: DatasetMode,
    phase: str = "train",
    direction: Direction = "AtoB",
    preprocess: Preprocess = "resize_and_crop",
    load_size: int = 286,
    crop_size: int = 256,
    no_flip: bool = False,
    serial_batches: bool = False,
    max_dataset_size: int | None = None,
    input_nc: int = 3,
    output_nc: int = 3,
    layout: FolderLayout | None = None,
) -> FolderDataset:
    """Open the images under `dataroot` as a dataset of
    {"A": (input_nc, H, W), "B": (output_nc, H, W), "A_path": str, "B_path": str}, float32 in [-1, 1].

    "A" is the network's input and "B" its target: with direction "BtoA" the two sides are swapped here and nowhere
    else. One channel means grayscale.

    `srpkd.data.validate.validate_dataset` finds all problems of a dataset before training starts.

    Args:
        dataroot: the root folder.
        dataset_mode: the layout, see the module's docstring.
        phase: "train", "test" or another prefix of the folders' names. Outside training nothing is random, as with the
            public code's test defaults: the crop is the centre, nothing is mirrored, and images are scaled to
            `crop_size` in place of `load_size` (except for "scale_width", which keeps the scale of the training).
        direction: "AtoB" or "BtoA".
        preprocess: how an image is scaled (bicubic, with antialiasing) and cropped:
            "resize_and_crop"       to load_size x load_size, then a crop of crop_size x crop_size;
            "crop"                  only the crop;
            "scale_width"           to width load_size, height in proportion but at least crop_size;
            "scale_width_and_crop"  both;
            "none"                  each side to the nearest multiple of 4.
        load_size: side or width in pixels after scaling.
        crop_size: side of the crop in pixels. In training its position is random; the halves of an aligned pair share
            it.
        no_flip: in training, do not mirror half of the images; the halves of an aligned pair are mirrored together.
        serial_batches: `unaligned` has the length of the larger side, and the smaller side repeats. In training "B" is
            drawn at random unless this is set.
        max_dataset_size: use only so many files (or pairs) of each folder, the first ones in sorted order.
        input_nc, output_nc: channels of "A" and "B", 1 or 3.
        layout: what `find_layout` returned for these arguments; by default it is called here.

    All random numbers come from torch's default generator, which a DataLoader seeds in each worker.

    Raises:
        ValueError: an unknown choice, a size below 1 or other than 1 or 3 channels.
        TypeError: a size is not an integer.
        FileNotFoundError: a folder does not exist or has no images.
        DataError: files of two folders cannot be paired by name; when an item is read: the image cannot be decoded or
            is smaller than the crop.
    """
    check_choice("dataset_mode", dataset_mode, CHOICES["dataset_mode"])
    check_choice("direction", direction, CHOICES["direction"])
    check_choice("preprocess", preprocess, CHOICES["preprocess"])
    check_whole("load_size", load_size, least=1)
    check_whole("crop_size", crop_size, least=1)
    if max_dataset_size is not None:
        check_whole("max_dataset_size", max_dataset_size, least=1)
    for name, channels in (("input_nc", input_nc), ("output_nc", output_nc)):
        if channels not in (1, 3):
            raise ValueError(f"{name}={channels!r}: expected 1 (grey) or 3 (RGB) channels")
    layout = layout or find_layout(dataroot, dataset_mode, phase)
    files = layout.files(max_dataset_size)
    for source, found in zip(layout.folders, files):
        if not found:
            raise FileNotFoundError(f"{source}: {'no images in this folder' if source.is_dir() else 'no such folder'}")
    swap, train = direction == "BtoA", phase == "train"
    return FolderDataset(
        files[::-1] if swap else files,
        make_transform(preprocess, load_size, crop_size, flip=not no_flip, train=train),
        channels=(input_nc, output_nc),
        aligned=dataset_mode == "aligned",
        swap=swap,
        random_b=train and not serial_batches and dataset_mode == "unaligned",
    )


class FolderDataset(Dataset[dict[str, Tensor | str]]):
    """Dataset of image files; see `open_dataset`.

    Args:
        files: a list of paths for "A" and one for "B", or one list of pairs side by side.
        transform: pictures -> tensors (C, H, W).
        channels: of "A" and of "B".
        aligned: each file is a pair side by side, or the two lists are pairs of files.
        swap: "A" is the right half of a pair.
        random_b: draw the file of "B" at random.
    """

    def __init__(
        self,
        files: list[list[str]],
        transform: v2.Transform,
        channels: tuple[int, int],
        aligned: bool,
        swap: bool,
        random_b: bool,
    ) -> None:
        self.files, self.transform, self.channels = files, transform, channels
        self.aligned, self.swap, self.random_b = aligned, swap, random_b

    def __len__(self) -> int:
        return max(map(len, self.files))

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: the dataset has {len(self)} items")
        paths = [files[index % len(files)] for files in self.files]
        if self.random_b:
            paths[1] = self.files[1][int(torch.randint(len(self.files[1]), ()))]
        images = [read_image(path) for path in paths]
        if len(images) == 1:
            left, right = split_pair(images[0], paths[0])
            paths, images = paths * 2, [right, left] if self.swap else [left, right]
        images = [with_channels(image, 1) if nc == 1 else image for image, nc in zip(images, self.channels)]
        images = [_marked(image) for image in images]
        # in one call, the two images of a pair share their crop and flip
        groups = [(paths, images)] if self.aligned else [([path], [image]) for path, image in zip(paths, images)]
        tensors = [tensor for group in groups for tensor in self._transformed(*group)]
        if self.aligned and tensors[0].shape[1:] != tensors[1].shape[1:]:
            height, width = zip(*(tensor.shape[1:] for tensor in tensors))
            raise DataError(
                f"{' and '.join(paths)}: {width[0]} x {height[0]} and {width[1]} x {height[1]} pixels; expected a pair "
                "of one size: scale the files to the same size"
            )
        return dict(zip("AB", tensors)) | dict(zip(("A_path", "B_path"), paths))

    def _transformed(self, paths: list[str], images: list[Picture]) -> Sequence[Tensor]:
        try:
            tensors = self.transform(*images)
        except ValueError as error:
            raise DataError(f"{' or '.join(dict.fromkeys(paths))}: {error}") from error
        return tensors if len(images) > 1 else [tensors]


def make_transform(preprocess: Preprocess, load_size: int, crop_size: int, flip: bool, train: bool) -> v2.Transform:
    """Return the transform of `open_dataset`. Images of one call share their crop and flip."""
    from torchvision.transforms import v2

    load_size = effective_load_size(preprocess, load_size, crop_size, train)
    steps = [v2.Lambda(partial(_scale, preprocess=preprocess, load_size=load_size, crop_size=crop_size))]
    if "crop" in preprocess:
        steps.append(v2.RandomCrop(crop_size) if train else v2.CenterCrop(crop_size))
    if flip and train:
        steps.append(v2.RandomHorizontalFlip())
    # a mean and a std of one value serve one and three channels: [0, 1] to [-1, 1]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]), v2.ToPureTensor()]
    return v2.Compose(steps)


def effective_load_size(preprocess: Preprocess, load_size: int, crop_size: int, train: bool) -> int:
    """Return the load_size in effect: outside training, images that will be cropped are scaled to the crop's size."""
    return load_size if train or "crop" not in preprocess else crop_size


def scaled_size(size: tuple[int, int], preprocess: Preprocess, load_size: int, crop_size: int) -> tuple[int, int]:
    """Return (width, height) of an image after scaling and before the crop."""
    width, height = size
    if preprocess == "resize_and_crop":
        return load_size, load_size
    if preprocess in ("scale_width", "scale_width_and_crop"):
        return load_size, max(load_size * height // width, crop_size)
    if preprocess == "none":
        return max(4, round(width / 4) * 4), max(4, round(height / 4) * 4)
    return width, height


def _scale(image: Picture, preprocess: Preprocess, load_size: int, crop_size: int) -> Picture:
    width, height = scaled_size(picture_size(image), preprocess, load_size, crop_size)
    if "crop" in preprocess and min(width, height) < crop_size:
        # CenterCrop would pad a small image with black
        raise ValueError(
            f"{width} x {height} pixels are smaller than crop_size {crop_size}: use a smaller crop_size, or "
            "preprocess resize_and_crop"
        )
    return _marked(resize_picture(image, width, height))


def _marked(picture: Picture) -> Picture:
    """Mark a tensor as an image: of several plain tensors torchvision transforms only the first."""
    from torchvision import tv_tensors

    return tv_tensors.Image(picture) if isinstance(picture, Tensor) else picture
