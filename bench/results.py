"""Results as CSV files with one row per measurement; a newer measurement replaces the older row."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpkd.files import atomic_write, expand_user

FOLDER = Path(__file__).resolve().parent / "results"
Row = dict[str, str]


def read(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a file, with all values as text; [] if the file does not exist.

    Raises:
        ValueError: The file is not CSV, lacks one of the columns, or has a line that is not complete.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = []
        try:
            found = reader.fieldnames or []
            for row in reader:
                if None in row or None in row.values():  # more cells than columns, or fewer
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(found)} cells: fix or remove the line"
                    )
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path}: expected a file of results, the columns {', '.join(missing)} are missing")
    return rows


def upsert(path: Path, rows: Iterable[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Insert rows into a file; a row replaces the one with the same values in the columns ``key``.

    None becomes an empty cell; floats have six digits. The file is replaced atomically. Raises as ``read``.
    """
    merged = {_key(row, key): row for row in read(path, key)}
    for row in rows:
        cells = {name: _cell(value) for name, value in row.items()}
        merged[_key(cells, key)] = cells
    columns = list(dict.fromkeys(name for row in merged.values() for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def group_by(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Group rows by their values in some columns, in the order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in columns), []).append(row)
    return groups


def distinct(rows: Iterable[Row], column: str) -> str:
    """Return the values of a column, each once, such as "abc, def"."""
    return ", ".join(dict.fromkeys(row[column] for row in rows))


def number(row: Row, column: str) -> float | None:
    """Return a cell as a number, None if it is empty or the column does not exist."""
    return float(row[column]) if row.get(column) else None


def add_csv(parser: argparse.ArgumentParser, default: Path, columns: Sequence[str], name: str = "--csv") -> None:
    """Add the option with the path of a file of results with these columns, which is checked before any work."""

    def checked(text: str) -> Path:
        path = expand_user(text)
        try:
            read(path, columns)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return path

    parser.add_argument(
        name, type=checked, default=str(default), metavar="CSV", help="file of results (default: %(default)s)"
    )


def _key(row: Mapping[str, str], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[name] for name in key)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
