"""Paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from srpkd.extras import require


class Difference(NamedTuple):
    """Mean of paired differences, and the 95 % confidence interval of it."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "too few pairs to say"
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How much better `ours` are than `theirs`, scores of the same worlds and seeds in the same order.

    The interval is Student's t: it holds for differences that scatter about normally. Of one pair there is none (NaN).

    Raises:
        ValueError: they are not as many.
        ImportError: scipy is missing.
    """
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(gains), len(gains)
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    stats = require("scipy.stats", "study", "a confidence interval")
    reach = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(gains) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach)
