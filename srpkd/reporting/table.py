"""Tables as plain text and Markdown."""

from typing import Any, NamedTuple

# --- the table ----------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of report.json as text: what the page, the terminal and markdown have in common."""

    columns: list[dict[str, str]]
    numeric: list[bool]  # per column: numbers stand to the right
    cells: list[list[str]]
    notes: list[str]


def format_table(table: dict[str, Any], markdown: bool = False) -> str:
    """A run's table as aligned text for a terminal, or as GitHub markdown, with its notes below.

    Args:
        table: `{"columns": [{"key", "label", "format", "help"}], "rows": [{key: value}], "notes": [str]}`; a
            value is a number, a text, `{"mean", "std", "n"}` or None (not measured), "format" a Python format
            spec such as ".1f" or ",".
        markdown: GitHub markdown in place of aligned text.

    Raises:
        ValueError: a number does not go with its column's format.
    """
    columns, numeric, cells, notes = layout_table(table)
    lines = [[column["label"] for column in columns], *cells]
    if markdown:
        # a bar would end the cell, an angle bracket start a tag
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
    """Whether it is a {"mean", "std", "n"} of more than one run."""
    return isinstance(value, dict) and value.get("std") is not None and (value.get("n") or 0) > 1


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        mean = _cell(value.get("mean"), spec)
        return f"{mean} ± {_cell(value['std'], spec)}" if _has_spread(value) else mean
    return format(value, spec) if isinstance(value, int | float) else str(value)
