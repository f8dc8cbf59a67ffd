"""The page that a training run leaves behind, and the pictures on it.

    python -m srpkd.report runs/demo

`write_report` is a pure function of the run's folder, so a page can be rewritten while the run goes on, after
it, or on another machine. What the folder may hold, all of it optional:

| file | what |
| --- | --- |
| `config.yaml` | the resolved configuration |
| `metrics.jsonl` | one JSON object a line: `stage`, `step`, `epoch`, `seconds`, and any named values |
| `report.json` | title, task, command, environment, status, table, samples, relations, files |
| `images/*.png` | the pictures that `report.json` names; the curves are added as `curves_<value>.png` |
"""

import argparse
import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image
from torch import Tensor

from .checkpoint import atomic_write
from .data.folders import DataError, open_image

__all__ = ["format_table", "mark_pixel", "relation_picture", "relation_row", "save_image", "write_report"]

PAGE_WIDTH = 1240  # CSS pixels of the page's content; index.html.j2 is told the same number
SMALL_IMAGE = 200  # narrower pictures are enlarged pixel by pixel, never blurred
CURVE_POINTS = 1000  # about as many as a curve has pixels
NOT_A_VALUE = {"stage", "step", "epoch", "seconds"}  # keys of metrics.jsonl that say when, not what
# grey for the first, as a rule the teacher; then colours that the colour-blind tell apart (Okabe and Ito)
ARM_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")


# --- pictures of images and of relations --------------------------------------------------------------------


def save_image(image: Tensor | np.ndarray, path: str | Path) -> Path:
    """Write a picture as PNG, and make its folder.

    Args:
        image: a tensor in [-1, 1], (3, H, W) colour or (1, H, W) grey (what lies outside is clipped, NaN is
            black), or a uint8 array (H, W, 3) such as `relation_picture` and `mark_pixel` return.
        path: where to; a file that is there is replaced.

    Raises:
        ValueError: the shape is none of these.
    """
    pixels = image if isinstance(image, np.ndarray) else _to_pixels(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"save_image expected a uint8 array (H, W, 3), got {pixels.dtype} {pixels.shape}")
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    return _write(Path(path), png.getvalue())


def relation_row(feature: Tensor, pixel: tuple[int, int], normalize: str = "row", eps: float = 1e-12) -> Tensor:
    """The relation of one pixel to all pixels: row i of the relation matrix, as a map.

    Args:
        feature: (C, h, w), of any dtype and device.
        pixel: (y, x), the pixel i in the feature map's coordinates.
        normalize: "row" G_i / ||G_i||_2, "cosine" q_i . q_j / (||q_i|| ||q_j||), "none" G_i, with G = Q Q^T.
        eps: as in `SRPLoss`: where a norm is not above it, the relation is 0.

    Returns:
        (h, w), float32, on the CPU.

    Raises:
        ValueError: not a (C, h, w) feature, a pixel outside of it, an unknown `normalize`.
    """
    if feature.ndim != 3:
        raise ValueError(f"feature: expected the shape (C, h, w) of one image, got {tuple(feature.shape)}")
    y, x = _checked_pixel(pixel, feature.shape[-2:])
    feature = feature.detach().float().cpu()
    row = torch.einsum("c,chw->hw", feature[:, y, x], feature)

    def inverse(norm: Tensor) -> Tensor:
        return torch.where(norm > eps, 1 / norm, 0.0)

    match normalize:
        case "row":
            return row * inverse(row.norm())
        case "cosine":
            scale = inverse(feature.norm(dim=0))
            return row * scale * scale[y, x]
        case "none":
            return row
    raise ValueError(f'normalize: expected "row", "cosine" or "none", got {normalize!r}')


def relation_picture(
    feature: Tensor, pixel: tuple[int, int], size: tuple[int, int], normalize: str = "row"
) -> np.ndarray:
    """Paint `relation_row`: red is alike, white unrelated, blue opposite, and the pixel itself is marked.

    Each picture has its own scale, symmetric around 0 and up to the 99th percentile of its magnitudes (one
    outlier would make all else pale), so "row" and "none", which differ by a factor, look the same.

    Args:
        feature: (C, h, w).
        pixel: (y, x) in the feature map's coordinates.
        size: (H, W) of the picture, as a rule the input image's; cells are repeated, never blended.
        normalize: as in `relation_row`.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: as `relation_row`.
    """
    row = relation_row(feature, pixel, normalize).nan_to_num(0.0, 0.0, 0.0).numpy()
    limit = np.quantile(abs(row), 0.99) or abs(row).max() or 1.0
    (h, w), (height, width) = row.shape, size
    cells = row[np.arange(height)[:, None] * h // height, np.arange(width) * w // width]
    picture = colormaps["RdBu_r"](0.5 + 0.5 * cells / limit, bytes=True)[..., :3]
    return _mark(picture, pixel, row.shape)


def mark_pixel(image: Tensor, pixel: tuple[int, int], feature_shape: Sequence[int]) -> np.ndarray:
    """Draw a frame around the part of an image that one pixel of a feature map stands for.

    Args:
        image: (3, H, W) or (1, H, W) in [-1, 1].
        pixel: (y, x) in the feature map's coordinates.
        feature_shape: the feature map's shape; its last two numbers are (h, w).

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: not one such image, or a pixel outside of the feature map.
    """
    return _mark(_to_pixels(image), pixel, feature_shape[-2:])


def _to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) or (1, H, W) in [-1, 1] to (H, W, 3) of uint8."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected one image of shape (3, H, W) or (1, H, W) in [-1, 1], got {tuple(image.shape)}")
    image = image.detach().float().cpu().nan_to_num(nan=-1.0).expand(3, -1, -1)
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _checked_pixel(pixel: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    (y, x), (h, w) = pixel, shape
    if not (0 <= y < h and 0 <= x < w):
        raise ValueError(f"pixel: expected (y, x) inside the {h} x {w} feature map, got ({y}, {x})")
    return y, x


def _mark(picture: np.ndarray, pixel: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """A copy of picture (H, W, 3), the pixel's cell framed in black and white, which shows on any ground."""
    y, x = _checked_pixel(pixel, shape)
    height, width = picture.shape[:2]

    def cell(i: int, cells: int, length: int) -> tuple[int, int]:
        start = -(-i * length // cells)  # rounded up: the first place whose nearest cell is i
        return start, max(start + 1, -(-(i + 1) * length // cells))

    (top, bottom), (left, right) = cell(y, shape[0], height), cell(x, shape[1], width)
    line = max(1, min(height, width) // 128)
    marked = picture.copy()
    for margin, colour in ((2 * line, 255), (line, 0)):
        rows = slice(max(0, top - margin), bottom + margin)
        columns = slice(max(0, left - margin), right + margin)
        marked[rows, columns] = colour
    marked[top:bottom, left:right] = picture[top:bottom, left:right]
    return marked


# --- the table ----------------------------------------------------------------------------------------------


class _Table(NamedTuple):
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
    columns, numeric, cells, notes = _layout(table)
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


def _layout(table: dict[str, Any]) -> _Table:
    columns = [{"label": column["key"], "help": ""} | column for column in table.get("columns", [])]
    rows = [[row.get(column["key"]) for column in columns] for row in table.get("rows", [])]
    cells = [[_cell(value, column.get("format", "")) for value, column in zip(row, columns)] for row in rows]
    numeric = [any(isinstance(value, int | float | dict) for value in values) for values in zip(*rows)]
    seeds = sorted({value["n"] for values in rows for value in values if _has_spread(value)})
    notes = [str(note) for note in table.get("notes", [])]
    if seeds:
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes = [f"Mean ± standard deviation over {over} runs.", *notes]
    return _Table(columns, numeric or [False] * len(columns), cells, notes)


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


# --- the curves ---------------------------------------------------------------------------------------------


class _Metrics(NamedTuple):
    """What metrics.jsonl holds, by value and stage."""

    series: dict[str, dict[str, np.ndarray]]  # value -> stage -> (2, n), ascending steps and values
    lines: Counter[str]  # stage -> lines
    last: tuple[str, float] | None  # the stage and step of the last line
    remarks: list[str]  # what the curves do not show


def _read_metrics(path: Path) -> _Metrics:
    collected: dict[str, dict[str, list[tuple[float, float]]]] = {}
    lines: Counter[str] = Counter()
    last, unreadable = None, 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                last = stage, step = str(entry["stage"]), float(entry["step"])
                values = {n: float(v) for n, v in entry.items() if n not in NOT_A_VALUE and isinstance(v, int | float)}
            except (ValueError, KeyError, TypeError, OverflowError):
                # a line without its end is the last one, being written or cut off: nothing to remark on
                unreadable += line.endswith("\n") and not line.isspace()
                continue
            lines[stage] += 1
            for name, value in values.items():
                collected.setdefault(name, {}).setdefault(stage, []).append((step, value))
    remarks = [f"Lines of {path.name} that could not be read: {unreadable:,}."] if unreadable else []
    series: dict[str, dict[str, np.ndarray]] = {}
    for name, stages in collected.items():
        for stage, pairs in stages.items():
            points = np.array(pairs, dtype=np.float64).T
            points = points[:, np.argsort(points[0], kind="stable")]  # a resumed run steps back
            finite = np.isfinite(points).all(0)
            if not finite.all():
                remarks.append(
                    f"{name} of {stage} is not finite at {(~finite).sum():,} of {len(finite):,} points, first at"
                    f" step {points[0, ~finite][0]:,.0f}; the curve leaves them out."
                )
            if finite.any():
                series.setdefault(name, {})[stage] = points[:, finite]
    return _Metrics(series, lines, last, remarks)


def _draw_curves(metrics: _Metrics, folder: Path) -> list[tuple[str, Path]]:
    """One PNG per value; what is measured now and then (mIoU, ...) comes before the losses of every step.

    What no stage measured twice makes no curve: it stands in the table.
    """
    arms = dict.fromkeys(map(_arm, metrics.lines))
    colours = {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(arms)}

    def is_sparse(stages: dict[str, np.ndarray]) -> bool:
        return 4 * sum(points.shape[1] for points in stages.values()) < sum(metrics.lines[s] for s in stages)

    drawn = []
    series = {name: st for name, st in metrics.series.items() if any(points.shape[1] > 1 for points in st.values())}
    for name, stages in sorted(series.items(), key=lambda item: not is_sparse(item[1])):
        path = folder / f"curves_{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}.png"
        png = io.BytesIO()
        _curve(name, stages, colours, is_sparse(stages)).savefig(png, format="png", dpi=160)
        drawn.append((name, _write(path, png.getvalue())))
    return drawn


def _arm(stage: str) -> str:
    """The arm that a stage is one run of: "srp" for "srp seed 0"."""
    return re.sub(r"\s+seed\s*\d+$", "", stage)


def _curve(name: str, stages: dict[str, np.ndarray], colours: dict[str, str], sparse: bool) -> Figure:
    """Every stage's raw values, faint, and over them each arm's mean over its seeds, smoothed."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    arms: dict[str, list[np.ndarray]] = {}
    faint = 0.4 if sparse else 0.3 / math.sqrt(len(stages))  # many seeds would make a haze that hides the means
    for stage, points in stages.items():
        arms.setdefault(_arm(stage), []).append(points)
        steps, values = points[:, :: math.ceil(points.shape[1] / CURVE_POINTS)]
        axes.plot(steps, values, color=colours[_arm(stage)], alpha=faint, linewidth=0.7)
    for arm, seeds in arms.items():
        steps, values = _smooth(np.concatenate(seeds, axis=1), share=0.0 if sparse else 0.05)
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, values, color=colours[arm], label=arm, linewidth=1.7, marker=marker, markersize=3)

    values = np.concatenate([points[1] for points in stages.values()])
    low, high = np.quantile(values, [0.01, 0.99])
    if not sparse and values.min() > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set(major_formatter=StrMethodFormatter("{x:g}"), minor_formatter=NullFormatter())
    lengths = [max(points[0, -1] for points in seeds) for seeds in arms.values()]
    # a teacher trained for longer would squeeze the students' curves into a corner
    if max(lengths) > 4 * min(lengths) > 40:
        axes.set_xscale("log")
        first = min(points[0, 0] for points in stages.values())
        axes.set_xlim(left=max(0.9 * first, min(lengths) / 50))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set(major_formatter=StrMethodFormatter("{x:,.0f}"), minor_formatter=NullFormatter())

    # names are text: a dollar sign in one starts no formula
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel("step", fontsize=9, color="#555555")
    axes.tick_params(labelsize=8.5, colors="#555555", length=3)
    axes.grid(color="#000000", alpha=0.09, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    legend = figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.4)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _smooth(points: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Means in at most CURVE_POINTS equal parts of the steps, then a centred moving average.

    Args:
        points: (2, n), steps and values, of several seeds in any order.
        share: of those parts, the share that the moving average spans; 0 leaves them as they are.
    """
    steps, values = points
    width = np.ptp(steps) / CURVE_POINTS or 1.0
    part = np.unique(np.floor((steps - steps.min()) / width), return_inverse=True)[1]
    count = np.bincount(part)
    steps, values = np.bincount(part, steps) / count, np.bincount(part, values) / count
    window = np.ones(max(1, round(share * len(steps))))
    return steps, np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


# --- the page -----------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path) -> Path:
    """Draw a run's curves and write its page, `index.html`, from what its folder holds so far.

    The page stands alone: it loads nothing but the folder's own pictures, by relative links. It says which
    parts are not there yet. Each file is replaced in one step, so a reader never meets half of one.

    Args:
        run_dir: the folder of one run, such as `runs/demo`; the module's docstring says what may be in it.

    Returns:
        The path of the page.

    Raises:
        ValueError: it is no folder, there is nothing of a run in it, or its report.json is none that a run writes.
        WriteError: the page or a picture cannot be written.
    """
    run = Path(run_dir)
    pictures = [path for path in run.glob("images/*.png") if not path.name.startswith("curves_")]
    known = [run / name for name in ("config.yaml", "metrics.jsonl", "report.json")]
    if not pictures and not any(path.is_file() for path in known):
        inside = sorted(path.name for path in run.iterdir())[:8] if run.is_dir() else ["no such folder"]
        raise ValueError(
            f"{run} is not the folder of a run: found {', '.join(inside) or 'nothing in it'}, expected"
            " config.yaml, metrics.jsonl, report.json or images/*.png; pass a folder that"
            " python -m srpkd.train wrote, runs/<name>"
        )
    config, metrics_file = (path if path.is_file() else None for path in known[:2])
    report, problem = _read_report(known[2])
    try:
        content = {
            "elapsed": _duration(report.get("elapsed_seconds")),
            "environment": dict(report.get("environment") or {}),
            "table": _layout(report.get("table") or {}),
            "samples": _grid(run, report.get("samples") or [], "images"),
            "relations": _grid(run, report.get("relations") or [], "panels"),
            "files": [_file(run, entry) for entry in report.get("files") or []],
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{known[2]} is not what a run writes ({type(error).__name__}: {error}): mend it, or move it away, and the "
            "page is made of the rest"
        ) from error
    metrics = _read_metrics(metrics_file) if metrics_file else _Metrics({}, Counter(), None, [])
    curves = _draw_curves(metrics, run / "images")
    # select_autoescape goes by the file's ending and would leave .j2 unescaped
    templates = Environment(loader=PackageLoader("srpkd"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = templates.get_template("index.html.j2").render(
        run=run.resolve().name,
        report=report,
        problem=problem,
        curves=[(name, _link(path.relative_to(run))) for name, path in curves],
        metrics=metrics,
        config=config.read_text(encoding="utf-8", errors="replace") if config else "",
        pictures_found=len(pictures),
        page_width=PAGE_WIDTH,
        **content,
    )
    return _write(run / "index.html", page.encode("utf-8", errors="replace"))


def _read_report(path: Path) -> tuple[dict[str, Any], str]:
    """The report, empty where there is none, and then why."""
    if not path.is_file():
        return {}, "report.json is not there yet."
    try:
        report = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        return {}, f"report.json cannot be read: {error}."
    if not isinstance(report, dict):
        return {}, f"report.json cannot be read: expected an object, got {type(report).__name__}."
    return report, ""


def _grid(run: Path, items: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Samples or relations as a table of pictures: a row per item, a column per label as first seen."""
    labels = list(dict.fromkeys(entry["label"] for item in items for entry in item.get(key, [])))
    room = PAGE_WIDTH // max(len(labels), 3) - 14  # CSS pixels that a column has on a wide screen
    rows = []
    for item in items:
        files = {entry["label"]: entry["file"] for entry in item.get(key, [])}
        cells = [_picture(run, files[label], room) if label in files else None for label in labels]
        rows.append({"caption": item.get("caption", ""), "cells": cells})
    widest = max((cell["width"] for row in rows for cell in row["cells"] if cell), default=0)
    return {"labels": labels, "rows": rows, "column": max(widest, 120) + 14}


def _picture(run: Path, file: str, room: int) -> dict[str, Any]:
    """How to show a picture; without a width it is not there yet (or only half of it)."""
    try:
        with open_image(run / file) as image:
            width, height = image.size
    except DataError:
        return {"link": _link(file), "width": 0}
    # a whole multiple, so that all pixels are the same size
    scale = max(1, room // width) if width < SMALL_IMAGE else min(1.0, room / width)
    return {
        "link": _link(file),
        "width": round(width * scale),
        "height": round(height * scale),
        "small": width < SMALL_IMAGE,
    }


def _file(run: Path, entry: dict[str, str]) -> dict[str, str]:
    link = _link(entry["file"]) if (run / entry["file"]).exists() else ""
    return {"label": entry.get("label") or entry["file"], "name": entry["file"], "link": link}


def _link(file: str | Path) -> str:
    """A relative link: with its colon quoted, no name of a file is read as a scheme such as javascript:."""
    return quote(Path(file).as_posix())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _write(path: Path, content: bytes) -> Path:
    with atomic_write(path) as file:
        file.write(content)
    return path


def overview(run_dir: str | Path, path: str | Path, samples: int = 3, relations: int = 2) -> Path:
    """Paint a run's first sample rows and relation rows into one PNG, for a README or a slide.

    Raises:
        ValueError: the run has no pictures yet.
    """
    run = Path(run_dir)
    report, _ = _read_report(run / "report.json")
    rows = [entry["images"] for entry in report.get("samples", [])[:samples]]
    rows += [entry["panels"] for entry in report.get("relations", [])[:relations]]
    if not rows:
        raise ValueError(f"{run}: report.json names no pictures yet; expected samples or relations")
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.5 * columns, 1.65 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, panels in zip(axes, rows):
        for axis in line:
            axis.set_axis_off()
        for axis, panel in zip(line, panels):
            with open_image(run / panel["file"]) as image:
                axis.imshow(np.asarray(image), interpolation="nearest")
            axis.set_title(panel["label"], fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return _write(Path(path), png.getvalue())


def between_markers(file: Path, name: str) -> str:
    """What stands between a file's markers, the lines ``<!-- NAME: begin ... -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: it has no such markers.
    """
    return _marked(file, name)[2]


def put_between_markers(file: Path, name: str, text: str) -> None:
    """Replace it by other lines; as `between_markers`."""
    whole, begin, old, end = _marked(file, name)
    _write(file, whole.replace(begin + old + end, f"{begin}{text}\n{end}", 1).encode())


def _marked(file: Path, name: str) -> tuple[str, str, str, str]:
    """A file's text, and of it the opening marker's line, what comes before the closing marker, and that marker."""
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"(<!-- {name}: begin[^\n]*\n)(.*?)(<!-- {name}: end -->)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{file}: expected the markers <!-- {name}: begin --> and <!-- {name}: end -->")
    return text, *found.groups()


def update_readme(run_dir: str | Path, readme: str | Path) -> None:
    """Put a run's table between a README's markers, its overview and the table's numbers into `docs/` beside it.

    Raises:
        ValueError: the README has no such markers, or the run no table yet.
    """
    run, readme = Path(run_dir), Path(readme)
    between_markers(readme, "demo table")  # before anything is written
    report, _ = _read_report(run / "report.json")
    if not report.get("table"):
        raise ValueError(f"{run}: report.json has no table yet: expected a run that has measured a network")
    overview(run, readme.parent / "docs" / "demo.png")
    kept = {key: report.get(key) for key in ("command", "environment", "elapsed_seconds", "table")}
    _write(readme.parent / "docs" / "demo.json", json.dumps(kept, indent=1).encode())
    put_between_markers(readme, "demo table", format_table(report["table"], markdown=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m srpkd.report RUN_DIR`: write the page again and print its path."""
    parser = argparse.ArgumentParser(prog="python -m srpkd.report", description="Write a run's index.html again.")
    parser.add_argument("run_dir", help="the run's folder, such as runs/demo")
    parser.add_argument("--overview", metavar="PNG", help="also paint samples and relations into one picture")
    parser.add_argument("--readme", metavar="FILE", help="also put the table and that picture into a README")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_dir))
        if options.overview:
            print(overview(options.run_dir, options.overview))
        if options.readme:
            update_readme(options.run_dir, options.readme)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
