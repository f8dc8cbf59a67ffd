"""Looks at a data set before step 0, and says in plain words all that is wrong with it, at once."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .folders import (
    CHOICES,
    EXTENSIONS,
    DataError,
    describe,
    did_you_mean,
    effective_load_size,
    image_files,
    open_image,
    plain,
    scaled_size,
    source_folders,
)

Size = tuple[int, int]  # (width, height)

# So many files of a folder are decoded to the last byte, which alone finds every damage, in about a second for
# small photos. Of a larger folder they are evenly spread, and the other files have only their header read
# (and, in PNG, their checksums).
DECODED = 500

_PROPER = {phase + side for phase in ("train", "test", "val") for side in ("", "a", "b")}


@dataclass(frozen=True)
class DatasetReport:
    """A sound data set in numbers; `str()` gives one line.

    counts: images per folder, as {"trainA": 1067, "trainB": 1334}
    sizes: the (width, height) of the files, and how many there are of each
    network_sizes: the (width, height) of what the network will be given
    decoded: how many of the files were decoded, not only opened
    """

    counts: dict[str, int]
    sizes: dict[Size, int]
    network_sizes: list[Size]
    decoded: int

    def __str__(self) -> str:
        counts = " and ".join(f"{count:,} images in {name}" for name, count in self.counts.items())
        total = sum(self.counts.values())
        decoded = "all" if self.decoded == total else f"{self.decoded:,}"
        return (
            f"{counts}, {_span(self.sizes)} pixels, {decoded} decoded without error; "
            f"the network gets {_span(self.network_sizes)}"
        )


def validate_dataset(
    dataroot: str | Path,
    dataset_mode: str,
    phase: str = "train",
    *,
    direction: str = "AtoB",
    preprocess: str = "resize_and_crop",
    load_size: int = 286,
    crop_size: int = 256,
    max_dataset_size: int | None = None,
    size_multiple: int = 1,
    batch_size: int = 1,
    max_report: int = 10,
) -> DatasetReport:
    """Checks what `open_dataset` with the same arguments will read. Writes nothing, draws no random number.

    `size_multiple` is what the sides of the generator's input must be multiples of: 4 for a ResNet,
    2 ** downs for a U-Net. For each kind of problem at most `max_report` files are named.

    Raises DataError (a ValueError) with *all* that is wrong: options that cannot be, a missing dataroot or
    folder and what is there instead, folders without images, files that cannot be decoded (`DECODED` says how
    far this looks) or have more than 8 bits per channel, aligned images that are not two halves, images smaller
    than the crop, sizes that are no multiple of `size_multiple`, sizes that differ within a batch.
    """
    root = Path(dataroot)
    problems = [
        f"--{name} is one of {', '.join(CHOICES[name])}; received {value!r}{did_you_mean(str(value), CHOICES[name])}"
        for name, value in (("dataset_mode", dataset_mode), ("direction", direction), ("preprocess", preprocess))
        if value not in CHOICES[name]
    ]
    problems += [
        f"--{name} must be a whole number of at least 1; received {value!r}"
        for name, value in (("load_size", load_size), ("crop_size", crop_size), ("size_multiple", size_multiple))
        if not isinstance(value, int) or value < 1
    ]
    heading = f"The data set {root} ({dataset_mode}, {phase}) cannot be used:"
    if problems:
        raise DataError(heading, problems)  # without these nothing else can be judged

    cropped = "crop" in preprocess
    load_size = effective_load_size(preprocess, load_size, crop_size, phase == "train")
    problems += _bad_options(preprocess, load_size, crop_size, size_multiple)
    problems += (missing := _missing(root, dataset_mode, phase))

    def image(look: _Look) -> Size:  # of which the network sees a view
        width, height = look.size
        return (width // 2 if dataset_mode == "aligned" else width, height)

    def view(look: _Look) -> Size:
        return (crop_size, crop_size) if cropped else scaled_size(image(look), preprocess, load_size, crop_size)

    def as_stored(look: _Look) -> str:
        return _by(look.size)

    # what can be wrong with a file that can be read, when it is, and what to show of it
    ailments = [
        (
            "have more than 8 bits per channel, which would be cut off: convert them to 8",
            lambda look: look.mode[0] in "IF",
            lambda look: look.mode,
        ),
        (
            "are not A and B of one size side by side: their width is odd, or no more than their height (make very "
            "tall pairs square halves first; if these are single images, use another --dataset_mode)",
            lambda look: dataset_mode == "aligned" and (look.size[0] % 2 or look.size[0] <= look.size[1]),
            as_stored,
        ),
        (
            f"are smaller than --crop_size {crop_size}, which needs "
            f"{_by((crop_size * (2 if dataset_mode == 'aligned' else 1), crop_size))} at least: "
            "make it smaller or use --preprocess resize_and_crop",
            lambda look: preprocess == "crop" and min(image(look)) < crop_size,
            as_stored,
        ),
        (
            f"reach the network with sides that are no multiple of {size_multiple}, as this generator needs: "
            f"use --preprocess {'scale_width_and_crop' if preprocess == 'scale_width' else 'resize_and_crop'}",
            lambda look: not cropped and any(side % size_multiple for side in view(look)),
            lambda look: _by(view(look)),
        ),
    ]

    counts, sizes, network_sizes, decoded = {}, Counter(), set(), 0
    for folder in [] if missing else source_folders(root, dataset_mode, phase):
        files = image_files(folder)[:max_dataset_size]
        looks, broken, whole = _look_at(files)
        if not files:
            problems.append(_empty(folder))
        found = [("cannot be read", broken)]
        for ailment, has_it, shown in ailments:
            found.append((ailment, [(look.path, shown(look)) for look in looks if has_it(look)]))
        for ailment, ill in found:
            if ill:
                names = _listed([f"{os.path.relpath(path, folder)} ({why})" for path, why in ill], max_report)
                problems.append(f"{folder}: {len(ill):,} of {len(files):,} images {ailment}: {names}")
        views = {view(look) for look in looks}
        if batch_size > 1 and len(views) > 1:
            problems.append(
                f"{folder}: a batch of {batch_size} cannot hold images of {_span(views)}, as --preprocess "
                f"{preprocess} makes them: use --preprocess resize_and_crop or --batch_size 1"
            )
        counts[folder.resolve().name] = len(files)
        sizes.update(look.size for look in looks)
        network_sizes |= views
        decoded += whole
    if problems:
        raise DataError(heading, problems)
    return DatasetReport(counts, dict(sizes), sorted(network_sizes), decoded)


class _Look(NamedTuple):
    path: str
    size: Size
    mode: str  # Pillow's


def _look_at(files: list[str]) -> tuple[list[_Look], list[tuple[str, str]], int]:
    """(what could be read, what could not and why, how many were decoded)."""
    looks, broken, decoded = [], [], 0
    for i, path in enumerate(files):
        # true of all files of a small folder, and of DECODED evenly spread ones of a large one
        whole = i * DECODED % len(files) < DECODED
        decoded += whole
        try:
            with open_image(path) as image:
                look = _Look(path, image.size, image.mode)
                # a JPEG is decoded at an eighth of its size: that reads every byte, and is faster
                image.draft("RGB", (1, 1))
                image.load() if whole else image.verify()
            looks.append(look)
        except DataError as error:
            broken.append((path, describe(error.__cause__)))
    return looks, broken, decoded


def _bad_options(preprocess: str, load_size: int, crop_size: int, size_multiple: int) -> list[str]:
    """What is wrong with the sizes, whatever the images are."""
    problems = []
    if "crop" not in preprocess:
        return problems
    if preprocess != "crop" and load_size < crop_size:
        problems.append(
            f"--crop_size {crop_size} is larger than --load_size {load_size}, to which the images are scaled before: "
            "make the crop smaller or load_size larger"
        )
    if rest := crop_size % size_multiple:
        near = [size for size in (crop_size - rest, crop_size - rest + size_multiple) if size]
        problems.append(
            f"--crop_size {crop_size} is no multiple of {size_multiple}, as this generator needs: "
            f"use {' or '.join(map(str, near))}"
        )
    return problems


def _missing(root: Path, dataset_mode: str, phase: str) -> list[str]:
    """Which folders do not exist, what there is instead, and what may have been meant."""
    if root.is_file():
        return [f"dataroot {root} is a file, not a folder: if it is an archive, unpack it"]
    if not root.is_dir():
        first = next(p for p in (root, *root.parents) if p.parent.is_dir())  # the first part that is not there
        beside = _folders_in(first.parent)
        return [
            f"dataroot {root} does not exist{did_you_mean(first.name, beside, first.parent)}; "
            f"{first.parent.absolute()} has {_listed(beside) or 'no folders'}"
        ]
    wanted = [folder.name for folder in source_folders(root, dataset_mode, phase)]
    if dataset_mode == "single" or not (gone := [name for name in wanted if not (root / name).is_dir()]):
        return []

    there = _folders_in(root)
    deeper = [f"{outer}/{inner}" for outer in there for inner in _folders_in(root / outer)]
    problem = f"dataroot {root} has no {' and no '.join(gone)}; "
    problem += f"it has {_listed(there)}" if there else "it has no folders"
    hints = []
    for name in gone:
        # train_A, Train-A or train/A are as good as trainA; a bare A too
        good = {plain(name), plain(name[len(phase) :])} - {""}
        same = [other for other in there + deeper if plain(other) in good]
        # but testA is not a misspelt trainA, nor is trainB
        typos = [other for other in there if plain(other) not in _PROPER]
        if found := same or difflib.get_close_matches(name, typos, 1, 0.7):
            hints.append(f"rename {found[0]} to {name}")
    if dataset_mode == "unaligned" and image_files(root / phase) and len(hints) < len(gone):
        hints.append(f"{phase} has images, which looks like an aligned data set: use --dataset_mode aligned")
    if dataset_mode == "aligned" and all((root / f"{phase}{side}").is_dir() for side in "AB"):
        hints.append("this looks like an unaligned data set: use --dataset_mode unaligned")
    hints += [
        f"use --dataroot {root / name}"
        for name in there
        if all(folder.is_dir() for folder in source_folders(root / name, dataset_mode, phase))
    ]
    if not there and image_files(root):
        hints.append("its images lie in no folder: sort them into these, or use --dataset_mode single")
    return ["; ".join([problem, *hints])]


def _empty(folder: Path) -> str:
    others = Counter(path.suffix.lower() or path.name for path in folder.rglob("*") if path.is_file())
    instead = _listed([f"{count:,} {suffix}" for suffix, count in others.most_common()], 3)
    return f"{folder}: no images ({' '.join(EXTENSIONS)}); " + (f"it has {instead}" if others else "it is empty")


def _folders_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _listed(names: list[str], most: int = 10) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _span(sizes: Collection[Size]) -> str:
    """One size, or the smallest and the largest of each side."""
    if len(set(sizes)) == 1:
        return _by(next(iter(sizes)))
    widths, heights = zip(*sizes)
    return f"{_by((min(widths), min(heights)))} to {_by((max(widths), max(heights)))}"
