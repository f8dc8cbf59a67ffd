"""Tables of recorded results: the relation loss alone, and training steps.

    python -m bench table                        print the tables
    python -m bench table --readme README.md     put them between the markers of the README and of docs/benchmarks.md

The README contains a short table, with one row per case; docs/benchmarks.md contains all providers and training steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srpkd.checking.cases import Case
from srpkd.files import expand_user
from srpkd.reporting.table import format_table

from . import relation, results, train
from .markers import put_between_markers
from .providers import DEFAULT, OURS
from .record import with_present_native
from .results import Row, number

NAME = "bench table"  # in the README's markers
# cases in the table, by the type of the device on which they are recorded
SHOWN = {
    "cpu": (
        Case(pixels=4096),
        Case(pixels=16384),
        Case(pixels=65536, channels=(64, 64)),
        Case(pixels=4096, normalize="cosine", distance="l2"),  # the default of SRPLoss
    ),
    "cuda": (
        Case(batch=16, dtype="bfloat16"),
        Case(dtype="bfloat16"),
        Case(pixels=16384, dtype="bfloat16"),
        Case(batch=16, dtype="bfloat16", normalize="cosine", distance="l2"),
        Case(precision="high", normalize="cosine", distance="l2"),
        Case(batch=16, precision="high"),
        Case(batch=16),
    ),
}
# keys are columns of the CSV, in the units of SCALES
COLUMNS = [
    {"key": "case"},
    {"key": "provider"},
    {"key": "median_s", "label": "ms", "format": ",.2f"},
    {"key": "gpu_s", "label": "GPU ms", "format": ",.3f"},
    {"key": "host_s", "label": "host ms", "format": ",.3f"},
    {"key": "times_faster_than_eager", "label": "x eager's speed", "format": ".2f"},
    {"key": "times_faster_than_compile", "label": "x compile's speed", "format": ".2f"},
    {"key": "peak_extra_bytes", "label": "peak MB", "format": ",.1f"},
    {"key": "percent_of_roofline", "label": "% of roofline", "format": ".1f"},
]
SHORT_COLUMNS = [
    {"key": "case"},
    {"key": "eager ms", "format": ",.2f"},
    {"key": "compile ms", "format": ",.2f"},
    {"key": "srpkd ms", "format": ",.2f"},
    {"key": "backend"},
    {"key": "x eager", "format": ".1f"},
    {"key": "x compile", "format": ".1f"},
    {"key": "eager MB", "format": ",.0f"},
    {"key": "srpkd MB", "format": ",.0f"},
]
SCALES = {"median_s": 1e3, "gpu_s": 1e3, "host_s": 1e3, "peak_extra_bytes": 1e-6}
TRAIN_COLUMNS = [
    {"key": "variant", "label": "training step"},
    {"key": "median_s", "label": "s", "format": ".2f"},
    {"key": "steps_per_s", "label": "steps/s", "format": ".3f"},
    {"key": "srp_percent_of_step", "label": "relation loss, % of step", "format": ".1f"},
    {"key": "times_faster_than_auto", "label": "x auto's speed", "format": ".2f"},
    {"key": "times_faster_than_plain", "label": "x the plain step's speed", "format": ".2f"},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results.add_csv(parser, relation.RESULTS, relation.COLUMNS)
    results.add_csv(parser, train.RESULTS, train.KEY, "--train-csv")
    parser.add_argument(
        "--readme", type=expand_user, metavar="FILE", help="put the tables between the markers of this file"
    )


def run(options: argparse.Namespace) -> None:
    """Print the tables, or put them into the README and docs/benchmarks.md beside it."""
    rows, train_rows = results.read(options.csv), results.read(options.train_csv)
    if options.readme is None:
        print(joined(table(rows), train_table(train_rows)))
        return
    for file, text in texts(options.readme, rows, train_rows).items():
        put_between_markers(file, NAME, text)


def texts(readme: Path, rows: Sequence[Row], train_rows: Sequence[Row]) -> dict[Path, str]:
    """Return the text between the markers of each file: the README, and docs/benchmarks.md beside it.

    Raises:
        ValueError: None of the cases in the table is recorded.
    """
    return {
        readme: joined(short_table(rows), steps_in_short(train_rows)),
        readme.parent / "docs" / "benchmarks.md": joined(table(rows), train_table(train_rows)),
    }


def joined(*parts: str) -> str:
    """Return paragraphs as one text; the table of training steps is empty if none is recorded."""
    return "\n\n".join(filter(None, parts))


def train_table(rows: Sequence[Row]) -> str:
    """Return the table of training steps as Markdown, a part per device and model."""
    parts = []
    same = ("device", "threads", "model", "student", "teacher", "size", "batch")
    for own in results.group_by(rows, same).values():
        first = own[0]
        parts.append(
            f"{first['device']}, {first['threads']} threads; {first['model']}, {first['teacher']} to "
            f"{first['student']}, {first['size']} x {first['size']} pixels, batch {first['batch']}; "
            f"torch {first['torch']}; commit {results.distinct(own, 'commit')}{gain_of_fast(own)}:"
        )
        numbers = [column["key"] for column in TRAIN_COLUMNS[1:]]
        lines = [{"variant": row["variant"]} | {name: number(row, name) for name in numbers} for row in own]
        parts.append(format_table({"columns": TRAIN_COLUMNS, "rows": lines}, markdown=True))
    return "\n\n".join(parts)


def gain_of_fast(rows: Sequence[Row]) -> str:
    """Return "; a step with `--fast` is 1.65 to 1.81 times as fast", or "" if no step was measured with and without."""
    ratios: list[float] = []
    for own in results.group_by(rows, train.KEY[1:]).values():
        seconds = {row["variant"]: float(row["median_s"]) for row in own}
        ratios += [seconds[name] / fast for name in seconds if (fast := seconds.get(f"{name}, fast"))]
    return f"; a step with `--fast` is {_extremes(ratios, '.2f')} times as fast" if ratios else ""


def steps_in_short(rows: Sequence[Row]) -> str:
    """Return a sentence for each device on which training steps with the relation loss are recorded."""
    sentences = []
    for (device, model, size), own in results.group_by(rows, ("device", "model", "size")).items():
        ours = [number(row, "srp_percent_of_step") for row in own if row["variant"].startswith("auto")]
        if shares := [share for share in ours if share is not None]:
            sentences.append(
                f"{device}: in a training step of {model} with {size} x {size} pixels, the relation loss takes "
                f"{_extremes(shares, '.1f')} % of the time{gain_of_fast(own)}."
            )
    return "\n\n".join(sentences)


def _extremes(values: Sequence[float], spec: str) -> str:
    """Return "1.65 to 1.81", or one number if both are the same."""
    return " to ".join(dict.fromkeys(format(value, spec) for value in (min(values), max(values))))


class Measured(NamedTuple):
    """The rows of one device that the table shows, by case and provider, and the line above the table."""

    caption: str
    cases: dict[Case, dict[str, Row]]


def measured(rows: Sequence[Row]) -> list[Measured]:
    """Return the rows of the table by device, with the most threads that are recorded there.

    Raises:
        ValueError: None of the cases in the table is recorded.
    """
    devices = []
    for (device,), own in results.group_by(with_present_native(rows), ["device"]).items():
        threads = max(own, key=lambda row: int(row["threads"]))["threads"]
        cases = {}
        for case in SHOWN[own[0]["device_type"]]:
            wanted = {name: str(value) for name, value in case.columns().items()} | {"threads": threads}
            found = {row["provider"]: row for row in own if wanted.items() <= row.items()}
            # omit providers that do not support the case or are not installed
            found = {name: found[name] for name in DEFAULT if name in found and found[name]["status"] != "skipped"}
            if found:
                cases[case] = found
        if cases:
            every = [row for found in cases.values() for row in found.values()]
            versions, commits = (results.distinct(every, name) for name in ("torch", "commit"))
            where = f"{device}, {threads} threads" if own[0]["device_type"] == "cpu" else device
            devices.append(Measured(f"{where}; torch {versions}; commit {commits}:", cases))
    if not devices:
        raise ValueError("no case of the table is recorded: run python -m bench relation first")
    return devices


def table(rows: Sequence[Row]) -> str:
    """Return the table of the relation loss as Markdown: a part per device, a row per case and provider.

    Raises:
        ValueError: None of the cases in the table is recorded.
    """
    parts = []
    for caption, cases in measured(rows):
        lines = [
            _line(row) | {"case": _describe(case, row) if i == 0 else "", "provider": name}
            for case, found in cases.items()
            for i, (name, row) in enumerate(found.items())
        ]
        absent = {key for key in ("gpu_s", "host_s") if not any(line[key] for line in lines)}
        columns = [column for column in COLUMNS if column["key"] not in absent]
        parts += [caption, format_table({"columns": columns, "rows": lines}, markdown=True)]
    return "\n\n".join(parts)


def short_table(rows: Sequence[Row]) -> str:
    """Return the table of the README, a row per case with the fastest of srpkd's backends; raises as ``table``."""
    parts = []
    for caption, cases in measured(rows):
        lines = [
            {"case": _describe(case, next(iter(found.values())))} | _short_line(found) for case, found in cases.items()
        ]
        parts += [caption, format_table({"columns": SHORT_COLUMNS, "rows": lines}, markdown=True)]
    return "\n\n".join(parts)


def _short_line(found: dict[str, Row]) -> dict[str, Any]:
    """Return the cells of a case, given its rows by provider."""
    lines = {name: _line(row) for name, row in found.items()}
    backends = [name for name in OURS if name in found]
    backend = min(backends, key=lambda name: number(found[name], "median_s") or math.inf, default="")
    eager, compiled, ours = (lines.get(name, {}) for name in ("eager", "compile", backend))
    return {
        "eager ms": eager.get("median_s"),
        "compile ms": compiled.get("median_s"),
        "srpkd ms": ours.get("median_s"),
        "backend": backend or None,
        "x eager": ours.get("times_faster_than_eager"),
        "x compile": ours.get("times_faster_than_compile"),
        "eager MB": eager.get("peak_extra_bytes"),
        "srpkd MB": ours.get("peak_extra_bytes"),
    }


def _describe(case: Case, row: Row) -> str:
    batch = f", B = {case.batch}" if case.batch > 1 else ""
    precision = f" {case.precision}" if case.dtype == "float32" and row["device_type"] == "cuda" else ""
    kind = f"{case.dtype}{precision}, {case.normalize} {case.distance}"
    return f"N = {case.pixels:,}, C = {'/'.join(map(str, case.channels))}{batch}, {kind}"


def _line(row: Row) -> dict[str, Any]:
    """Return a row's numbers as the table shows them, with its status in place of a time that is not measured."""
    line: dict[str, Any] = {}
    for key in (column["key"] for column in COLUMNS[2:]):
        value = number(row, key)
        line[key] = None if value is None else value * SCALES.get(key, 1)
    if row["status"] != "ok":
        needed = number(row, "needed_bytes")
        line |= {"median_s": row["status"], "peak_extra_bytes": needed and f"needs {needed / 1e6:,.0f}"}
    return line
