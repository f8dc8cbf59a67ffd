"""Log-log plots of recorded results, a PNG for each device and relation: time and memory against N, and errors.

python -m bench plot                                 beside relation.csv and accuracy.csv
python -m bench plot --page docs/benchmarks.md       in docs/benchmarks/, with images between the page's markers
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from srpkd.checking.kernels import CUDA_KERNELS
from srpkd.files import expand_user, write_file
from srpkd.reporting.figures import style_axes, to_png

from . import accuracy, relation, results, table
from .markers import put_between_markers
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


NAME = "bench plot"  # in the page's markers
# columns of the CSV whose values together are one plot
OF_RELATION = tuple(name for name in relation.KEY if name not in ("provider", "pixels"))
OF_ACCURACY = ("normalize", "distance", "pixels", "channels", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results.add_csv(parser, relation.RESULTS, relation.COLUMNS)
    parser.add_argument(
        "--page",
        type=expand_user,
        metavar="FILE",
        help="write the plots into the folder of this page's name, and images between its markers",
    )


def run(options: argparse.Namespace) -> None:
    """Draw the relations for which at least three sizes are recorded, and all errors."""
    plots = recorded_plots(results.read(options.csv), results.read(options.csv.with_name(accuracy.RESULTS.name)))
    if options.page is not None:
        plots = for_docs(plots)
    if not plots:
        raise ValueError(f"{options.csv}: no case is recorded for three sizes: run python -m bench relation first")
    folder = options.csv.parent if options.page is None else options.page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for plot in plots:
        path = write_file(folder / plot.file, to_png(plot.draw(plot), dpi=150))
        print(path)
    if options.page is not None:
        put_between_markers(options.page, NAME, images(plots, folder.name))


class Plot(NamedTuple):
    """The rows of a plot, its two lines of title, and the function that draws it."""

    file: str
    title: str
    rows: Sequence[Row]
    draw: Callable[[Plot], Figure]


def recorded_plots(rows: Sequence[Row], accuracy_rows: Sequence[Row]) -> list[Plot]:
    """Return the plots of all cases with at least three recorded sizes, and of all errors."""
    plots = []
    for values, group in results.group_by(rows, OF_RELATION).items():
        if len({row["pixels"] for row in group if row["median_s"]}) >= 3:
            case, on_cpu = dict(zip(OF_RELATION, values)), group[0]["device_type"] == "cpu"
            name = "_".join(value for column, value in case.items() if column != "threads" or on_cpu)
            plots.append(Plot(_file(f"relation_{name}"), _title(case, on_cpu), group, _draw_relation))
    for values, group in results.group_by(accuracy_rows, OF_ACCURACY).items():
        normalize, distance, pixels, channels, device = values
        title = f"{normalize}, {distance}, N = {pixels}, C = {channels}: error against float64\n{device}"
        plots.append(Plot(_file("_".join(("accuracy", *values))), title, group, _draw_accuracy))
    return plots


def for_docs(plots: Sequence[Plot]) -> list[Plot]:
    """Return the plots that contain a case of the tables, and those of errors."""

    def in_table(row: Row) -> bool:
        shown = (case.columns() | {"threads": row["threads"]} for case in table.SHOWN[row["device_type"]])
        return any(all(row[name] == str(value) for name, value in case.items()) for case in shown)

    return [plot for plot in plots if "device_type" not in plot.rows[0] or any(map(in_table, plot.rows))]


def images(plots: Sequence[Plot], folder: str) -> str:
    """Return the plots as images in Markdown; the title is the text for those who do not see them."""
    return "\n\n".join(f"![{plot.title.replace(chr(10), '; ')}]({folder}/{plot.file})" for plot in plots)


def _draw_relation(plot: Plot) -> Figure:
    """Plot time and memory against N."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    _draw_group(time, memory, plot.rows)
    figure.suptitle(plot.title, fontsize=10)
    _legend(figure, (time, memory))
    return figure


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


def _draw_accuracy(plot: Plot) -> Figure:
    """Plot the errors of loss and gradient against the noise, a column per dtype and precision."""
    formats = results.group_by(plot.rows, ("dtype", "precision"))
    figure = Figure(figsize=(0.8 + 2.6 * len(formats), 5.8), layout="constrained")
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
    figure.suptitle(plot.title, fontsize=10)
    _legend(figure, panels.flat)
    return figure


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


def _file(name: str) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
