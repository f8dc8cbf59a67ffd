"""Lists of image files: in folders, by patterns, and in pairs."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .images import DataError

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2", ".j2k",
)  # fmt: skip


class Listing(NamedTuple):
    """The files in a folder and its sub-folders, without hidden ones.

    images: paths of the image files, sorted, in the same order on every system
    others: how many other files there are, as "3 other files (2 .heic, 1 .txt)"; empty if there are none
    """

    images: list[str]
    others: str


def list_images(folder: str | Path) -> Listing:
    """List a folder and its sub-folders, each once; empty if there is no such folder.

    Symbolic links are followed. Hidden files and folders, such as those that macOS writes next to images, are skipped.

    Raises:
        DataError: one of the folders cannot be listed, so that its images would be left out.
    """
    images: list[str] = []
    suffixes: Counter[str] = Counter()
    for path in _visible_files(folder):
        if _is_image(path):
            images.append(path)
        else:
            suffixes[Path(path).suffix.lower() or os.path.basename(path)] += 1
    return Listing(sorted(images, key=lambda path: path.replace(os.sep, "/")), _describe_others(suffixes))


def image_files(folder: str | Path) -> list[str]:
    """Return the images of ``list_images``."""
    return list_images(folder).images


def has_images_outside(folder: str | Path, subfolders: Collection[str]) -> bool:
    """Return whether a folder has images that are not in these sub-folders, which are not listed."""
    return any(_is_image(path) for path in _visible_files(folder, subfolders))


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _describe_others(suffixes: Counter[str]) -> str:
    if not suffixes:
        return ""
    count = suffixes.total()
    kinds = [f"{number:,} {suffix}" for suffix, number in suffixes.most_common(5)]
    kinds += ["..."] if len(suffixes) > 5 else []
    return f"{count:,} other file{'s' if count > 1 else ''} ({', '.join(kinds)})"


def relative_path(path: str, folder: str | Path) -> str:
    """Return the path relative to a folder of a file that ``list_images`` found in it."""
    inside = os.path.join(folder, "")
    # os.path.relpath takes 20 microseconds, which for many files are seconds
    return path[len(inside) :] if path.startswith(inside) else os.path.relpath(path, folder)


def relative_name(path: str, folder: str | Path) -> str:
    """Return the path of a file in a folder relative to it, with the same separators and form on every system.

    macOS may write ``é`` as two characters, and zip archives of both forms exist: both are the same name.
    """
    return unicodedata.normalize("NFC", relative_path(path, folder).replace(os.sep, "/"))


def _visible_files(folder: str | Path, left_out: Collection[str] = ()) -> Iterator[str]:
    """Yield the paths of the files in a folder and its sub-folders, without the direct sub-folders `left_out`."""
    seen = {os.path.realpath(os.path.join(folder, name)) for name in ("", *left_out)}
    for root, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise_unless_missing):
        real = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(subfolders) if name[0] != "."}
        subfolders.clear()
        for name, target in real.items():
            if target not in seen:  # links may point to parents, and to the same folder
                seen.add(target)
                subfolders.append(name)
        yield from (os.path.join(root, name) for name in names if name[0] != ".")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        reason = f"this folder cannot be listed ({error.strerror}): change its permissions, or move it to another place"
        raise DataError(f"{error.filename}: {reason}") from error


def find_images(where: str) -> Listing:
    """List the image files in a folder, or the files that match a pattern such as ``results/*_fake_B.png``.

    Raises:
        ValueError: no image was found.
        DataError: a folder cannot be listed, so that its images would be left out.
    """
    path = os.path.expanduser(where)
    if os.path.isdir(path):
        found = list_images(path)
    else:
        _check_folders_of(path)
        matches = (match for match in glob.iglob(path, recursive=True) if not os.path.isdir(match))
        found = Listing(sorted(matches), "")
    if not found.images:
        raise ValueError(f"{where}: no images found; expected a folder of images or a pattern like 'out/*_fake_B.png'")
    return found


def _check_folders_of(pattern: str) -> None:
    """Raise a DataError if a folder that a pattern names cannot be listed or reached: glob passes over such folders."""
    if os.path.basename(pattern) == "**":  # which names the files of all sub-folders
        pattern = os.path.join(pattern, "*")
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for folder in glob.glob(os.path.join(pattern, ""), recursive=True) if pattern else ["./"]:
            try:
                os.scandir(os.path.join(folder, ".")).close()  # the dot: its files must be accessible too
            except OSError as error:
                error.filename = os.path.dirname(folder)
                _raise_unless_missing(error)
    try:
        os.stat(pattern or ".")
    except PermissionError as error:
        _raise_unless_missing(error)
    except OSError:  # a name that cannot exist, such as one that is too long
        pass


def pair_by_name(generated: Sequence[str], others: Sequence[str], kind: str = "real image") -> list[tuple[str, str]]:
    """Pair generated images with real ones, or with files of another ``kind``, by file name.

    Suffixes are ignored, and so are the endings that the public CycleGAN code writes (_fake_B, _real_B, _rec_A, ...).

    Raises:
        ValueError: a generated image has no partner, or two images of one side have the same name.
    """

    def by_name(paths: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in paths:
            name = unicodedata.normalize("NFC", re.sub(r"_(fake|real|rec)(_[AB])?$", "", Path(path).stem))
            if name in found:
                raise ValueError(
                    f"{found[name]} and {path} have the same name: to pair images by name, give each a unique name"
                )
            found[name] = path
        return found

    ours, partners = by_name(generated), by_name(others)
    if unpaired := [path for name, path in ours.items() if name not in partners]:
        raise ValueError(
            f"{len(unpaired)} of {len(generated)} generated images have no {kind} of the same name, such as "
            f"{unpaired[0]}; the {kind}s are named like {others[0]}"
        )
    return [(path, partners[name]) for name, path in ours.items()]
