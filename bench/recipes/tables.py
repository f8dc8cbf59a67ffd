"""The tables of the recipes' pages, from recorded results."""

from __future__ import annotations

from collections.abc import Sequence

from bench import results
from bench.results import Row, number
from srpkd.reporting.table import format_table

from .catalogue import CASES, RecipeCase

NAME = "recipe table"  # in the markers of the pages
INDEX = "index"  # the page with all tables in one
COLUMNS = [
    {"key": "case", "label": "features"},
    {"key": "shapes", "label": "student / teacher"},
    {"key": "usual_ms", "label": "usual code, ms", "format": ",.1f"},
    {"key": "srpkd_ms", "label": "srpkd, ms", "format": ",.1f"},
    {"key": "speed", "label": "times as fast", "format": ".2f"},
    {"key": "usual_mb", "label": "usual code, peak MB", "format": ",.1f"},
    {"key": "srpkd_mb", "label": "srpkd, peak MB", "format": ",.1f"},
]


def texts(rows: Sequence[Row]) -> dict[str, str]:
    """Return the text between the markers of each page that has results; ``INDEX`` has all of them."""
    names = dict.fromkeys(case.recipe for case in CASES)
    found = {name: text for name in names if (text := table(rows, [case for case in CASES if case.recipe == name]))}
    return found | {INDEX: table(rows, CASES, with_pages=True)} if found else {}


def table(rows: Sequence[Row], shown: Sequence[RecipeCase], with_pages: bool = False) -> str:
    """Return the tables of some cases as Markdown, one per device; "" if none of them is recorded."""
    parts = []
    for device, own in results.group_by(rows, ["device", "threads"]).items():
        recorded = {(row["recipe"], row["shapes"], row["provider"]): row for row in own}
        lines, used = [], []
        for case in shown:
            usual, ours = (recorded.get((case.recipe, case.key, name)) for name in ("usual", "srpkd"))
            if usual and ours:
                lines.append(_line(case, usual, ours))
                used += [usual, ours]
        if lines:
            versions, commits = (results.distinct(used, name) for name in ("torch", "commit"))
            threads = f", {device[1]} threads" if own[0]["device_type"] == "cpu" else ""
            parts.append(f"{device[0]}{threads}; float32; torch {versions}; commit {commits}:")
            columns = [{"key": "recipe"}, COLUMNS[0], *COLUMNS[2:]] if with_pages else COLUMNS  # too wide with shapes
            parts.append(format_table({"columns": columns, "rows": lines}, markdown=True))
    return "\n\n".join(parts)


def _line(case: RecipeCase, usual: Row, ours: Row) -> dict[str, object]:
    line: dict[str, object] = {
        "recipe": f"[{case.recipe}]({case.recipe}.md)",
        "case": case.words,
        "shapes": case.key,
        "speed": number(ours, "times_faster_than_usual"),
    }
    for name, row in (("usual", usual), ("srpkd", ours)):
        seconds, peak, needed = (number(row, column) for column in ("median_s", "peak_extra_bytes", "needed_bytes"))
        line[f"{name}_ms"] = row["status"] if seconds is None else 1e3 * seconds
        line[f"{name}_mb"] = f"needs {needed / 1e6:,.0f}" if peak is None and needed else peak and peak / 1e6
    return line
