"""Benchmark cases."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from bench import cases
from srpkd.checking.cases import PRECISIONS, Case, features, settings
from srpkd.checking.gate import relation_rows
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
    assert cases.operations(case) == 2 * (gram + 2 * pixels**2 * student)
    assert cases.operations(replace(case, mode="forward")) == 2 * gram
    assert cases.bytes_moved(case) == 2 * pixels * (student + teacher + student) * 4
    assert cases.matrix_bytes(case) == 2 * pixels**2 * 4
    assert cases.operations(Case(distance="l2")) < cases.operations(Case()) / 10


def test_minimum_operations_of_l2():
    """Half of the Gram matrix of both networks' channels, and products with two of its blocks; or the tiles, if fewer.

    A minimum that counts the symmetric matrix twice, or the moments of 256 channels for 256 pixels, is not one: the
    backends were measured at up to 2.6 times of it.
    """
    student, teacher = 3, 5
    for normalize in NORMALIZATIONS:
        case = Case(pixels=100, channels=(student, teacher), batch=2, normalize=normalize, distance="l2")
        moments = 2 * 100 * (student + teacher) ** 2 // 2
        assert cases.operations(case) == 2 * (moments + 2 * 100 * student * (student + teacher))
        assert cases.operations(replace(case, mode="forward")) == 2 * moments
        few = replace(case, pixels=4)
        assert cases.operations(few) == cases.operations(replace(few, distance="l1"))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_both_parts_of_the_huber_distance_have_pairs(normalize):
    case = Case(pixels=200, normalize=normalize, distance="huber")
    student, teacher = (relation_rows(x, slice(None), case.relation) for x in features(case))
    assert 0.2 < ((student - teacher).abs() < case.relation.delta).float().mean() < 0.8


def test_settings_of_a_case():
    def found():
        return torch.get_num_threads(), torch.get_float32_matmul_precision()

    before = found()
    with settings(Case(threads=before[0] + 1, precision="medium")):
        assert found() == (before[0] + 1, "medium")
    assert found() == before


@pytest.mark.parametrize("text", ["64", "64/", "a/b", "0/4"])
def test_channels_are_a_pair(text):
    with pytest.raises(argparse.ArgumentTypeError, match="64/256"):
        cases.parse_channels(text)
