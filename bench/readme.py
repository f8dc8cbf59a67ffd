"""Put the table and the picture of a demo run into the README.

    python -m bench readme runs/demo [--readme README.md]

The table replaces the text between the README's markers ``<!-- demo table: begin -->`` and
``<!-- demo table: end -->``; docs/demo.png and docs/demo.json, beside the README, are the picture and the numbers.
"""

from __future__ import annotations

import argparse

from srpkd.files import expand_user, write_json
from srpkd.reporting.page import overview, read_report
from srpkd.reporting.table import format_table

from .markers import between_markers, put_between_markers

NAME = "demo table"  # in the README's markers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=expand_user, metavar="RUN", help="folder of the run, such as runs/demo")
    parser.add_argument("--readme", type=expand_user, default="README.md", metavar="FILE", help="default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Put a run's table between the README's markers, and its overview and the table's numbers into `docs/` beside it.

    Raises:
        ValueError: The README has no markers, or the run has no table yet.
    """
    run_dir, readme = options.run_dir, options.readme
    between_markers(readme, NAME)  # raises before any file is written
    report, _ = read_report(run_dir / "report.json")
    if not report.get("table"):
        raise ValueError(f"{run_dir}: report.json has no table, expected a run that has evaluated a network")
    overview(run_dir, readme.parent / "docs" / "demo.png")
    numbers = {key: report.get(key) for key in ("command", "environment", "elapsed_seconds", "table")}
    write_json(readme.parent / "docs" / "demo.json", numbers)
    put_between_markers(readme, NAME, format_table(report["table"], markdown=True))
