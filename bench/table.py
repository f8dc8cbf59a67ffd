"""The README's table of recorded results.

python -m bench table                        prints it
python -m bench table --readme README.md     puts it between the README's markers
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from srpkd.checkpoint import atomic_write
from srpkd.report import format_table

from . import relation, results
from .cases import Case
from .providers import PROVIDERS
from .results import Row, number

MARKERS = re.compile(r"(<!-- bench table: begin[^\n]*\n).*?(<!-- bench table: end -->)", re.DOTALL)
# what the table shows of every device, where it is recorded
SHOWN = (Case(pixels=4096), Case(pixels=4096, dtype="bfloat16"), Case(pixels=65536, channels=(64, 64)))
ON_GPU_ONLY = ("bfloat16",)  # a CPU widens it, which says nothing of a kernel
COLUMNS = [
    {"key": "case", "label": "case"},
    {"key": "provider", "label": "by"},
    {"key": "milliseconds", "label": "ms", "format": ",.2f"},
    {"key": "eager", "label": "x eager's speed", "format": ".2f"},
    {"key": "compile", "label": "x compile's speed", "format": ".2f"},
    {"key": "megabytes", "label": "peak MB", "format": ",.1f"},
    {"key": "percent", "label": "% of floor", "format": ".1f"},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=relation.RESULTS, help="%(default)s")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between this file's markers")


def run(options: argparse.Namespace) -> None:
    """Print the table, or put it into the README."""
    text = table(results.read(options.csv, relation.KEY))
    if options.readme is None:
        print(text)
        return
    readme = options.readme.read_text(encoding="utf-8")
    if block(readme) is None:
        raise ValueError(
            f"{options.readme}: expected the markers <!-- bench table: begin --> and <!-- bench table: end -->"
        )
    with atomic_write(options.readme) as file:
        file.write(MARKERS.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme).encode())


def block(readme: str) -> str | None:
    """What stands between a README's markers, None if it has none."""
    found = MARKERS.search(readme)
    return found and found[0].removeprefix(found[1]).removesuffix(found[2]).rstrip("\n")


def table(rows: Sequence[Row]) -> str:
    """The table as markdown: for every device the shown cases, a row per provider.

    Raises:
        ValueError: none of the shown cases is recorded.
    """
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        most_threads = max(own, key=lambda row: int(row["threads"]))["threads"]
        on_cpu = own[0]["device_type"] == "cpu"
        lines, measured = [], []
        for case in SHOWN:
            if on_cpu and case.dtype in ON_GPU_ONLY:
                continue
            wanted = {name: str(value) for name, value in case.columns().items()} | {"threads": most_threads}
            found = {row["provider"]: row for row in own if wanted.items() <= row.items()}
            # what cannot do this distance, or is not installed, has nothing to tell
            found = {name: row for name, row in found.items() if row["status"] != "skipped"}
            lines += [_line(case, found[name], first=name == next(iter(found))) for name in PROVIDERS if name in found]
            measured += found.values()
        if lines:
            torch_versions = ", ".join(dict.fromkeys(row["torch"] for row in measured))
            commits = ", ".join(dict.fromkeys(row["commit"] for row in measured))
            where = f"{device}, {most_threads} threads" if on_cpu else device
            parts.append(f"{where}; torch {torch_versions}; commit {commits}:")
            parts.append(format_table({"columns": COLUMNS, "rows": lines}, markdown=True))
    if not parts:
        raise ValueError("none of the table's cases is recorded: run python -m bench relation first")
    return "\n\n".join(parts)


def _line(case: Case, row: Row, first: bool) -> dict[str, object]:
    line: dict[str, object] = {
        "case": f"N = {case.pixels:,}, C = {'/'.join(map(str, case.channels))}, {case.dtype}" if first else "",
        "provider": row["provider"],
        "eager": number(row, "times_faster_than_eager"),
        "compile": number(row, "times_faster_than_compile"),
        "percent": number(row, "percent_of_floor"),
    }
    for key, column, scale in (("milliseconds", "median_s", 1e3), ("megabytes", "peak_extra_bytes", 1e-6)):
        value = number(row, column)
        line[key] = None if value is None else value * scale
    if row["status"] != "ok":
        needed = number(row, "needed_bytes")
        line["milliseconds"] = row["status"]
        line["megabytes"] = needed and f"needs {needed / 1e6:,.0f}"
    return line
