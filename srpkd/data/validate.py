"""Validation of an image dataset before training: all its problems in one error."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..arguments import check_whole
from ..kernels.dispatch import check_choice
from . import Direction
from .folders import CHOICES, DatasetMode, Preprocess, effective_load_size, scaled_size, source_folders
from .images import EXTENSIONS, DataError, count_other_files, describe_further_frames, image_files, open_image

Size = tuple[int, int]  # (width, height)

# Number of files per folder that are decoded completely, at most: only this finds every kind of damage, and it takes
# about a second for small photos. In a larger folder these files are evenly spaced; of the others only the header is
# read (and the checksums of PNG).
DECODED = 500

_FOLDER_NAMES = {phase + side for phase in ("train", "test", "val") for side in ("", "a", "b")}


@dataclass(frozen=True)
class DatasetReport:
    """Statistics of a valid dataset; `str()` gives one line.

    counts: images per folder, as {"trainA": 1067, "trainB": 1334}
    sizes: (width, height) of the files -> how many have it
    network_sizes: the different (width, height) of the network's inputs
    decoded: how many files were decoded completely
    others: for each folder with files that are no images, how many, in words
    further_frames: how many images have more than one page or frame, in words
    """

    counts: dict[str, int]
    sizes: dict[Size, int]
    network_sizes: list[Size]
    decoded: int
    others: dict[str, str] = field(default_factory=dict)
    further_frames: str = ""

    def __str__(self) -> str:
        counts = " and ".join(f"{count:,} images in {name}" for name, count in self.counts.items())
        total = sum(self.counts.values())
        decoded = "all" if self.decoded == total else f"{self.decoded:,}"
        return (
            f"{counts}, {_size_range(self.sizes)} pixels, {decoded} decoded without error; "
            f"the network gets {_size_range(self.network_sizes)}"
            + "".join(f"; {others} in {name} left out" for name, others in self.others.items())
            + (f"; {self.further_frames}" if self.further_frames else "")
        )


class _Header(NamedTuple):
    """What is known of a readable image file."""

    path: str
    size: Size  # upright
    frames: int


class _Check(NamedTuple):
    """A property of an image that makes it unusable."""

    problem: str
    fails: Callable[[_Header], bool]
    detail: Callable[[_Header], str]  # shown in brackets after the file's name


@dataclass(frozen=True)
class _Geometry:
    """Sizes of an image on its way from the file to the network."""

    aligned: bool
    preprocess: Preprocess
    load_size: int
    crop_size: int

    def image_size(self, header: _Header) -> Size:
        """Size of one image: for an aligned pair, of its half."""
        width, height = header.size
        return (width // 2 if self.aligned else width), height

    def network_size(self, header: _Header) -> Size:
        if "crop" in self.preprocess:
            return self.crop_size, self.crop_size
        return scaled_size(self.image_size(header), self.preprocess, self.load_size, self.crop_size)


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
    max_report: int = 10,
) -> DatasetReport:
    """Check all images that `open_dataset` would read with the same arguments.

    Writes nothing and draws no random numbers.

    Args:
        size_multiple: both sides of the network's input must be multiples of it: 4 for a ResNet, 2 ** downs for a
            U-Net.
        batch_size: images per batch; more than one must have the same size.
        max_report: number of files to name for each kind of problem, at most.

    Raises:
        DataError: lists *all* problems: options that contradict each other; a dataroot or folder that does not exist,
            with what exists instead; folders without images; files that cannot be decoded (see `DECODED`) or have an
            unsupported depth; aligned images that are not two halves; images smaller than the crop; sizes that are not
            a multiple of `size_multiple`; sizes that differ within a batch.
    """
    root = Path(dataroot)
    heading = f"The dataset {root} ({dataset_mode}, {phase}) cannot be used:"
    choices = {"dataset_mode": dataset_mode, "direction": direction, "preprocess": preprocess}
    sizes = {"load_size": load_size, "crop_size": crop_size, "size_multiple": size_multiple}
    if problems := _invalid_arguments(choices, sizes):
        raise DataError(heading, problems)  # the other checks need valid arguments

    load_size = effective_load_size(preprocess, load_size, crop_size, phase == "train")
    missing = _missing_folders(root, dataset_mode, phase)
    problems = _size_problems(preprocess, load_size, crop_size, size_multiple) + missing
    geometry = _Geometry(dataset_mode == "aligned", preprocess, load_size, crop_size)
    checks = _image_checks(geometry, size_multiple)

    counts: dict[str, int] = {}
    file_sizes: Counter[Size] = Counter()
    network_sizes: set[Size] = set()
    others: dict[str, str] = {}
    several: list[str] = []
    decoded = 0
    for folder in [] if missing else source_folders(root, dataset_mode, phase):
        files = image_files(folder)[:max_dataset_size]
        headers, unreadable, complete = _read_headers(files)
        if not files:
            problems.append(_no_images(folder))
        failures = {"cannot be read": unreadable}
        for check in checks:
            failures[check.problem] = [(h.path, check.detail(h)) for h in headers if check.fails(h)]
        for problem, failed in failures.items():
            if failed:
                names = _join([f"{os.path.relpath(path, folder)} ({detail})" for path, detail in failed], max_report)
                problems.append(f"{folder}: {len(failed):,} of {len(files):,} images {problem}: {names}")
        folder_sizes = {geometry.network_size(header) for header in headers}
        if batch_size > 1 and len(folder_sizes) > 1:
            problems.append(
                f"{folder}: a batch of {batch_size} needs images of one size; --preprocess {preprocess} gives "
                f"{_size_range(folder_sizes)}: use --preprocess resize_and_crop or --batch_size 1"
            )
        counts[folder.resolve().name] = len(files)
        if left_out := count_other_files(folder):
            others[folder.resolve().name] = left_out
        several += [header.path for header in headers if header.frames > 1]
        file_sizes.update(header.size for header in headers)
        network_sizes |= folder_sizes
        decoded += complete
    if problems:
        raise DataError(heading, problems)
    return DatasetReport(
        counts, dict(file_sizes), sorted(network_sizes), decoded, others, describe_further_frames(several)
    )


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


def _size_problems(preprocess: Preprocess, load_size: int, crop_size: int, size_multiple: int) -> list[str]:
    """Return the problems of the sizes that do not depend on the images."""
    problems: list[str] = []
    if "crop" not in preprocess:
        return problems
    if preprocess != "crop" and load_size < crop_size:
        problems.append(
            f"--crop_size {crop_size} is larger than --load_size {load_size}, the size that images are scaled to "
            "before the crop: use a smaller --crop_size or a larger --load_size"
        )
    if rest := crop_size % size_multiple:
        nearest = [size for size in (crop_size - rest, crop_size - rest + size_multiple) if size]
        problems.append(
            f"--crop_size {crop_size} is not a multiple of {size_multiple}, as this generator needs: "
            f"use {' or '.join(map(str, nearest))}"
        )
    return problems


def _image_checks(geometry: _Geometry, size_multiple: int) -> list[_Check]:
    """Return the checks of a readable image."""

    def file_size(header: _Header) -> str:
        return _format_size(header.size)

    crop_size, preprocess = geometry.crop_size, geometry.preprocess
    smallest = (crop_size * (2 if geometry.aligned else 1), crop_size)
    fixed_size = "scale_width_and_crop" if preprocess == "scale_width" else "resize_and_crop"
    return [
        _Check(
            "are not A and B of the same size side by side: their width is odd, or not larger than their height "
            "(pad very tall pairs to square halves first; for images that are not pairs, use another --dataset_mode)",
            lambda header: geometry.aligned and (header.size[0] % 2 == 1 or header.size[0] <= header.size[1]),
            file_size,
        ),
        _Check(
            f"are smaller than --crop_size {crop_size}, which needs at least {_format_size(smallest)}: use a smaller "
            "--crop_size, or --preprocess resize_and_crop",
            lambda header: preprocess == "crop" and min(geometry.image_size(header)) < crop_size,
            file_size,
        ),
        _Check(
            f"give the network an input whose sides are not multiples of {size_multiple}, as this generator needs: "
            f"use --preprocess {fixed_size}",
            lambda header: (
                "crop" not in preprocess and any(side % size_multiple for side in geometry.network_size(header))
            ),
            lambda header: _format_size(geometry.network_size(header)),
        ),
    ]


def _read_headers(files: list[str]) -> tuple[list[_Header], list[tuple[str, str]], int]:
    """Return the headers of the readable files, (path, reason) of the others, and how many were decoded completely."""
    headers, unreadable, decoded = [], [], 0
    for i, path in enumerate(files):
        # true for all files of a small folder, and for DECODED evenly spaced ones of a large folder
        decode = i * DECODED % len(files) < DECODED
        decoded += decode
        try:
            with open_image(path) as image:
                header = _Header(path, image.size, image.frames)
                image.check(decode)
            headers.append(header)
        except DataError as error:
            unreadable.append((path, str(error).removeprefix(f"{path}: ")))
    return headers, unreadable, decoded


def _missing_folders(root: Path, dataset_mode: DatasetMode, phase: str) -> list[str]:
    """Return one problem if folders do not exist, with what exists instead and a suggestion; else none."""
    if root.is_file():
        return [f"dataroot {root} is a file, expected a folder: if it is an archive, unpack it"]
    if not root.is_dir():
        first = next(p for p in (root, *root.parents) if p.parent.is_dir())  # the topmost missing part of the path
        siblings = _subfolders(first.parent)
        return [
            f"dataroot {root} does not exist{_did_you_mean(first, siblings)}; "
            f"{first.parent.absolute()} has {_join(siblings) or 'no folders'}"
        ]
    wanted = [folder.name for folder in source_folders(root, dataset_mode, phase)]
    if dataset_mode == "single" or not (missing := [name for name in wanted if not (root / name).is_dir()]):
        return []

    existing = _subfolders(root)
    nested = [f"{outer}/{inner}" for outer in existing for inner in _subfolders(root / outer)]
    problem = f"dataroot {root} has no {' and no '.join(missing)}; "
    problem += f"it has {_join(existing)}" if existing else "it has no folders"
    hints = []
    for name in missing:
        # train_A, Train-A, train/A and A can stand for trainA
        equivalent = {_letters(name), _letters(name[len(phase) :])} - {""}
        same = [other for other in existing + nested if _letters(other) in equivalent]
        # but testA is not a misspelt trainA, nor is trainB
        typos = [other for other in existing if _letters(other) not in _FOLDER_NAMES]
        if found := same or difflib.get_close_matches(name, typos, 1, 0.7):
            hints.append(f"rename {found[0]} to {name}")
    if dataset_mode == "unaligned" and image_files(root / phase) and len(hints) < len(missing):
        hints.append(f"{phase} has images, which looks like an aligned dataset: use --dataset_mode aligned")
    if dataset_mode == "aligned" and all((root / f"{phase}{side}").is_dir() for side in "AB"):
        hints.append("this looks like an unaligned dataset: use --dataset_mode unaligned")
    hints += [
        f"use --dataroot {root / name}"
        for name in existing
        if all(folder.is_dir() for folder in source_folders(root / name, dataset_mode, phase))
    ]
    if not existing and image_files(root):
        hints.append("its images are in no sub-folder: sort them into these folders, or use --dataset_mode single")
    return ["; ".join([problem, *hints])]


def _no_images(folder: Path) -> str:
    others = Counter(path.suffix.lower() or path.name for path in folder.rglob("*") if path.is_file())
    instead = _join([f"{count:,} {suffix}" for suffix, count in others.most_common()], 3)
    return f"{folder}: no images ({' '.join(EXTENSIONS)}); " + (f"it has {instead}" if others else "it is empty")


def _did_you_mean(path: Path, names: list[str]) -> str:
    """Return the sibling whose name is closest to the path's, as a question in brackets, or ''."""
    by_letters = {_letters(name): name for name in names}
    nearest = difflib.get_close_matches(_letters(path.name), by_letters, 1)
    return f" (did you mean {path.parent / by_letters[nearest[0]]}?)" if nearest else ""


def _letters(name: str) -> str:
    """Return a name in lower case without hyphens, underscores and dots."""
    return "".join(filter(str.isalnum, name.lower()))


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _join(names: list[str], limit: int = 10) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def _format_size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _size_range(sizes: Collection[Size]) -> str:
    """Return the only size, or the smallest and the largest width and height."""
    if len(set(sizes)) == 1:
        return _format_size(next(iter(sizes)))
    widths, heights = zip(*sizes)
    return f"{_format_size((min(widths), min(heights)))} to {_format_size((max(widths), max(heights)))}"
