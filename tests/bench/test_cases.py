"""Benchmark cases."""

from __future__ import annotations

import argparse

import pytest

from bench import cases
from srpkd.checking.cases import PRECISIONS, Case
from srpkd.kernels import DISTANCES, NORMALIZATIONS


def test_sweep_has_no_duplicates_and_options_replace_axes():
    full = cases.sweep("full", "cpu", {})
    assert len(full) == len(set(full))
    assert {case.pixels for case in full} == set(cases.PIXELS)
    assert {(case.normalize, case.distance) for case in full} == {(n, d) for n in NORMALIZATIONS for d in DISTANCES}
    assert {case.precision for case in full} == {"highest"}
    assert {case.precision for case in cases.sweep("full", "cuda", {})} == set(PRECISIONS)
    one = cases.sweep("full", "cpu", {"pixels": (7,), "channels": ((2, 3),), "normalize": ("none",)})
    assert {(case.pixels, case.channels, case.normalize) for case in one} == {(7, (2, 3), "none")}


def test_minimum_operations_and_bytes():
    pixels, (student, teacher) = 8, (3, 5)
    case = Case(pixels=pixels, channels=(student, teacher), batch=2)
    gram = 2 * pixels**2 * (student + teacher) // 2  # a symmetric matrix: half of it
    assert case.operations == 2 * (gram + 2 * pixels**2 * student)
    assert Case(pixels=pixels, channels=(student, teacher), batch=2, mode="forward").operations == 2 * gram
    assert case.bytes_moved == 2 * pixels * (student + teacher + student) * 4
    assert Case(distance="l2").operations < Case().operations / 10


@pytest.mark.parametrize("text", ["64", "64/", "a/b", "0/4"])
def test_channels_are_a_pair(text):
    with pytest.raises(argparse.ArgumentTypeError, match="64/256"):
        cases.parse_channels(text)
