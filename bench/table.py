"""Tables of recorded results: the relation loss alone, and training steps.

python -m bench table                        print the tables
python -m bench table --readme README.md     put the tables between the README's markers
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from srpkd.reporting.table import format_table

from . import relation, results, train
from .cases import Case
from .providers import PROVIDERS
from .readme import between_markers, put_between_markers
from .results import Row, number

NAME = "bench table"  # in the README's markers
# cases in the table, for every device on which they are recorded
SHOWN = (
    Case(pixels=4096, normalize="row", distance="l1"),
    Case(pixels=4096, normalize="row", distance="l1", dtype="bfloat16"),
    Case(pixels=16384, normalize="row", distance="l1"),
    Case(pixels=65536, normalize="row", distance="l1", channels=(64, 64)),
    Case(pixels=4096, normalize="cosine", distance="l2"),  # the default of SRPLoss
)
GPU_ONLY = ("bfloat16",)  # the CPU backends convert it to float32
COLUMNS = [
    {"key": "case", "label": "case"},
    {"key": "provider", "label": "provider"},
    {"key": "milliseconds", "label": "ms", "format": ",.2f"},
    {"key": "eager", "label": "x eager's speed", "format": ".2f"},
    {"key": "compile", "label": "x compile's speed", "format": ".2f"},
    {"key": "megabytes", "label": "peak MB", "format": ",.1f"},
    {"key": "percent", "label": "% of roofline", "format": ".1f"},
]
TRAIN_COLUMNS = [
    {"key": "variant", "label": "training step"},
    {"key": "median_s", "label": "s", "format": ".2f"},
    {"key": "steps_per_s", "label": "steps/s", "format": ".3f"},
    {"key": "srp_percent_of_step", "label": "relation loss, % of step", "format": ".1f"},
    {"key": "times_faster_than_auto", "label": "x auto's speed", "format": ".2f"},
    {"key": "times_faster_than_plain", "label": "x the plain step's speed", "format": ".2f"},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results.add_csv(parser, relation.RESULTS)
    results.add_csv(parser, train.RESULTS, "--train-csv")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between the markers of this file")


def run(options: argparse.Namespace) -> None:
    """Print the tables or put them into the README."""
    text = tables(results.read(options.csv, relation.KEY), results.read(options.train_csv, train.KEY))
    if options.readme is None:
        print(text)
        return
    put_between_markers(options.readme, NAME, text)


def block(readme: Path) -> str:
    """Return the tables in a README; raises as ``between_markers``."""
    return between_markers(readme, NAME).rstrip("\n")


def tables(rows: Sequence[Row], train_rows: Sequence[Row]) -> str:
    """Return both tables as Markdown; the second is missing if no training step is recorded.

    Raises:
        ValueError: None of the cases in the table is recorded.
    """
    return "\n\n".join(filter(None, [table(rows), train_table(train_rows)]))


def train_table(rows: Sequence[Row]) -> str:
    """Return the table of training steps as Markdown, a part per device and model."""
    parts = []
    same = ("device", "threads", "model", "student", "teacher", "size", "batch")
    for own in results.group_by(rows, same).values():
        first = own[0]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in own))
        parts.append(
            f"{first['device']}, {first['threads']} threads; {first['model']}, {first['teacher']} to "
            f"{first['student']}, {first['size']} x {first['size']} pixels, batch {first['batch']}; "
            f"torch {first['torch']}; commit {commits}:"
        )
        numbers = [column["key"] for column in TRAIN_COLUMNS[1:]]
        lines = [{"variant": row["variant"]} | {name: number(row, name) for name in numbers} for row in own]
        parts.append(format_table({"columns": TRAIN_COLUMNS, "rows": lines}, markdown=True))
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Return the table of the relation loss as Markdown: a part per device, a row per case and provider.

    Raises:
        ValueError: None of the cases in the table is recorded.
    """
    parts = []
    for (device,), own in results.group_by(rows, ["device"]).items():
        most_threads = max(own, key=lambda row: int(row["threads"]))["threads"]
        on_cpu = own[0]["device_type"] == "cpu"
        lines: list[dict[str, object]] = []
        measured: list[Row] = []
        for case in SHOWN:
            if on_cpu and case.dtype in GPU_ONLY:
                continue
            wanted = {name: str(value) for name, value in case.columns().items()} | {"threads": most_threads}
            found = {row["provider"]: row for row in own if wanted.items() <= row.items()}
            # omit providers that do not support the case or are not installed
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
        raise ValueError("no case of the table is recorded: run python -m bench relation first")
    return "\n\n".join(parts)


def _line(case: Case, row: Row, first: bool) -> dict[str, object]:
    kind = f"{case.dtype}, {case.normalize} {case.distance}"
    line: dict[str, object] = {
        "case": f"N = {case.pixels:,}, C = {'/'.join(map(str, case.channels))}, {kind}" if first else "",
        "provider": row["provider"],
        "eager": number(row, "times_faster_than_eager"),
        "compile": number(row, "times_faster_than_compile"),
        "percent": number(row, "percent_of_roofline"),
    }
    for key, column, scale in (("milliseconds", "median_s", 1e3), ("megabytes", "peak_extra_bytes", 1e-6)):
        value = number(row, column)
        line[key] = None if value is None else value * scale
    if row["status"] != "ok":
        needed = number(row, "needed_bytes")
        line["milliseconds"] = row["status"]
        line["megabytes"] = needed and f"needs {needed / 1e6:,.0f}"
    return line
