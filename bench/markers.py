"""Texts between the markers ``<!-- NAME: begin ... -->`` and ``<!-- NAME: end -->`` of the README and the docs."""

from __future__ import annotations

import re
from pathlib import Path

from srpkd.files import write_file


def between_markers(file: Path, name: str) -> str:
    """Return the text between a file's markers, without the last line break.

    Raises:
        ValueError: The file has no such markers.
    """
    return _split(file, name)[1].removesuffix("\n")


def put_between_markers(file: Path, name: str, text: str) -> None:
    """Replace the text between a file's markers; raises as ``between_markers``."""
    before, _, after = _split(file, name)
    write_file(file, f"{before}{text}\n{after}".encode())


def _split(file: Path, name: str) -> tuple[str, str, str]:
    """Return the parts of a file: to the line of the first marker, between the markers, and from the second on."""
    found = re.fullmatch(
        rf"(.*?<!-- {name}: begin[^\n]*\n)(.*?)(<!-- {name}: end -->.*)", file.read_text(encoding="utf-8"), re.DOTALL
    )
    if found is None:
        raise ValueError(f"{file}: expected the markers <!-- {name}: begin --> and <!-- {name}: end -->")
    return found[1], found[2], found[3]
