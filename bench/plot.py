"""Log-log plots of the recorded time and memory against N, one PNG per device and relation, beside the CSV."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from srpkd.checking.kernels import CUDA_KERNELS
from srpkd.files import write_file
from srpkd.reporting.figures import style_axes, to_png

from . import relation, results
from .providers import PROVIDERS
from .results import Row, number

# colour-blind safe (Okabe and Ito, 2008); providers that materialise N x N arrays are dashed
COLOURS = ("#555555", "#E69F00", "#F0E442", "#CC79A7", "#56B4E9", "#999999", "#0072B2", "#000000", "#009E73", "#D55E00")
MARKERS = "osvP*XD<^h"
STYLES: dict[str, dict[str, Any]] = {
    name: {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": "--" if name in ("eager", "reference") else ":" if name in CUDA_KERNELS else "-",
    }
    for i, name in enumerate(PROVIDERS)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results.add_csv(parser, relation.RESULTS, relation.COLUMNS)


def run(options: argparse.Namespace) -> None:
    """Draw the plots for which at least three sizes are recorded."""
    drawn = draw_relation(results.read(options.csv), options.csv.parent)
    if not drawn:
        raise ValueError(f"{options.csv}: no case is recorded for three sizes: run python -m bench relation first")
    print(*drawn, sep="\n")


def draw_relation(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plot time and memory against N for all cases with at least three recorded sizes, and return the paths."""
    fixed = [name for name in relation.KEY if name not in ("provider", "pixels")]
    drawn = []
    for values, group in results.group_by(rows, fixed).items():
        if len({row["pixels"] for row in group if row["median_s"]}) < 3:
            continue
        case, on_cpu = dict(zip(fixed, values)), group[0]["device_type"] == "cpu"
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        _draw_group(time, memory, group)
        figure.suptitle(_title(case, on_cpu), fontsize=10)
        _legend(figure, (time, memory))
        name = "_".join(value for column, value in case.items() if column != "threads" or on_cpu)
        drawn.append(_save(figure, folder, f"relation_{name}"))
    return drawn


def _draw_group(time: Axes, memory: Axes, rows: Sequence[Row]) -> None:
    """Plot a line per provider, and the roofline."""
    for name in PROVIDERS:
        own = sorted((row for row in rows if row["provider"] == name), key=lambda row: int(row["pixels"]))
        _line(time, name, own, "median_s", 1e3, ("p20_s", "p80_s"))
        _line(memory, name, own, "peak_extra_bytes", 1e-6)
        # hollow markers: the memory that a provider needs, where it ran out of memory
        failed = [row for row in own if row["status"] == "out of memory"]
        _line(memory, name, failed, "needed_bytes", 1e-6, label="_", linestyle="", fillstyle="none", markersize=8)
    roofline: dict[int, float] = {}
    for row in rows:  # the minimum is from the measurement on the least busy machine
        pixels, seconds = int(row["pixels"]), max(float(row["roofline_matmul_s"]), float(row["roofline_copy_s"]))
        roofline[pixels] = min(seconds, roofline.get(pixels, seconds))
    sizes = sorted(roofline)
    limits = [1e3 * roofline[size] for size in sizes]
    time.plot(sizes, limits, color="#000000", linewidth=0.9, linestyle=":", label="roofline")
    _log_log(time, sizes, "time, ms (median; bars: 20th to 80th percentile)")
    _log_log(memory, sizes, "peak memory in addition to the inputs, MB")


def _title(case: dict[str, str], on_cpu: bool) -> str:
    precision = f" ({case['precision']})" if case["dtype"] == "float32" and case["precision"] != "highest" else ""
    threads = f", {case['threads']} threads" if on_cpu else ""
    return (
        f"{case['normalize']}, {case['distance']}, {case['mode']}: {case['dtype']}{precision}, B = {case['batch']}, "
        f"C = {case['channels']}\n{case['device']}{threads}"
    )


def draw_accuracy(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Plot the errors of loss and gradient against the noise, per device and relation, and return the paths."""
    fixed = ("normalize", "distance", "pixels", "channels", "device")
    drawn = []
    for values, group in results.group_by(rows, fixed).items():
        normalize, distance, pixels, channels, device = values
        formats = results.group_by(group, ("dtype", "precision"))
        figure = Figure(figsize=(1.2 + 3.1 * len(formats), 6.4), layout="constrained")
        panels = figure.subplots(2, len(formats), squeeze=False, sharex=True, sharey="row")
        for column, ((dtype, precision), own) in enumerate(formats.items()):
            for axes, error in zip(panels[:, column], ("gradient_error", "loss_error")):
                _draw_errors(axes, own, error)
            panels[0, column].axhline(0.1, color="#000000", linewidth=0.8, linestyle=":", label="10 %")
            panels[0, column].set_title(f"{dtype}" + (f", {precision}" if dtype == "float32" else ""), fontsize=10)
            panels[1, column].set_xlabel("noise: student = teacher + noise", fontsize=9)
            panels[1, column].invert_xaxis()
        panels[0, 0].set_ylabel("relative error of the gradient", fontsize=9)
        panels[1, 0].set_ylabel("relative error of the loss", fontsize=9)
        figure.suptitle(
            f"{normalize}, {distance}, N = {pixels}, C = {channels}: error against float64\n{device}", fontsize=10
        )
        _legend(figure, panels.flat)
        drawn.append(_save(figure, folder, "_".join(("accuracy", *values))))
    return drawn


def _draw_errors(axes: Axes, rows: Sequence[Row], column: str) -> None:
    for i, ((name,), own) in enumerate(results.group_by(rows, ["provider"]).items()):
        points = sorted((float(row["noise"]), float(row[column])) for row in own)
        noise = [x for x, _ in points]
        errors = [max(error, 1e-17) for _, error in points]  # an exact 0 has no logarithm
        width = 3.2 - 0.5 * min(i, 4)  # earlier lines are wider, so that coinciding lines are visible
        axes.plot(noise, errors, **STYLES[name], label=name, linewidth=width, markersize=4, alpha=0.85)
    axes.set(xscale="log", yscale="log")
    style_axes(axes)


def _line(
    axes: Axes, name: str, rows: Sequence[Row], column: str, scale: float, bars: Sequence[str] = (), **style: Any
) -> None:
    """Plot a column of the rows that have it, with bars between two other columns."""
    rows = [row for row in rows if number(row, column)]
    sizes = [int(row["pixels"]) for row in rows]
    values, *ends = (np.array([scale * float(row[one]) for row in rows]) for one in (column, *bars))
    if rows:
        axes.plot(sizes, values, **(STYLES[name] | {"label": name, "linewidth": 1.5, "markersize": 5} | style))
    if ends:
        axes.vlines(sizes, ends[0], ends[1], color=STYLES[name]["color"], linewidth=1)


def _log_log(axes: Axes, sizes: Sequence[int], y: str) -> None:
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator(), minor_formatter=NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("pixels N", fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    style_axes(axes)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)


def _save(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
    return write_file(path, to_png(figure, dpi=130))
