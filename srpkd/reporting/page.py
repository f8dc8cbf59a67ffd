"""The HTML page of a training run.

    python -m srpkd.report runs/demo

`write_report` depends only on the files in the run's folder, so a page can be written again during the run, after it,
or on another machine. It reads these files, all of which are optional:

| file | contents |
| --- | --- |
| `config.yaml` | the resolved configuration |
| `metrics.jsonl` | one JSON object per line: `stage`, `step`, `epoch`, `seconds`, and metrics by name |
| `report.json` | title, task, command, environment, status, table, samples, relations, files |
| `images/*.png` | the pictures that `report.json` names; the curves are added as `curves_<metric>.png` |
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ..data.images import DataError, open_image, read_image
from ..files import expand_user, write_file
from .curves import MetricsReader, draw_curves
from .figures import to_png
from .table import layout_table

PAGE_WIDTH = 1240  # of the page's content, in CSS pixels; also passed to index.html.j2
OVERVIEW_SAMPLES, OVERVIEW_RELATIONS = 3, 2  # rows
SMALL_IMAGE = 200  # narrower pictures are enlarged by whole multiples, without interpolation


def write_report(run_dir: str | Path, metrics_reader: MetricsReader | None = None) -> Path:
    """Draw a run's curves and write its page, `index.html`, from the files that exist so far.

    The page is self-contained: it loads only pictures of the run's folder, by relative links, and names the parts that
    are missing. Each file is replaced atomically, so a reader never sees a partial file.

    Args:
        run_dir: folder of a run, such as `runs/demo`; see the module's docstring.
        metrics_reader: has read metrics.jsonl up to an earlier line; by default the whole file is read.

    Returns:
        The path of the page.

    Raises:
        ValueError: The folder does not exist or contains no file of a run, or report.json has an invalid structure.
        WriteError: The page or a picture cannot be written.
    """
    run = expand_user(run_dir)
    pictures = [path for path in run.glob("images/*.png") if not path.name.startswith("curves_")]
    known = [run / name for name in ("config.yaml", "metrics.jsonl", "report.json")]
    if not pictures and not any(path.is_file() for path in known):
        inside = sorted(path.name for path in run.iterdir())[:8] if run.is_dir() else ["no such folder"]
        raise ValueError(
            f"{run} is not the folder of a run: found {', '.join(inside) or 'nothing in it'}, expected"
            " config.yaml, metrics.jsonl, report.json or images/*.png; pass a folder that"
            " python -m srpkd.train wrote, runs/<name>"
        )
    config = known[0] if known[0].is_file() else None
    report, problem = read_report(known[2])
    try:
        content = {
            "elapsed": _duration(report.get("elapsed_seconds")),
            "environment": dict(report.get("environment") or {}),
            "table": layout_table(report.get("table") or {}),
            "samples": _grid(run, report.get("samples") or [], "images"),
            "relations": _grid(run, report.get("relations") or [], "panels"),
            "files": [_file(run, entry) for entry in report.get("files") or []],
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{known[2]} has an invalid structure ({type(error).__name__}: {error}): fix or remove it; without it, the "
            "page is written from the other files"
        ) from error
    metrics = (metrics_reader or MetricsReader(known[1])).read()
    curves = draw_curves(metrics, run / "images")
    page = render_template(
        "index.html.j2",
        run=run.resolve().name,
        report=report,
        problem=problem,
        curves=[(name, relative_link(path.relative_to(run))) for name, path in curves],
        metrics=metrics,
        config=config.read_text(encoding="utf-8", errors="replace") if config else "",
        pictures_found=len(pictures),
        page_width=PAGE_WIDTH,
        **content,
    )
    return write_file(run / "index.html", page.encode("utf-8", errors="replace"), "content")


def render_template(name: str, **values: Any) -> str:
    """Render an HTML template of this package; all values are escaped."""
    # select_autoescape depends on the file's suffix and would not escape .j2
    templates = Environment(
        loader=PackageLoader("srpkd.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template(name).render(**values)


def read_report(path: Path) -> tuple[dict[str, Any], str]:
    """Read report.json: (report, "") on success, ({}, error message) if it is missing or unreadable."""
    if not path.is_file():
        return {}, "report.json does not exist yet."
    try:
        report = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        return {}, f"report.json cannot be read: {error}."
    if not isinstance(report, dict):
        return {}, f"report.json cannot be read: expected an object, received {type(report).__name__}."
    return report, ""


def _grid(run: Path, items: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Arrange samples or relations as a grid of pictures: a row per item, a column per label."""
    labels = list(dict.fromkeys(entry["label"] for item in items for entry in item.get(key, [])))
    column_width = PAGE_WIDTH // max(len(labels), 3) - 14  # on a wide screen, in CSS pixels
    rows = []
    for item in items:
        files = {entry["label"]: entry["file"] for entry in item.get(key, [])}
        cells = [_picture(run, files[label], column_width) if label in files else None for label in labels]
        rows.append({"caption": item.get("caption", ""), "cells": cells})
    widest = max((cell["width"] for row in rows for cell in row["cells"] if cell), default=0)
    return {"labels": labels, "rows": rows, "column": max(widest, 120) + 14}


def _picture(run: Path, file: str, column_width: int) -> dict[str, Any]:
    """Return the link and the displayed size of a picture; width 0 if it does not exist yet or is incomplete."""
    try:
        with open_image(run / file) as image:
            width, height = image.size
    except DataError:
        return {"link": relative_link(file), "width": 0}
    # a whole multiple, so that all pixels have the same size
    scale = max(1, column_width // width) if width < SMALL_IMAGE else min(1.0, column_width / width)
    return {
        "link": relative_link(file),
        "width": round(width * scale),
        "height": round(height * scale),
        "small": width < SMALL_IMAGE,
    }


def _file(run: Path, entry: dict[str, str]) -> dict[str, str]:
    link = relative_link(entry["file"]) if (run / entry["file"]).exists() else ""
    return {"label": entry.get("label") or entry["file"], "name": entry["file"], "link": link}


def relative_link(file: str | Path) -> str:
    """Return a relative link with a quoted colon, so that no file name is read as a scheme such as javascript:."""
    return quote(Path(file).as_posix())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def overview(run_dir: str | Path, path: str | Path) -> Path:
    """Write the first rows of a run's samples and relations into one PNG, for a README or a slide; return its path.

    Raises:
        ValueError: The run has no pictures yet.
    """
    run = expand_user(run_dir)
    report, _ = read_report(run / "report.json")
    rows = [entry["images"] for entry in report.get("samples", [])[:OVERVIEW_SAMPLES]]
    rows += [entry["panels"] for entry in report.get("relations", [])[:OVERVIEW_RELATIONS]]
    if not rows:
        raise ValueError(f"{run}: report.json names no pictures yet, expected samples or relations")
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.5 * columns, 1.65 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, panels in zip(axes, rows):
        for axis in line:
            axis.set_axis_off()
        for axis, panel in zip(line, panels):
            axis.imshow(np.asarray(read_image(run / panel["file"])), interpolation="nearest")
            axis.set_title(panel["label"], fontsize=8)
    return write_file(Path(path), to_png(figure, dpi=120))
