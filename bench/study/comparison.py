"""Paired differences with confidence intervals, and how they are shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from srpkd.extras import require
from srpkd.reporting.figures import VARIANT_COLOURS


class Difference(NamedTuple):
    """The mean of paired differences and its 95 % confidence interval, NaN for a single pair."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "too few pairs to tell"
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})")


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return the mean of `scores` - `baseline` with a Student's t interval, which assumes normal differences.

    Args:
        scores, baseline: one score per pair, for the same data sets and seeds in the same order.

    Raises:
        ValueError: The lengths differ.
        ImportError: scipy is missing.
    """
    gains = [ours - theirs for ours, theirs in zip(scores, baseline, strict=True)]
    mean, count = statistics.fmean(gains), len(gains)
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    stats = require("scipy.stats", "study", "a confidence interval")
    margin = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(gains) / math.sqrt(count)
    return Difference(mean, mean - margin, mean + margin)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the mean and, of several values, the standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def describe_difference(scores: Sequence[float], baseline: Sequence[float]) -> str:
    """Return the mean difference, the number of pairs in which `scores` are better, and the verdict, in Markdown."""
    gain, wins = paired_difference(scores, baseline), sum(ours > theirs for ours, theirs in zip(scores, baseline))
    return f"{gain}, better on {wins} of {len(scores)}: **{gain.verdict}**"


def draw_differences(axes: Axes, scores: Sequence[Sequence[float] | None], baseline: Sequence[float]) -> None:
    """Draw a line of differences for each variant: a dot per pair, and the mean with its interval.

    Args:
        scores: of the variants, from y = 0 on; None leaves a line empty.
        baseline: scores of the variant that they are compared with.
    """
    for y, (own, colour) in enumerate(zip(scores, VARIANT_COLOURS[1:])):
        if own is None:
            continue
        axes.plot([a - b for a, b in zip(own, baseline)], [y] * len(own), "o", color=colour, alpha=0.3, markersize=4)
        gain = paired_difference(own, baseline)
        margin = 0.0 if math.isnan(gain.low) else gain.high - gain.mean
        axes.errorbar(gain.mean, y, xerr=margin, fmt="D", color=colour, capsize=4, markersize=6)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
