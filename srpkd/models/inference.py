"""Inference of a generator on images of any size, and on folders of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import check_type, check_whole
from ..data.images import EXTENSIONS, Crop, image_files, read_image
from ..files import WriteError, atomic_write
from ..finite import NonFiniteError, check_finite
from .networks import image_channels, size_multiple

# Pixels per side: a ResNet's encoder reduces fewer to a single pixel, which instance norm cannot normalise.
MIN_SIZE = 8
PILLOW_MODES = {1: "L", 3: "RGB"}  # by the number of channels


def translate(net: nn.Module, images: Tensor) -> Tensor:
    """Run a generator on images (B, C, H, W) in [-1, 1] of any size and return its output (B, C', H, W) on the CPU.

    The images are padded by reflection to the sizes that the network takes, and the output is cropped.

    Raises:
        TypeError: the images are not a float tensor, or the network was not made by ``define_generator``.
        ValueError: the images have another shape, or are empty.
        NonFiniteError: the images or the output have a NaN or an infinite value.
    """
    output = _forward(net, images)
    check_finite(images, "the input of the generator", "expected images in [-1, 1]")
    check_output(output)
    return output


def check_output(output: Tensor, image: str = "") -> None:
    """Raise a NonFiniteError if a generator's output has a NaN or an infinite value.

    Args:
        output: of any shape.
        image: the input image's path or another name of it, for the message.
    """
    what = f"the generator's output for {image}" if image else "the generator's output"
    check_finite(output, what, "use other weights, such as an earlier checkpoint of the training")


@torch.no_grad()
def _forward(net: nn.Module, images: Tensor) -> Tensor:
    channels = image_channels(net)[0]
    check_type("images", images, Tensor, f"a tensor (B, {channels}, H, W)")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}: expected floats in [-1, 1], such as images / 127.5 - 1")
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise ValueError(f"images have the shape {tuple(images.shape)}: this generator takes (B, {channels}, H, W)")
    height, width = images.shape[2:]
    padded = pad_images(images, size_multiple(net))
    return net(padded.to(next(net.parameters()).device))[:, :, :height, :width].cpu()


def pad_images(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, C, H, W) by reflection at the right and lower edges, to multiples of `multiple`, >= `MIN_SIZE`."""
    rows, columns = (
        reflected_indices(length, max(MIN_SIZE, -length % multiple + length)) for length in images.shape[2:]
    )
    return images[:, :, rows][:, :, :, columns]


def reflected_indices(length: int, padded: int) -> Tensor:
    """Return the indices 0 .. length - 1, extended to `padded` indices by repeated reflection at both ends."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(padded) % period
    return torch.minimum(position, period - position) if length > 1 else torch.zeros(padded, dtype=torch.int64)


def input_mode(net: nn.Module) -> str:
    """Return Pillow's mode of a generator's input images.

    Raises:
        ValueError: the generator's input or output has other than 1 or 3 channels.
    """
    channels = image_channels(net)
    if not set(channels) <= set(PILLOW_MODES):
        raise ValueError(f"this generator goes from {channels[0]} to {channels[1]} channels; image files have 1 or 3")
    return PILLOW_MODES[channels[0]]


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image to (C, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def tensor_to_image(output: Tensor) -> Image.Image:
    """Convert a network's output (C, H, W) in [-1, 1] to an 8-bit image."""
    pixels = ((output.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def translate_folder(
    net: nn.Module,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 1,
    size: int | None = None,
    force: bool = False,
    crop: Crop | None = None,
) -> tuple[list[str], list[str]]:
    """Translate the images in a folder and its sub-folders; the results keep their names, sizes and formats.

    Consecutive images of the same size share a batch.

    Args:
        net: a generator made by ``define_generator`` or ``load_generator``, on its device.
        source: the folder; hidden files are skipped, and an EXIF orientation is not applied.
        target: folder for the results; created if it does not exist.
        batch_size: images per batch, at most.
        size: scale every image to size x size first; by default it keeps its own size.
        force: replace files that exist.
        crop: (image, path) -> the part of it to translate.

    Returns:
        The paths that were written, and "path: reason" for each image that could not be read.

    Raises:
        FileExistsError: results exist already; raised before anything is translated.
        FileNotFoundError: the source does not exist or has no images.
        NotADirectoryError: the target is a file.
        ValueError: the target is the source or inside it, or the network has other than 1 or 3 channels.
        NonFiniteError: an output has a NaN or an infinite value; it is not written, the results before it are complete.
        WriteError: a result cannot be written; the results before it are complete.
    """
    check_whole("batch_size", batch_size, least=1)
    if size is not None:
        check_whole("size", size, least=1)
    source, target = Path(source).expanduser(), Path(target).expanduser()
    mode = input_mode(net)
    paths = _images_to_translate(source, target, force)
    written: list[str] = []
    skipped: list[str] = []

    def load(path: str) -> Tensor | None:
        try:
            image = read_image(path)
            image = crop(image, path) if crop else image
        except ValueError as error:
            skipped.append(str(error))
            return None
        image = image.convert(mode)
        return image_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC) if size else image)

    was_training = net.training
    net.eval()
    try:
        with tqdm(paths, unit="image", desc="translating") as progress:  # closed before an error is printed
            loaded = ((path, load(path)) for path in progress)
            images = ((path, image) for path, image in loaded if image is not None)
            for batch_paths, batch in _batches_of_one_size(images, batch_size):
                for path, output in zip(batch_paths, _forward(net, batch)):
                    try:
                        check_output(output, path)
                        written.append(save_output(output, target / os.path.relpath(path, source)))
                    except (NonFiniteError, WriteError) as error:
                        if not written:
                            raise
                        raise type(error)(f"{error}. {len(written)} of {len(paths)} images are written") from error
    finally:
        net.train(was_training)
    return written, skipped


def _images_to_translate(source: Path, target: Path, force: bool) -> list[str]:
    """Return the images of the source; check both folders, and that no result exists unless `force`."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give the folder of the images to translate")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder for the results")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} is inside {source}: give a folder for the results outside that of the images")
    paths = image_files(source)
    if not paths:
        raise FileNotFoundError(f"{source} has no images ({' '.join(EXTENSIONS)})")
    existing = [path for path in paths if (target / os.path.relpath(path, source)).exists()]
    if existing and not force:
        raise FileExistsError(
            f"{len(existing)} of the results exist already, such as {target / os.path.relpath(existing[0], source)}: "
            "use --force to replace them, or give another folder"
        )
    return paths


def _batches_of_one_size(images: Iterable[tuple[str, Tensor]], batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Group (path, image (C, H, W)) to (paths, batch (B, C, H, W)): of consecutive images of the same size."""
    paths: list[str] = []
    batch: list[Tensor] = []
    for path, image in images:
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield paths, torch.stack(batch)
            paths, batch = [], []
        paths.append(path)
        batch.append(image)
    if batch:
        yield paths, torch.stack(batch)


def save_output(output: Tensor, path: Path) -> str:
    """Write a network's output (C, H, W) in [-1, 1] as an image file in the format of its suffix; return the path."""
    image_format = Image.registered_extensions()[path.suffix.lower()]
    quality: dict[str, dict[str, int]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    with atomic_write(path) as file:
        tensor_to_image(output).save(file, image_format, **quality.get(image_format, {}))
    return str(path)
