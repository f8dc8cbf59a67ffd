"""Pictures of recorded time and memory against N, one per device and kind, log-log, as PNG beside the CSV.

python -m bench plot
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from . import relation, results
from .providers import PROVIDERS
from .results import Row, number

# colours that the colour-blind tell apart (Okabe and Ito); grey and dashed is what materialises N x N
COLOURS = ("#555555", "#E69F00", "#F0E442", "#CC79A7", "#56B4E9", "#999999", "#0072B2", "#000000", "#009E73", "#D55E00")
MARKERS = "osvP*XD<^h"
STYLES = {
    name: {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": "--" if name in ("eager", "reference") else "-",
    }
    for i, name in enumerate(PROVIDERS)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=relation.RESULTS, help="%(default)s")


def run(options: argparse.Namespace) -> None:
    """Draw every picture for which three sizes or more are recorded."""
    drawn = draw_relation(results.read(options.csv, relation.KEY), options.csv.parent)
    if not drawn:
        raise ValueError(f"{options.csv} records no three sizes of anything: run python -m bench relation first")
    print(*drawn, sep="\n")


def draw_relation(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time and memory against N, a picture for every kind that was measured at three sizes or more."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    fixed = [name for name in relation.KEY if name not in ("provider", "pixels")]
    for row in rows:
        groups.setdefault(tuple(row[name] for name in fixed), []).append(row)
    drawn = []
    for key, group in groups.items():
        if len({row["pixels"] for row in group if row["median_s"]}) < 3:
            continue
        about, on_cpu = dict(zip(fixed, key)), group[0]["device_type"] == "cpu"
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for name in PROVIDERS:
            own = sorted((row for row in group if row["provider"] == name), key=lambda row: int(row["pixels"]))
            _line(time, name, own, "median_s", 1e3, ("p20_s", "p80_s"))
            _line(memory, name, own, "peak_extra_bytes", 1e-6)
            # what it would have needed, hollow, where it did not run for want of memory
            lacking = [row for row in own if row["status"] == "out of memory" and row["needed_bytes"]]
            if lacking:
                points = [(int(row["pixels"]), number(row, "needed_bytes") * 1e-6) for row in lacking]
                memory.plot(*zip(*points), **STYLES[name] | {"linestyle": ""}, fillstyle="none", markersize=8)
        floor: dict[int, float] = {}
        for row in group:  # of several runs the one that found the machine least busy
            pixels, least = int(row["pixels"]), 1e3 * max(number(row, "floor_matrix_s"), number(row, "floor_copy_s"))
            floor[pixels] = min(least, floor.get(pixels, least))
        time.plot(*zip(*sorted(floor.items())), color="#000000", linewidth=0.9, linestyle=":", label="floor")
        sizes = sorted({int(row["pixels"]) for row in group})
        for axes, label in (
            (time, "time, ms (median; bars: 20th to 80th percentile)"),
            (memory, "peak memory beside the inputs, MB"),
        ):
            _log_log(axes, sizes, "pixels N", label)
        precision = (
            f" ({about['precision']})" if about["dtype"] == "float32" and about["precision"] != "highest" else ""
        )
        figure.suptitle(
            f"{about['normalize']}, {about['distance']}, {about['mode']}: {about['dtype']}{precision}, "
            f"B = {about['batch']}, C = {about['channels']}\n{about['device']}"
            + (f", {about['threads']} threads" if on_cpu else ""),
            fontsize=10,
        )
        _legend(figure, [time, memory])
        name = "_".join(value for part, value in about.items() if part != "threads" or on_cpu)
        drawn.append(_save(figure, folder, f"relation_{name}"))
    return drawn


def draw_accuracy(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Errors of loss and gradient against the noise between student and teacher, a picture per kind and device."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        about = row["device"], row["normalize"], row["distance"], row["pixels"], row["channels"]
        groups.setdefault(about, []).append(row)
    drawn = []
    for (device, normalize, distance, pixels, channels), group in groups.items():
        kinds = list(dict.fromkeys((row["dtype"], row["precision"]) for row in group))
        figure = Figure(figsize=(1.2 + 3.1 * len(kinds), 6.4), layout="constrained")
        panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
        for column, (dtype, precision) in enumerate(kinds):
            own = [row for row in group if (row["dtype"], row["precision"]) == (dtype, precision)]
            for line, (axes, what) in enumerate(zip(panels[:, column], ("gradient_error", "loss_error"))):
                for i, name in enumerate(dict.fromkeys(row["provider"] for row in own)):
                    points = sorted((number(row, "noise"), number(row, what)) for row in own if row["provider"] == name)
                    points = [(noise, max(error, 1e-17)) for noise, error in points]  # an exact 0 has no logarithm
                    # lines that lie upon each other stay visible: the earlier are the wider
                    axes.plot(
                        *zip(*points),
                        **STYLES[name],
                        label=name,
                        linewidth=3.2 - 0.5 * min(i, 4),
                        markersize=4,
                        alpha=0.85,
                    )
                if line == 0:
                    axes.axhline(0.1, color="#000000", linewidth=0.8, linestyle=":", label="10 %")
                axes.set(xscale="log", yscale="log")
                _plain(axes)
            panels[0, column].set_title(f"{dtype}" + (f", {precision}" if dtype == "float32" else ""), fontsize=10)
            panels[1, column].set_xlabel("noise: student = teacher + noise", fontsize=9)
            panels[1, column].invert_xaxis()
        panels[0, 0].set_ylabel("relative error of the gradient", fontsize=9)
        panels[1, 0].set_ylabel("relative error of the loss", fontsize=9)
        figure.suptitle(
            f"{normalize}, {distance}, N = {pixels}, C = {channels}: error against float64\n{device}", fontsize=10
        )
        _legend(figure, panels.flat)
        drawn.append(_save(figure, folder, "_".join(("accuracy", normalize, distance, pixels, channels, device))))
    return drawn


def _line(
    axes: Axes, name: str, rows: list[Row], column: str, scale: float, bars: tuple[str, str] | None = None
) -> None:
    rows = [row for row in rows if number(row, column)]
    if not rows:
        return
    sizes, values = zip(*((int(row["pixels"]), scale * number(row, column)) for row in rows))
    axes.plot(sizes, values, **STYLES[name], label=name, linewidth=1.5, markersize=5)
    if bars:
        low, high = ([scale * number(row, bar) for row in rows] for bar in bars)
        axes.vlines(sizes, low, high, color=STYLES[name]["color"], linewidth=1)


def _log_log(axes: Axes, sizes: list[int], x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator(), minor_formatter=NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(color="#000000", alpha=0.09, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels) -> None:
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)


def _save(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
    figure.savefig(path, dpi=130)
    return path
