"""Put the table and the picture of a demo run into the README.

    python -m bench readme runs/demo [--readme README.md]

The table replaces the text between the README's markers ``<!-- demo table: begin -->`` and
``<!-- demo table: end -->``; docs/demo.png and docs/demo.json, beside the README, are the picture and the numbers.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

from srpkd.files import write_file
from srpkd.reporting.page import overview, read_report
from srpkd.reporting.table import format_table

NAME = "demo table"  # in the README's markers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench readme``."""
    parser.add_argument("run_dir", type=Path, help="folder of the run, such as runs/demo")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Update the README, docs/demo.png and docs/demo.json."""
    update_readme(arguments.run_dir, arguments.readme)


class Marked(NamedTuple):
    """The parts of a text file around the markers ``<!-- NAME: begin ... -->`` and ``<!-- NAME: end -->``."""

    before: str  # ends with the line of the opening marker
    content: str
    after: str  # starts with the closing marker


def between_markers(file: Path, name: str) -> str:
    """Return the text between a file's markers.

    Raises:
        ValueError: The file has no such markers.
    """
    return _split(file, name).content


def put_between_markers(file: Path, name: str, text: str) -> None:
    """Replace the text between a file's markers; raises as ``between_markers``."""
    parts = _split(file, name)
    write_file(file, f"{parts.before}{text}\n{parts.after}".encode())


def _split(file: Path, name: str) -> Marked:
    text = file.read_text(encoding="utf-8")
    found = re.fullmatch(rf"(.*?<!-- {name}: begin[^\n]*\n)(.*?)(<!-- {name}: end -->.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{file}: expected the markers <!-- {name}: begin --> and <!-- {name}: end -->")
    return Marked(*found.groups())


def update_readme(run_dir: str | Path, readme: str | Path) -> None:
    """Put a run's table between the README's markers, and its overview and the table's numbers into `docs/` beside it.

    Raises:
        ValueError: The README has no markers, or the run has no table yet.
    """
    run_dir, readme = Path(run_dir), Path(readme)
    between_markers(readme, NAME)  # raises before any file is written
    report, _ = read_report(run_dir / "report.json")
    if not report.get("table"):
        raise ValueError(f"{run_dir}: report.json has no table, expected a run that has evaluated a network")
    overview(run_dir, readme.parent / "docs" / "demo.png")
    numbers = {key: report.get(key) for key in ("command", "environment", "elapsed_seconds", "table")}
    write_file(readme.parent / "docs" / "demo.json", json.dumps(numbers, indent=1).encode())
    put_between_markers(readme, NAME, format_table(report["table"], markdown=True))
