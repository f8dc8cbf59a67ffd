"""Paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from srpkd.extras import require


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
