"""Folder layouts of image datasets: which folders of a data root hold the images of a phase, and how they are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from ..arguments import shorten
from .images import DataError
from .listing import Listing, has_images_outside, list_images, relative_name, relative_path

DatasetMode = Literal["unaligned", "aligned"]
ListFolder = Callable[[Path], Listing]

# phase -> the folder names that are read for it, in this order
PHASES = {"test": ("test", "val")}

# forms of the two folders of A and B, in the order in which they are tried
_TWO_FOLDERS = {
    "unaligned": (("{}A", "{}B"), ("{}_A", "{}_B"), ("{}/A", "{}/B"), ("A/{}", "B/{}")),
    "aligned": (("{}/A", "{}/B"), ("A/{}", "B/{}"), ("{}A", "{}B"), ("{}_A", "{}_B")),
}


@dataclass(frozen=True)
class FolderLayout:
    """The folders of one phase of a dataset, existing or not.

    A folder is listed when its files are first asked for, and only then: on a network drive this takes seconds. So hand
    a layout on, and do not find it again.

    Attributes:
        root: the data root.
        mode: how the images are read.
        phase: the phase that was asked for.
        found: the name that the folders have for it: "val" if these images serve as "test".
        folders: one folder, or the folders of A and B.
        list_folder: lists a folder, and returns the same list when it is called again.
    """

    root: Path
    mode: DatasetMode
    phase: str
    found: str
    folders: tuple[Path, ...]
    list_folder: ListFolder = field(default_factory=lambda: cache(list_images), repr=False, compare=False)

    @property
    def is_side_by_side(self) -> bool:
        """Whether each file holds A in its left half and B in its right half."""
        return len(self.folders) == 1

    @property
    def is_paired_by_name(self) -> bool:
        """Whether A and B of a pair are two files of equal names."""
        return self.mode == "aligned" and len(self.folders) == 2

    @property
    def names(self) -> list[str]:
        """The folders relative to the root; the name of the root for the root itself."""
        return [
            folder.resolve().name if folder == self.root else folder.relative_to(self.root).as_posix()
            for folder in self.folders
        ]

    @property
    def exists(self) -> bool:
        return all(folder.is_dir() for folder in self.folders)

    @property
    def has_images(self) -> bool:
        """Whether there is an image in every folder."""
        return all(self.list_folder(folder).images for folder in self.folders)

    def __str__(self) -> str:
        """Describe how the images are read."""
        kind = "pairs by file name" if self.is_paired_by_name else "pairs side by side, A left and B right"
        kind = kind if self.mode == "aligned" else "unpaired images"
        return f"{self.phase} images ({'' if self.found == self.phase else f'from {self.found}, '}{kind})"

    def files(self, max_dataset_size: int | None = None) -> list[list[str]]:
        """Return the files of each folder, sorted; those of the two folders of a pair are in the same order.

        Args:
            max_dataset_size: return only so many files of each folder, the first ones.

        Raises:
            DataError: files in the two folders of a paired dataset cannot be paired by name.
        """
        return [files[:max_dataset_size] for files in self._files]

    @cached_property
    def _files(self) -> list[list[str]]:
        found = [self.list_folder(folder).images for folder in self.folders]
        if self.is_paired_by_name and all(found):
            found = [list(side) for side in zip(*_pairs(self.folders, found))]
        return found


def find_layout(dataroot: str | Path, mode: DatasetMode, phase: str) -> FolderLayout:
    """Return the layout of a phase: the first known one with images in all its folders.

    If none has images, the first one whose folders exist; if there is none either, the standard one.
    """
    known = []
    for layout in known_layouts(Path(dataroot), mode, phase):
        if layout.has_images:
            return layout
        known.append(layout)
    return next((layout for layout in known if layout.exists), known[0])


def expected_folders(mode: DatasetMode, phase: str) -> str:
    """Return the usual folders of a phase, for messages: "testA and testB, or valA and valB"."""
    names = PHASES.get(phase, (phase,))
    usual = [f"{name}A and {name}B" for name in names]
    return ", or ".join(usual if mode == "unaligned" else [*names, *usual])


def known_layouts(root: Path, mode: DatasetMode, phase: str) -> Iterator[FolderLayout]:
    """Yield all layouts in which the images of a phase may be, in the order in which they are tried."""
    names, list_folder = PHASES.get(phase, (phase,)), cache(list_images)
    for name in names:
        if mode == "aligned" and not _holds_sides(root / name, list_folder):
            yield FolderLayout(root, mode, phase, name, (root / name,), list_folder)
        for form in _TWO_FOLDERS[mode]:
            folders = tuple(root / side.format(name) for side in form)
            yield FolderLayout(root, mode, phase, name, folders, list_folder)


def _holds_sides(folder: Path, list_folder: ListFolder) -> bool:
    """Return whether all images in a folder are in its sub-folders A and B, or in one of the two."""
    sides = [folder / side for side in "AB" if (folder / side).is_dir()]
    if not sides or has_images_outside(folder, ("A", "B")):
        return False
    return any(list_folder(side).images for side in sides)


def _pairs(folders: Sequence[Path], files: list[list[str]]) -> list[tuple[str, str]]:
    """Pair the files of two folders by their path inside the folder: without suffix, unless suffixes tell them apart.

    Raises:
        DataError: a file has no partner, or more than one.
    """
    exact = [{relative_path(path, folder): path for path in side} for folder, side in zip(folders, files)]
    if exact[0].keys() == exact[1].keys():
        return [(path, exact[1][name]) for name, path in exact[0].items()]
    problems = []
    stems = []
    for folder, paths in zip(folders, files):
        names = [os.path.splitext(relative_name(path, folder))[0] for path in paths]
        counts = Counter(names)
        stems.append(dict(zip(names, paths)))
        if twice := [os.path.relpath(path, folder) for name, path in zip(names, paths) if counts[name] > 1]:
            problems.append(f"{folder}: files that differ only in their suffix, {shorten(twice)}: rename or remove one")
    for folder, other, side, others in zip(folders, folders[::-1], stems, stems[::-1]):
        if alone := [os.path.relpath(path, folder) for name, path in side.items() if name not in others]:
            problems.append(
                f"{folder}: {len(alone):,} of {len(side):,} images have no image of the same name in {other}: "
                f"{shorten(alone)}"
            )
    if problems:
        raise DataError(f"The images in {' and '.join(map(str, folders))} cannot be paired by name:", problems)
    return [(path, stems[1][name]) for name, path in stems[0].items()]
