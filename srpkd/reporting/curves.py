"""Curves of a run's metrics."""

import json
import math
import re
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ..files import write_file
from .figures import VARIANT_COLOURS, style_axes, to_png

CURVE_POINTS = 1000  # about the width of a curve in pixels
PROGRESS_KEYS = {"stage", "step", "epoch", "seconds"}  # keys of metrics.jsonl that are not metrics


class Metrics(NamedTuple):
    """The contents of metrics.jsonl.

    Attributes:
        series: metric -> stage -> array (2, n) of ascending steps and finite values.
        lines: stage -> number of lines.
        last: stage and step of the last line.
        remarks: sentences about values and lines that the curves omit.
    """

    series: dict[str, dict[str, np.ndarray]]
    lines: Counter[str]
    last: tuple[str, float] | None
    remarks: list[str]


class MetricsReader:
    """Reads metrics.jsonl while a run writes it: each line once, however often the page is written.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # in the file, in bytes
        self._collected: dict[str, dict[str, array[float]]] = {}  # step, value, step, value, ...
        self._lines: Counter[str] = Counter()
        self._last: tuple[str, float] | None = None
        self._unreadable = 0

    def read(self) -> Metrics:
        """Return the metrics so far; lines that cannot be parsed and values that are not finite become remarks."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._position)
                for line in file:
                    self._read_line(line)
        return self._metrics()

    def _read_line(self, line: bytes) -> None:
        try:
            entry = json.loads(line.decode("utf-8", errors="replace"))
            last = stage, step = str(entry["stage"]), float(entry["step"])
            values = {n: float(v) for n, v in entry.items() if n not in PROGRESS_KEYS and isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError, OverflowError):
            # only the last line can lack a newline: it is being written, or the run was killed
            if line.endswith(b"\n"):
                self._position += len(line)
                self._unreadable += not line.isspace()
            return
        self._position += len(line)
        self._last = last
        self._lines[stage] += 1
        for name, value in values.items():
            self._collected.setdefault(name, {}).setdefault(stage, array("d")).extend((step, value))

    def _metrics(self) -> Metrics:
        remarks = [f"Invalid lines in {self.path.name}: {self._unreadable:,}."] if self._unreadable else []
        series: dict[str, dict[str, np.ndarray]] = {}
        for name, stages in self._collected.items():
            for stage, pairs in stages.items():
                points = np.array(pairs).reshape(-1, 2).T  # a copy: an array that shares its memory cannot grow
                points = points[:, np.argsort(points[0], kind="stable")]  # a resumed run repeats steps
                finite = np.isfinite(points[0]) & np.isfinite(points[1])
                if not finite.all():
                    remarks.append(
                        f"{name} of {stage} is not finite at {(~finite).sum():,} of {len(finite):,} points, first at"
                        f" step {points[0, ~finite][0]:,.0f}; the curve omits these points."
                    )
                if finite.any():
                    series.setdefault(name, {})[stage] = points[:, finite]
        return Metrics(series, self._lines.copy(), self._last, remarks)


def draw_curves(metrics: Metrics, folder: Path) -> list[tuple[str, Path]]:
    """Write one PNG per metric and return (metric, path) pairs.

    Metrics that are measured occasionally, such as mIoU, come before the losses of every step. A metric that no stage
    measured twice has no curve.
    """
    variants = dict.fromkeys(map(variant_of, metrics.lines))
    colours = {variant: VARIANT_COLOURS[i % len(VARIANT_COLOURS)] for i, variant in enumerate(variants)}

    def is_sparse(stages: dict[str, np.ndarray]) -> bool:
        return 4 * sum(points.shape[1] for points in stages.values()) < sum(metrics.lines[s] for s in stages)

    drawn = []
    series = {name: st for name, st in metrics.series.items() if any(points.shape[1] > 1 for points in st.values())}
    for name, stages in sorted(series.items(), key=lambda item: not is_sparse(item[1])):
        path = folder / f"curves_{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}.png"
        figure = _curve(name, stages, colours, is_sparse(stages))
        drawn.append((name, write_file(path, to_png(figure, dpi=160), "content")))
    return drawn


def variant_of(stage: str) -> str:
    """Return the variant of a stage, such as "srp" for "srp seed 0"."""
    return re.sub(r"\s+seed\s*\d+$", "", stage)


def _curve(name: str, stages: dict[str, np.ndarray], colours: dict[str, str], sparse: bool) -> Figure:
    """Plot the raw values of every stage, faint, and the mean of each variant over its seeds, bold and smoothed."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    variants: dict[str, list[np.ndarray]] = {}
    alpha = 0.4 if sparse else 0.3 / math.sqrt(len(stages))  # keeps the means visible among many seeds
    for stage, points in stages.items():
        variants.setdefault(variant_of(stage), []).append(points)
        steps, values = points[:, :: math.ceil(points.shape[1] / CURVE_POINTS)]
        axes.plot(steps, values, color=colours[variant_of(stage)], alpha=alpha, linewidth=0.7)
    for variant, seeds in variants.items():
        steps, values = _smooth(np.concatenate(seeds, axis=1), share=0.0 if sparse else 0.05)
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, values, color=colours[variant], label=variant, linewidth=1.7, marker=marker, markersize=3)

    values = np.concatenate([points[1] for points in stages.values()])
    low, high = np.quantile(values, [0.01, 0.99])
    if not sparse and values.min() > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set(major_formatter=StrMethodFormatter("{x:g}"), minor_formatter=NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    lengths = [max(points[0, -1] for points in seeds) for seeds in variants.values()]
    # keeps the curves of short stages readable beside a teacher that trained for much longer
    if max(lengths) > 4 * min(lengths) > 40:
        axes.set_xscale("log")
        first = min(points[0, 0] for points in stages.values())
        axes.set_xlim(left=max(0.9 * first, min(lengths) / 50))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set(major_formatter=StrMethodFormatter("{x:,.0f}"), minor_formatter=NullFormatter())

    # a dollar sign in a name must not start a formula
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel("step", fontsize=9, color="#555555")
    style_axes(axes)
    axes.tick_params(colors="#555555")
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    legend = figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.4)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _smooth(points: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Average the values in at most CURVE_POINTS bins of equal width, then apply a centred moving average.

    Args:
        points: (2, n), steps and values of several seeds, in any order.
        share: window of the moving average, as a share of the bins; 0 disables it.

    Returns:
        Mean steps and mean values of the bins.
    """
    steps, values = points
    width = np.ptp(steps) / CURVE_POINTS or 1.0
    bins = np.unique(np.floor((steps - steps.min()) / width), return_inverse=True)[1]
    count = np.bincount(bins)
    steps, values = np.bincount(bins, steps) / count, np.bincount(bins, values) / count
    window = np.ones(max(1, round(share * len(steps))))
    return steps, np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
