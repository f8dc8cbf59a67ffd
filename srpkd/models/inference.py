"""Inference of a generator on images of any size, and on folders of image files."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_whole
from ..data.encode import LOSSY, WITH_FRAMES, Source, encode, image_format, lost_properties, read_source
from ..data.images import AHEAD, Crop, in_threads, open_image
from ..data.listing import EXTENSIONS, Listing, list_images, relative_name, relative_path
from ..data.picture import PILLOW_MODES, Picture, image_to_tensor, resize_picture, with_channels
from ..devices import is_out_of_memory
from ..files import Sync, WriteError, expand_user, is_case_sensitive, write_file
from ..finite import NonFiniteError, check_finite
from ..progress import ProgressBar
from .networks import image_channels, size_multiple

T = TypeVar("T")
R = TypeVar("R")
# Pixels per side: a ResNet's encoder reduces fewer to a single pixel, which instance norm cannot normalise.
MIN_SIZE = 8


@torch.no_grad()
def translate(net: nn.Module, images: Tensor) -> Tensor:
    """Run a generator on images (B, C, H, W) in [-1, 1] of any size and return its output (B, C', H, W) on the CPU.

    The images are padded by reflection to the sizes that the network takes, and the output is cropped.
    """
    height, width = images.shape[2:]
    padded = pad_images(images, size_multiple(net))
    return net(padded.to(next(net.parameters()).device))[:, :, :height, :width].cpu()


def translate_what_fits(net: nn.Module, images: Tensor) -> list[Tensor | None]:
    """Return each image's output (C', H, W), as ``translate``, or None if the memory does not suffice for it alone."""
    try:
        return list(translate(net, images))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # here, not in the handler, whose traceback keeps the layers' outputs
    if len(images) == 1:
        return [None]
    return [output for image in images for output in translate_what_fits(net, image[None])]


def check_output(output: Tensor, image: str) -> None:
    """Raise a NonFiniteError if a generator's output has a NaN or an infinite value.

    Args:
        output: of any shape.
        image: the input image's path or another name of it, for the message.
    """
    advice = "use other weights, such as an earlier checkpoint of the training"
    check_finite(output, f"the generator's output for {image}", advice)


def pad_images(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, C, H, W) by reflection at the right and lower edges, to multiples of `multiple`, >= `MIN_SIZE`."""
    rows, columns = (
        np.pad(np.arange(length), (0, max(MIN_SIZE, -length % multiple + length) - length), mode="reflect")
        for length in images.shape[2:]
    )  # unlike torch's, also of images that are smaller than their padding
    return images[:, :, torch.from_numpy(rows)][:, :, :, torch.from_numpy(columns)]


def input_channels(net: nn.Module) -> int:
    """Return the number of channels of a generator's input images.

    Raises:
        ValueError: the generator's input or output has other than 1 or 3 channels.
    """
    channels = image_channels(net)
    if not set(channels) <= set(PILLOW_MODES):
        raise ValueError(f"this generator goes from {channels[0]} to {channels[1]} channels; image files have 1 or 3")
    return channels[0]


class Translated(NamedTuple):
    """What ``translate_folder`` did.

    Attributes:
        written: paths of the results.
        skipped: "path: reason" for each image that could not be read, or is too large for the memory.
        notes: sentences on what the results lack (further frames, alpha channels, ...), and on images left out.
        others: how many files of the source are no images, as in ``Listing``.
    """

    written: list[str]
    skipped: list[str]
    notes: list[str]
    others: str


@dataclass
class _File:
    """An image file on its way through the network; ``frames`` is how many it has, one per input or more."""

    path: str
    source: Source
    frames: int
    inputs: list[Picture]
    outputs: list[Tensor] = field(default_factory=list)
    is_too_large: bool = False  # for the memory


def translate_folder(
    net: nn.Module,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 1,
    size: int | None = None,
    force: bool = False,
    skip_existing: bool = False,
    crop: Crop | None = None,
    all_frames: bool = False,
    lossless: bool = False,
    sync: Sync = "content",
) -> Translated:
    """Translate the images in a folder and its sub-folders; the results keep their names, sizes and formats.

    The results are upright: an EXIF orientation is applied. They keep the alpha channel, the ICC profile and the depth
    of 16-bit and float images where their format and channels allow it. Consecutive images of the same size share a
    batch.

    Args:
        net: a generator made by ``define_generator`` or ``load_generator``, on its device.
        source: the folder; hidden files are skipped.
        target: folder for the results; created if it does not exist.
        batch_size: images per batch, at most.
        size: scale every image to size x size first; by default it keeps its own size.
        force: replace files that exist.
        skip_existing: leave out the images whose results exist, for example after an interruption; before ``force``.
        crop: (image, path) -> the part of it to translate.
        all_frames: translate all pages or frames of a file, not only the first.
        lossless: write PNG in place of formats that change the pixels: ``a.jpg`` becomes ``from_jpg/a.png``, which is
            not the name of another result.
        sync: what survives a power failure, as for `atomic_write`. "content": ``skip_existing`` finds no empty file.

    Raises:
        FileExistsError: results exist already; raised before anything is translated.
        FileNotFoundError: the source does not exist or has no images.
        NotADirectoryError: the target is a file.
        ValueError: the target is the source or inside it, the network has other than 1 or 3 channels, or the names of
            two images differ only in case and the file system of the target does not tell them apart.
        NonFiniteError: an output has a NaN or an infinite value; it is not written, the results before it are complete.
        WriteError: a result cannot be written; the results before it are complete.
    """
    check_whole("batch_size", batch_size, least=1)
    if size is not None:
        check_whole("size", size, least=1)
    source, target = expand_user(source), expand_user(target)
    channels = input_channels(net)

    def result_of(path: str) -> Path:
        name = Path(relative_path(path, source))
        if lossless and image_format(name.suffix) in LOSSY:
            name = f"from_{name.suffix[1:]}" / name.with_suffix(".png")
        return target / name

    paths, others = _images_to_translate(source, target)
    existing = _with_results(paths, result_of)
    if skip_existing:
        paths = [path for path in paths if path not in existing]
    elif existing and not force:
        first = next(result_of(path) for path in paths if path in existing)
        raise FileExistsError(
            f"{len(existing)} of the results exist already, such as {first}: "
            "use --skip_existing to translate only the other images, --force to replace them, or give another folder"
        )
    written: list[str] = []
    skipped: list[str] = []
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    advice = "no result of this format has more" if all_frames else "use --all_frames for the others"

    def each(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Yield results. A GPU would wait for files. Threads would delay a network on the CPU more than they gain."""
        return (function(item) for item in items) if _on_cpu(net) else in_threads(function, items, AHEAD)

    def read(path: str) -> _File | ValueError:
        try:
            return _read_file(path, channels, size, crop, all_frames)
        except ValueError as error:
            return error

    def files(progress: Iterable[str]) -> Generator[_File, None, None]:
        for path, file in zip(progress, each(read, paths)):
            if isinstance(file, ValueError):
                skipped.append(str(file))
                continue
            if len(file.inputs) < file.frames:
                lacking[f"only the first page or frame of an image with several ({advice})"].append(path)
            yield file

    def write(file: _File) -> tuple[str, list[str]]:
        result = result_of(file.path)
        format = image_format(result.suffix)
        write_file(result, encode(file.outputs, file.source, format), sync)
        return str(result), lost_properties(file.outputs, file.source, format)

    was_training = net.training
    net.eval()
    try:
        with (  # the bar is closed before an error is printed
            ProgressBar(paths, unit="image", desc="translating") as progress,
            closing(files(progress)) as read_files,
            closing(each(write, _translated(net, read_files, batch_size, skipped))) as results,
        ):
            for result, properties in results:
                written.append(result)
                for lost in properties:
                    lacking[f"without {lost}"].append(result)
    except (NonFiniteError, WriteError) as error:
        if not written:
            raise
        raise type(error)(f"{error}. {len(written)} of {len(paths)} images are written") from error
    finally:
        net.train(was_training)
    notes = [
        f"{len(where)} image{'s' if len(where) > 1 else ''}: {what}, such as {where[0]}"
        for what, where in lacking.items()
    ]
    if skip_existing and existing:
        notes.append(f"{len(existing):,} results exist already: their images were left out")
    return Translated(written, skipped, notes, others)


def _on_cpu(net: nn.Module) -> bool:
    return next(net.parameters()).device.type == "cpu"


def _read_file(path: str, channels: int, size: int | None, crop: Crop | None, all_frames: bool) -> _File:
    """Decode an image file for a network of so many channels. Raises the errors of ``open_image``."""

    def part(picture: Picture) -> Picture:
        picture = crop(picture, path) if crop else picture
        return resize_picture(picture, size, size) if size else picture

    with open_image(path) as image:
        frames = image.frames
        keeps_frames = all_frames and image_format(Path(path).suffix) in WITH_FRAMES
        pictures, source = read_source(image, frames if keeps_frames else 1)
    source.alpha = [alpha if alpha is None else part(alpha) for alpha in source.alpha]
    return _File(path, source, frames, [part(with_channels(p, channels)) for p in pictures])


def _with_results(paths: Iterable[str], result_of: Callable[[str], Path]) -> set[str]:
    """Return the images whose results exist. Lists the folders of the results: a look at each takes much longer."""

    @cache
    def listing(folder: Path) -> tuple[set[str], set[str]]:
        """Return the names in a folder, as they are and as a file system may compare them."""
        names = set(os.listdir(folder)) if folder.is_dir() else set()
        return names, set(map(_comparable, names))

    def exists(path: Path) -> bool:
        names, comparable = listing(path.parent)
        return path.name in names or (_comparable(path.name) in comparable and path.exists())

    return {path for path in paths if exists(result_of(path))}


def _comparable(name: str) -> str:
    """Return the same string for all names that a file system may take for equal: é has two forms, and two cases."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _images_to_translate(source: Path, target: Path) -> Listing:
    """Return the images of the source; check both folders."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give the folder of the images to translate")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder for the results")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} is inside {source}: give a folder for the results outside that of the images")
    found = list_images(source)
    if not found.images:
        raise FileNotFoundError(f"{source} has no images ({' '.join(EXTENSIONS)})")
    names = [relative_name(path, source).casefold() for path in found.images]
    counts = Counter(names)
    alike = [path for path, name in zip(found.images, names) if counts[name] > 1]
    if alike and not is_case_sensitive(target):
        raise ValueError(
            f"{' and '.join(alike[:2])} differ only in case, and would be one file in {target}, whose file system does "
            "not tell upper case from lower case: rename one, or write elsewhere"
        )
    return found


def _translated(net: nn.Module, files: Iterable[_File], batch_size: int, skipped: list[str]) -> Iterator[_File]:
    """Yield the files in order, each when it has all its outputs; raises as ``check_output``.

    Files with an image that is too large for the memory are added to ``skipped``; their other images are left out.
    """
    images = ((file, image_to_tensor(image)) for file in files for image in file.inputs if not file.is_too_large)
    for owners, batch in _batches_of_one_size(images, batch_size):
        for file, output in zip(owners, translate_what_fits(net, batch)):
            if output is not None:
                check_output(output, file.path)
                file.outputs.append(output)
                if len(file.outputs) == len(file.inputs):
                    yield file
            elif not file.is_too_large:  # once for a file with several frames
                file.is_too_large = True
                skipped.append(_too_large(file.path, batch, net))


def _too_large(path: str, batch: Tensor, net: nn.Module) -> str:
    height, width = batch.shape[2:]
    device = next(net.parameters()).device
    elsewhere = "" if _on_cpu(net) else " --device cpu or"
    return (
        f"{path}: the network needs more memory for {width} x {height} pixels than {device} has free: "
        f"use{elsewhere} a smaller --size, or scale the image down"
    )


def _batches_of_one_size(
    images: Iterable[tuple[_File, Tensor]], batch_size: int
) -> Iterator[tuple[list[_File], Tensor]]:
    """Group (file, image (C, H, W)) to (files, batch (B, C, H, W)): of consecutive images of the same size."""
    files: list[_File] = []
    batch: list[Tensor] = []
    for file, image in images:
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield files, torch.stack(batch)
            files, batch = [], []
        files.append(file)
        batch.append(image)
    if batch:
        yield files, torch.stack(batch)
