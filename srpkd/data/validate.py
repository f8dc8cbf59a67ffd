"""Validation of an image dataset before training: all its problems in one error."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from ..arguments import check_choice, check_whole, shorten
from ..progress import ProgressBar
from . import Direction
from .folders import CHOICES, Preprocess, effective_load_size, scaled_size
from .images import DataError, describe_further_frames, in_threads, open_image
from .layout_hints import missing_folders
from .layouts import DatasetMode, FolderLayout, find_layout, known_layouts
from .listing import EXTENSIONS

Size = tuple[int, int]  # (width, height)

# Number of files per folder that are decoded completely, at most: only this finds every kind of damage, and it takes
# about a second for small photos. In a larger folder these files are evenly spaced; of the others only the header is
# read (and the checksums of PNG).
DECODED = 500
BAR_DELAY = 3  # seconds before a progress bar appears: headers of many files on a network drive can take minutes


@dataclass(frozen=True)
class DatasetReport:
    """Statistics of a valid dataset; `str()` gives one line.

    layout: the folders, and how their images are read
    counts: images per folder, as {"trainA": 1067, "trainB": 1334}
    sizes: (width, height) of the files -> how many have it
    network_sizes: the different (width, height) of the network's inputs
    decoded: how many files were decoded completely
    others: for each folder with files that are no images, how many, in words
    further_frames: how many images have more than one page or frame, in words
    file_bytes: for each folder, path -> size of the file
    """

    layout: FolderLayout
    counts: dict[str, int]
    sizes: dict[Size, int]
    network_sizes: list[Size]
    decoded: int
    others: dict[str, str] = field(default_factory=dict)
    further_frames: str = ""
    file_bytes: list[dict[str, int]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        counts = " and ".join(f"{count:,} images in {name}" for name, count in self.counts.items())
        total = sum(self.counts.values())
        decoded = "all" if self.decoded == total else f"{self.decoded:,}"
        return (
            f"{self.layout}: {counts}, {_size_range(self.sizes)} pixels, {decoded} decoded without error; "
            f"the network gets {_size_range(self.network_sizes)}"
            + "".join(f"; {others} in {name} left out" for name, others in self.others.items())
            + (f"; {self.further_frames}" if self.further_frames else "")
        )


class _Header(NamedTuple):
    """What is known of a readable image file."""

    path: str
    size: Size  # upright
    frames: int
    file_size: int  # in bytes
    decoded: bool


class _Folder(NamedTuple):
    """What is known of a folder.

    files: its images
    headers: of the readable ones
    unreadable: (path, reason) of the others
    others: how many other files there are, in words
    """

    path: Path
    name: str
    files: Sequence[str]
    headers: list[_Header]
    unreadable: list[tuple[str, str]]
    others: str


@dataclass(frozen=True)
class _Geometry:
    """Sizes of an image on its way from the file to the network.

    given_load_size: the --load_size; outside training, the load_size in effect may be another.
    size_multiple: the network's sides must be multiples of it.
    """

    preprocess: Preprocess
    load_size: int
    crop_size: int
    given_load_size: int
    size_multiple: int
    side_by_side: bool = False

    def image_size(self, header: _Header) -> Size:
        """Size of one image: for a pair side by side, of its half."""
        width, height = header.size
        return (width // 2 if self.side_by_side else width), height

    def scaled_size(self, header: _Header) -> Size:
        return scaled_size(self.image_size(header), self.preprocess, self.load_size, self.crop_size)

    def network_size(self, header: _Header) -> Size:
        return (self.crop_size, self.crop_size) if "crop" in self.preprocess else self.scaled_size(header)

    def flags(self, preprocess: str) -> str:
        """Return the options that switch to another --preprocess, with sizes that it accepts."""
        crop_size = max(self.crop_size - self.crop_size % self.size_multiple, self.size_multiple)
        flags = f"--preprocess {preprocess}"
        flags += f" --crop_size {crop_size}" if crop_size != self.crop_size else ""
        return flags + (f" --load_size {crop_size}" if crop_size > self.given_load_size else "")


def validate_dataset(
    dataroot: str | Path,
    dataset_mode: DatasetMode,
    phase: str = "train",
    *,
    direction: Direction = "AtoB",
    preprocess: Preprocess = "resize_and_crop",
    load_size: int = 286,
    crop_size: int = 256,
    max_dataset_size: int | None = None,
    size_multiple: int = 1,
    batch_size: int = 1,
    layout: FolderLayout | None = None,
    progress: bool = False,
) -> DatasetReport:
    """Check all images that `open_dataset` would read with the same arguments.

    Writes no file and draws no random numbers.

    Args:
        size_multiple: both sides of the network's input must be multiples of it: 4 for a ResNet, 2 ** downs for a
            U-Net.
        batch_size: images per batch; more than one must have the same size.
        layout: what `find_layout` returned for these arguments; by default it is called here.
        progress: show a progress bar if it takes longer than a few seconds.

    Raises:
        DataError: lists *all* problems: options that contradict each other; a dataroot or folder that does not exist,
            with what exists instead; folders without images; files that cannot be decoded (see `DECODED`) or have an
            unsupported depth; pairs that are not two halves, or two files of equal names and sizes; images smaller than
            the crop; sizes that are not a multiple of `size_multiple`; sizes that differ within a batch.
    """
    root = Path(dataroot)
    heading = f"The dataset {root} ({dataset_mode}, {phase}) cannot be used:"
    choices = {"dataset_mode": dataset_mode, "direction": direction, "preprocess": preprocess}
    sizes = {"load_size": load_size, "crop_size": crop_size, "size_multiple": size_multiple}
    if problems := _invalid_arguments(choices, sizes):
        raise DataError(heading, problems)  # the other checks need valid arguments

    effective = effective_load_size(preprocess, load_size, crop_size, phase == "train")
    geometry = _Geometry(preprocess, effective, crop_size, load_size, size_multiple)

    def inspect(layout: FolderLayout) -> tuple[list[str], DatasetReport]:
        return _inspect(layout, geometry, max_dataset_size, batch_size, progress)

    layout = layout or find_layout(root, dataset_mode, phase)
    problems = _size_problems(geometry)
    if not layout.exists:
        hint = missing_folders(root, dataset_mode, phase, lambda other: inspect(other)[0])
        raise DataError(heading, [*problems, hint])
    found, report = inspect(layout)
    if found and dataset_mode == "aligned":
        found += _other_layout(layout, lambda other: not inspect(other)[0])
    if problems or found:
        raise DataError(heading, problems + found)
    return report


def _other_layout(layout: FolderLayout, is_usable: Callable[[FolderLayout], bool]) -> list[str]:
    """Return how to use images that are not in the layout of pairs that was found; [] if there are none."""
    for other in known_layouts(layout.root, "aligned", layout.phase):
        if layout.is_side_by_side and other.is_paired_by_name and other.has_images and is_usable(other):
            return [
                f"{' and '.join(other.names)} have pairs that can be used: to read them, move the other images out of "
                f"{layout.folders[0]}"
            ]
    unpaired = find_layout(layout.root, "unaligned", layout.phase)
    if unpaired.has_images and is_usable(unpaired):
        return [
            f"the images in {' and '.join(unpaired.names)} can be used without pairs: use --model cycle_gan "
            "--dataset_mode unaligned"
        ]
    return []


def _inspect(
    layout: FolderLayout, geometry: _Geometry, max_dataset_size: int | None, batch_size: int, progress: bool
) -> tuple[list[str], DatasetReport]:
    """Return the problems of the images of a layout whose folders exist, and statistics of the readable ones."""
    geometry = replace(geometry, side_by_side=layout.is_side_by_side)
    try:
        files_of_folders = layout.files(max_dataset_size)
    except DataError as error:
        return error.problems, DatasetReport(layout, {}, {}, [], 0)
    folders = [
        _read_folder(folder, name, files, layout.list_folder(folder).others, progress)
        for folder, name, files in zip(layout.folders, layout.names, files_of_folders)
    ]
    headers = [header for folder in folders for header in folder.headers]
    problems = [problem for folder in folders for problem in _folder_problems(folder, geometry, batch_size)]
    if layout.is_paired_by_name:
        problems += _pair_problems(layout, geometry, files_of_folders, {header.path: header for header in headers})
    return problems, DatasetReport(
        layout,
        counts={folder.name: len(folder.files) for folder in folders},
        sizes=Counter(header.size for header in headers),
        network_sizes=sorted({geometry.network_size(header) for header in headers}),
        decoded=sum(header.decoded for header in headers),
        others={folder.name: folder.others for folder in folders if folder.others},
        further_frames=describe_further_frames([header.path for header in headers if header.frames > 1]),
        file_bytes=[{header.path: header.file_size for header in folder.headers} for folder in folders],
    )


def _read_folder(path: Path, name: str, files: Sequence[str], others: str, progress: bool) -> _Folder:
    bar = ProgressBar(
        _read_headers(files),
        total=len(files),
        desc=f"validating {name}",
        unit="image",
        delay=BAR_DELAY,
        mininterval=1,  # keeps log files short
        leave=False,
        disable=not progress,
    )
    with bar:
        found = list(bar)
    headers = [header for header in found if isinstance(header, _Header)]
    unreadable = [problem for problem in found if not isinstance(problem, _Header)]
    return _Folder(path, name, files, headers, unreadable, others)


def _folder_problems(folder: _Folder, geometry: _Geometry, batch_size: int) -> list[str]:
    if not folder.files:
        return [f"{folder.path}: no images ({' '.join(EXTENSIONS)}); it has {folder.others or 'no files'}"]
    problems = []
    unusable = {"cannot be read": folder.unreadable} | _unusable_images(folder.headers, geometry)
    for problem, details in unusable.items():
        if details:
            names = shorten([f"{os.path.relpath(path, folder.path)} ({detail})" for path, detail in details])
            advice = "; fix or remove them" if details is folder.unreadable else ""
            problems.append(f"{len(details):,} of {len(folder.files):,} images {problem}: {names}{advice}")
    sizes = {geometry.network_size(header) for header in folder.headers}
    if batch_size > 1 and len(sizes) > 1:
        problems.append(
            f"a batch of {batch_size} needs images of one size; --preprocess {geometry.preprocess} gives "
            f"{_size_range(sizes)}: use {geometry.flags('resize_and_crop')} or --batch_size 1"
        )
    return [f"{folder.path}: {problem}" for problem in problems]


def _pair_problems(
    layout: FolderLayout, geometry: _Geometry, files: list[list[str]], readable: Mapping[str, _Header]
) -> list[str]:
    """Return the problem of pairs of files whose images differ in size or shape, if there are any."""
    differing, same_shape = [], True
    for path_a, path_b in zip(*files):
        if path_a not in readable or path_b not in readable:
            continue
        a, b = readable[path_a], readable[path_b]
        # a rounded side may change the ratio of a scaled copy slightly
        proportional = abs(a.size[0] * b.size[1] - b.size[0] * a.size[1]) <= max(*a.size, *b.size)
        if not proportional or geometry.scaled_size(a) != geometry.scaled_size(b):
            same_shape &= proportional
            name = os.path.relpath(path_a, layout.folders[0])
            differing.append(f"{name} ({_format_size(a.size)} and {_format_size(b.size)})")
    if not differing:
        return []
    advice = f"use {geometry.flags('resize_and_crop')}, or " if same_shape else ""
    return [
        f"{' and '.join(layout.names)}: {len(differing):,} of {len(files[0]):,} pairs are two images of different "
        f"{'sizes' if same_shape else 'shapes'}: {advice}scale the files of a pair to the same size: "
        f"{shorten(differing)}"
    ]


def _invalid_arguments(choices: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    problems = []
    for name, choice in choices.items():
        try:
            check_choice(f"--{name}", choice, CHOICES[name])
        except ValueError as error:
            problems.append(str(error))
    for name, size in sizes.items():
        try:
            check_whole(f"--{name}", size, least=1)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    return problems


def _size_problems(geometry: _Geometry) -> list[str]:
    """Return the problems of the sizes that do not depend on the images."""
    problems: list[str] = []
    preprocess, load_size, crop_size = geometry.preprocess, geometry.load_size, geometry.crop_size
    multiple = geometry.size_multiple
    if "crop" not in preprocess:
        return problems
    if preprocess != "crop" and load_size < crop_size:
        problems.append(
            f"--crop_size {crop_size} is larger than --load_size {load_size}, the size that images are scaled to "
            "before the crop: use a smaller --crop_size or a larger --load_size"
        )
    if rest := crop_size % multiple:
        nearest = [size for size in (crop_size - rest, crop_size - rest + multiple) if size]
        limit = nearest[-1] if preprocess == "crop" else geometry.given_load_size
        advice = [f"{size}" if size <= limit else f"{size} with --load_size {size}" for size in nearest]
        problems.append(
            f"--crop_size {crop_size} is not a multiple of {multiple}, as this generator needs: use "
            f"{' or '.join(advice)}"
        )
    return problems


def _unusable_images(headers: list[_Header], geometry: _Geometry) -> dict[str, list[tuple[str, str]]]:
    """Return the problems of readable images, each with (path, size) of the images that have it."""
    found: dict[str, list[tuple[str, str]]] = {}
    crop_size, preprocess, size_multiple = geometry.crop_size, geometry.preprocess, geometry.size_multiple
    if geometry.side_by_side:
        found[
            "are not A and B of the same size side by side: their width is odd, or not larger than their height "
            "(pad very tall pairs to square halves first; if A and B are two files, give them the same name in "
            "two folders, such as trainA and trainB)"
        ] = [
            (header.path, _format_size(header.size))
            for header in headers
            if header.size[0] % 2 == 1 or header.size[0] <= header.size[1]
        ]
    small = [header for header in headers if min(geometry.image_size(header)) < crop_size]
    if preprocess == "crop" and small:
        smallest = (crop_size * (2 if geometry.side_by_side else 1), crop_size)
        side = min(min(geometry.image_size(header)) for header in small)
        largest = side - side % size_multiple
        advice = f"--crop_size {largest}, or " if largest else ""
        found[
            f"are smaller than --crop_size {crop_size}, which needs at least {_format_size(smallest)}: use {advice}"
            f"{geometry.flags('resize_and_crop')}"
        ] = [(header.path, _format_size(header.size)) for header in small]
    if "crop" not in preprocess:
        fixed_size = geometry.flags("scale_width_and_crop" if preprocess == "scale_width" else "resize_and_crop")
        sizes = [(header.path, geometry.network_size(header)) for header in headers]
        found[
            f"give the network an input whose sides are not multiples of {size_multiple}, as this generator needs: "
            f"use {fixed_size}"
        ] = [(path, _format_size(size)) for path, size in sizes if any(side % size_multiple for side in size)]
    return found


def _read_headers(files: Sequence[str]) -> Iterator[_Header | tuple[str, str]]:
    """Yield the header of each readable file, and (path, reason) of each other one, in order."""
    one_at_a_time = Lock()  # large images would fill the memory

    def read(number: int) -> _Header | tuple[str, str]:
        path = files[number]
        # true for all files of a small folder, and for DECODED evenly spaced ones of a large folder
        decode = number * DECODED % len(files) < DECODED
        try:
            with open_image(path) as image:
                header = _Header(path, image.size, image.frames, image.file_size, decode)
                with one_at_a_time if decode or image.needs_decoding else nullcontext():
                    image.check(decode)
            return header
        except DataError as error:
            return path, str(error).removeprefix(f"{path}: ")

    return in_threads(read, range(len(files)))


def _format_size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _size_range(sizes: Collection[Size]) -> str:
    """Return the only size, or the smallest and the largest width and height."""
    if len(set(sizes)) == 1:
        return _format_size(next(iter(sizes)))
    widths, heights = zip(*sizes)
    return f"{_format_size((min(widths), min(heights)))} to {_format_size((max(widths), max(heights)))}"
