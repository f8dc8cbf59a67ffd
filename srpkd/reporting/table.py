"""Tables as plain text and Markdown."""

from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table with formatted cells.

    Attributes:
        columns: {"key", "label", "help"} per column.
        numeric: whether a column contains numbers, which are aligned right.
        cells: formatted values by row.
        notes: paragraphs below the table.
    """

    columns: list[dict[str, str]]
    numeric: list[bool]
    cells: list[list[str]]
    notes: list[str]


def format_table(table: dict[str, Any], markdown: bool = False) -> str:
    """Format a table as aligned text or as GitHub Markdown, followed by its notes.

    Args:
        table: `{"columns": [{"key", "label", "format", "help"}], "rows": [{key: value}], "notes": [str]}`. A value is
            a number, a string, `{"mean", "std", "n"}` or None (not measured); "format" is a Python format specifier
            for numbers, such as ".1f" or ",".
        markdown: return GitHub Markdown instead of aligned text.

    Raises:
        ValueError: A number does not fit the format of its column.
    """
    columns, numeric, cells, notes = layout_table(table)
    lines = [[column["label"] for column in columns], *cells]
    if markdown:
        # a bar would end the cell, and an angle bracket would start a tag
        lines = [[cell.replace("|", r"\|").replace("<", "&lt;") for cell in line] for line in lines]
        notes = [note.replace("<", "&lt;") for note in notes]
        lines.insert(1, ["---:" if right else "---" for right in numeric])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    else:
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric)
            ).rstrip()
            for line in lines
        )
    return "\n\n".join([text, *notes])


def layout_table(table: dict[str, Any]) -> Table:
    """Format the cells of a table; see ``format_table``."""
    columns = [{"label": column["key"], "help": ""} | column for column in table.get("columns", [])]
    rows = [[row.get(column["key"]) for column in columns] for row in table.get("rows", [])]
    cells = [[_cell(value, column.get("format", "")) for value, column in zip(row, columns)] for row in rows]
    numeric = [any(isinstance(value, int | float | dict) for value in values) for values in zip(*rows)]
    seeds = sorted({value["n"] for values in rows for value in values if _has_spread(value)})
    notes = [str(note) for note in table.get("notes", [])]
    if seeds:
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes = [f"Mean ± standard deviation over {over} runs.", *notes]
    return Table(columns, numeric or [False] * len(columns), cells, notes)


def _has_spread(value: Any) -> bool:
    """Return whether a value is a {"mean", "std", "n"} of more than one run."""
    return isinstance(value, dict) and value.get("std") is not None and (value.get("n") or 0) > 1


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        mean = _cell(value.get("mean"), spec)
        return f"{mean} ± {_cell(value['std'], spec)}" if _has_spread(value) else mean
    return format(value, spec) if isinstance(value, int | float) else str(value)
