"""Results as CSV files: one row per thing measured, a newer row in the place of the older."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpkd.files import atomic_write

FOLDER = Path(__file__).resolve().parent / "results"
Row = dict[str, str]


def read(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a file, all values as text; none if there is no file.

    Raises:
        ValueError: it is no such file, or lacks one of the columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            reader = csv.DictReader(file)
            rows, found = list(reader), reader.fieldnames or []
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no file of results: {error}") from error
    if lacking := [name for name in columns if name not in found]:
        raise ValueError(f"{path} is no file of these results: it has no columns {', '.join(lacking)}")
    return rows


def upsert(path: Path, rows: Iterable[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Put rows into a file: each in the place of the one that agrees with it in the columns ``key``, or at its end.

    None is written as an empty cell, a float with six digits. The file is replaced in one step.
    """
    merged = {_key(row, key): row for row in read(path)}
    for row in rows:
        cells = {name: _cell(value) for name, value in row.items()}
        merged[_key(cells, key)] = cells
    columns = list(dict.fromkeys(name for row in merged.values() for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def number(row: Row, column: str) -> float | None:
    """A cell as a number, None where it is empty or there is no such column."""
    return float(row[column]) if row.get(column) else None


def _key(row: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in key)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
