"""Paired differences."""

from __future__ import annotations

import math

import pytest

from bench.study.comparison import paired_difference

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


def test_interval_is_students_t():
    scores, baseline = [3.0, 5.5, 4.0, 7.0], [2.0, 5.0, 4.5, 4.0]
    found = paired_difference(scores, baseline)
    expected = scipy_stats.ttest_rel(scores, baseline).confidence_interval(0.95)
    assert found.mean == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "no difference shown"
    assert paired_difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).verdict == "helped"
    assert paired_difference([1.0, 1.0, 1.0], [2.0, 2.1, 1.9]).verdict == "hurt"
    assert str(paired_difference([2.0, 4.0], [1.0, 1.0])) == "+2.00 (-10.71 to +14.71)"


def test_single_pair_has_no_interval():
    found = paired_difference([5.0], [1.0])
    assert found.mean == 4.0 and math.isnan(found.low) and math.isnan(found.high)
    assert found.verdict == "too few pairs to tell" and str(found) == "+4.00"
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])
