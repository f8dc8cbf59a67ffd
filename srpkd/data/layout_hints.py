"""Messages about missing folders of a dataset: what exists instead, and what makes the dataset usable.

Every suggestion has been tried: `check` returns the problems of the folders that it leads to.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from ..arguments import shorten
from .layouts import DatasetMode, FolderLayout, expected_folders, find_layout
from .listing import image_files

Check = Callable[[FolderLayout], list[str]]

_MAX_TRIED = 3  # sub-folders of the data root that are validated as data roots
_FOLDER_NAMES = {phase + side for phase in ("train", "test", "val") for side in ("", "a", "b")}


def missing_folders(root: Path, mode: DatasetMode, phase: str, check: Check) -> str:
    """Return what is missing, what exists instead, and suggestions.

    Args:
        root, mode, phase: a dataset without the folders of any known layout.
        check: returns the problems of the images of a layout, [] if it can be used.
    """
    if root.is_file():
        return f"dataroot {root} is a file, expected a folder: if it is an archive, unpack it"
    if not root.is_dir():
        return _missing_root(root, mode, phase, check)
    existing = subfolders(root)
    problem = f"dataroot {root} has no {_missing(root, mode, phase)}; "
    problem += f"it has {shorten(existing)}" if existing else "it has no folders"
    hints = _renames(root, mode, phase, check)
    if mode == "unaligned":
        hints = hints or _as_pairs(root, phase, check)
    hints = hints or _inside(root, mode, phase, check)
    if not existing and not hints and (files := image_files(root)):
        sides = f"those of A into {root / f'{phase}A'} and those of B into {root / f'{phase}B'}"
        loose = FolderLayout(root, mode, phase, phase, (root,))
        fits = mode == "aligned" and not check(loose)
        hints = [
            f"its {len(files):,} images are in no sub-folder: move "
            + (f"those for training into {root / phase}" if fits else sides)
        ]
    return "; ".join([problem, *hints])


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, without hidden ones and those that cannot be listed."""
    paths = (path for path in folder.iterdir() if path.name[0] != "." and path.is_dir())
    return sorted(path.name for path in paths if os.access(path, os.R_OK | os.X_OK))  # not lost+found


def _missing(root: Path, mode: DatasetMode, phase: str) -> str:
    """Return the folders that the root does not have: one side of a known layout, or all usual ones."""
    for side, other in ("AB", "BA"):
        for form in ("{}{}", "{}_{}", "{}/{}", "{1}/{0}"):
            if (root / form.format(phase, other)).is_dir():
                return form.format(phase, side)
    return expected_folders(mode, phase).replace(" and ", " and no ").replace(", or ", ", and no ")


def _missing_root(root: Path, mode: DatasetMode, phase: str, check: Check) -> str:
    first = next(path for path in (root, *root.parents) if path.parent.is_dir())  # the topmost missing part
    siblings = subfolders(first.parent)
    by_letters = {_letters(name): name for name in siblings}
    hint = ""
    if nearest := difflib.get_close_matches(_letters(first.name), by_letters, 1):
        meant = first.parent / by_letters[nearest[0]] / root.relative_to(first)
        layout = find_layout(meant, mode, phase)
        hint = f" (did you mean {meant}?)" if layout.has_images and not check(layout) else ""
    return f"dataroot {root} does not exist{hint}; {first.parent.absolute()} has {shorten(siblings) or 'no folders'}"


def _renames(root: Path, mode: DatasetMode, phase: str, check: Check) -> list[str]:
    """Suggest names for folders that stand for the missing ones, if they make the dataset usable."""
    existing = subfolders(root)
    nested = [f"{outer}/{inner}" for outer in existing for inner in subfolders(root / outer)]
    one, two = (phase,), (f"{phase}A", f"{phase}B")
    for names in [two] if mode == "unaligned" else [one, two]:
        found = [name if (root / name).is_dir() else _stands_for(root, name, phase, existing, nested) for name in names]
        renamed = [f"rename {old} to {new}" for old, new in zip(found, names) if old != new]
        if None in found or len(set(found)) < len(found) or not renamed:
            continue
        folders = tuple(root / str(name) for name in found)
        if hints := _tried(FolderLayout(root, mode, phase, phase, folders), check, " and ".join(renamed)):
            return hints
    return []


def _stands_for(root: Path, name: str, phase: str, existing: list[str], nested: list[str]) -> str | None:
    """Return the folder that a missing one may be: Train-A, Train/A or A for trainA, or a misspelt name."""
    equivalent = {_letters(name), _letters(name[len(phase) :])} - {""}
    equivalent |= {_letters(name[len(phase) :] + phase)} - {_letters(phase)}
    for other in existing + nested:
        if _letters(other) in equivalent and not any(
            inner.lower() in _FOLDER_NAMES for inner in subfolders(root / other)
        ):
            return other  # A with sub-folders train and test is no folder of training images
    # but testA is not a misspelt trainA, nor is trainB
    typos = [other for other in existing if _letters(other) not in _FOLDER_NAMES]
    return next(iter(difflib.get_close_matches(name, typos, 1, 0.7)), None)


def _as_pairs(root: Path, phase: str, check: Check) -> list[str]:
    layout = find_layout(root, "aligned", phase)
    hint = f"{' and '.join(layout.names)} looks like an aligned dataset: use --dataset_mode aligned"
    return [hint] if layout.has_images and not check(layout) else []


def _inside(root: Path, mode: DatasetMode, phase: str, check: Check) -> list[str]:
    """Suggest a folder above or sub-folders as the data root."""
    for folder in root.parents[:2]:
        above = find_layout(folder, mode, phase)
        if root in above.folders and above.has_images and not check(above):
            return [f"use --dataroot {folder}"]
    layouts = [find_layout(root / name, mode, phase) for name in subfolders(root)]
    layouts = [layout for layout in layouts if layout.has_images and not _is_side(layout)][:_MAX_TRIED]
    usable = [layout for layout in layouts if not check(layout)]
    if usable:
        return [f"use --dataroot {' or --dataroot '.join(str(layout.root) for layout in usable)}"]
    return [hint for layout in layouts[:1] for hint in _tried(layout, check, f"use --dataroot {layout.root}")]


def _is_side(layout: FolderLayout) -> bool:
    """Return whether the root of a layout is the folder A or B of A/train and B/train."""
    return layout.root.name in ("A", "B") and layout.is_side_by_side


def _tried(layout: FolderLayout, check: Check, hint: str) -> list[str]:
    """Return the hint, or why following it is not enough; [] if there are no images at all."""
    if not layout.has_images:
        return []
    problems = check(layout)
    return [f"{hint}, after fixing this: {problems[0]}" if problems else hint]


def _letters(name: str) -> str:
    """Return a name in lower case without hyphens, underscores and dots."""
    return "".join(filter(str.isalnum, name.lower()))
