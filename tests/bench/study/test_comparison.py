"""Paired differences."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from bench.study.comparison import describe_difference, draw_differences, mean_and_deviation, paired_difference

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


def test_descriptions():
    assert mean_and_deviation([2.0], 1) == "2.0" and mean_and_deviation([1.0, 4.0], 2) == "2.50 ± 2.12"
    text = describe_difference([2.0, 4.0, 1.0], [1.0, 4.0, 2.0])
    assert text == "+0.00 (-2.48 to +2.48), better on 1 of 3: **no difference shown**", "a tie is not better"


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_plot_has_the_differences_and_their_interval(pairs):
    scores, baseline = [3.0, 5.5, 4.0][:pairs], [2.0, 5.0, 4.5][:pairs]
    axes = Figure().subplots()
    draw_differences(axes, [None, scores], baseline)
    dots, mean = axes.lines[:2]
    assert list(dots.get_xdata()) == [1.0, 0.5, -0.5][:pairs] and list(dots.get_ydata()) == [1] * pairs
    gain = paired_difference(scores, baseline)
    assert (*mean.get_xdata(), *mean.get_ydata()) == (gain.mean, 1)
    (interval,) = axes.collections[0].get_segments()
    expected = (gain.low, gain.high) if pairs > 1 else (gain.mean, gain.mean)
    assert tuple(interval[:, 0]) == pytest.approx(expected)
