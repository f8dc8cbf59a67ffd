"""Curves of a run's metrics."""

import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..files import write_file

CURVE_POINTS = 1000  # about as many as a curve has pixels
NOT_A_VALUE = {"stage", "step", "epoch", "seconds"}  # keys of metrics.jsonl that say when, not what
# grey for the first, as a rule the teacher; then colours that the colour-blind tell apart (Okabe and Ito)
VARIANT_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")


# --- the curves ---------------------------------------------------------------------------------------------


class Metrics(NamedTuple):
    """What metrics.jsonl holds, by value and stage."""

    series: dict[str, dict[str, np.ndarray]]  # value -> stage -> (2, n), ascending steps and values
    lines: Counter[str]  # stage -> lines
    last: tuple[str, float] | None  # the stage and step of the last line
    remarks: list[str]  # what the curves do not show


def read_metrics(path: Path) -> Metrics:
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
    return Metrics(series, lines, last, remarks)


def draw_curves(metrics: Metrics, folder: Path) -> list[tuple[str, Path]]:
    """One PNG per value; what is measured now and then (mIoU, ...) comes before the losses of every step.

    What no stage measured twice makes no curve: it stands in the table.
    """
    variants = dict.fromkeys(map(variant_of, metrics.lines))
    colours = {variant: VARIANT_COLOURS[i % len(VARIANT_COLOURS)] for i, variant in enumerate(variants)}

    def is_sparse(stages: dict[str, np.ndarray]) -> bool:
        return 4 * sum(points.shape[1] for points in stages.values()) < sum(metrics.lines[s] for s in stages)

    drawn = []
    series = {name: st for name, st in metrics.series.items() if any(points.shape[1] > 1 for points in st.values())}
    for name, stages in sorted(series.items(), key=lambda item: not is_sparse(item[1])):
        path = folder / f"curves_{re.sub(r'[^A-Za-z0-9_.+-]+', '-', name)}.png"
        png = io.BytesIO()
        _curve(name, stages, colours, is_sparse(stages)).savefig(png, format="png", dpi=160)
        drawn.append((name, write_file(path, png.getvalue())))
    return drawn


def variant_of(stage: str) -> str:
    """The variant that a stage is one run of: "srp" for "srp seed 0"."""
    return re.sub(r"\s+seed\s*\d+$", "", stage)


def _curve(name: str, stages: dict[str, np.ndarray], colours: dict[str, str], sparse: bool) -> Figure:
    """Every stage's raw values, faint, and over them each variant's mean over its seeds, smoothed."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    variants: dict[str, list[np.ndarray]] = {}
    faint = 0.4 if sparse else 0.3 / math.sqrt(len(stages))  # many seeds would make a haze that hides the means
    for stage, points in stages.items():
        variants.setdefault(variant_of(stage), []).append(points)
        steps, values = points[:, :: math.ceil(points.shape[1] / CURVE_POINTS)]
        axes.plot(steps, values, color=colours[variant_of(stage)], alpha=faint, linewidth=0.7)
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
    lengths = [max(points[0, -1] for points in seeds) for seeds in variants.values()]
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
