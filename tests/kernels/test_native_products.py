"""``native`` on the CPU: long and empty sums, numbers below the normal range, and the products of other libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compile_once import compile_once
from helpers import error, features, value_and_gradient
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from srpkd.kernels import Relation, native


@pytest.fixture(autouse=True)
def _built(one_thread: None) -> None:
    if (reason := native.unavailable_reason(torch.device("cpu"))) is not None:
        pytest.skip(f"native: {reason}")
    native.extension()



@pytest.mark.parametrize("shape", [(0, 9, 3), (2, 0, 3), (2, 9, 0)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_empty_features_in_tiles(shape: tuple[int, int, int], swapped: bool) -> None:
    student, teacher = torch.ones(shape), torch.ones(*shape[:2], 4)
    if swapped:
        student, teacher = teacher, student
    results = [torch.ops.srpkd.relation_tiles(student, teacher, None, None, "none", "l1", 1.0, False, True)]
    if shape[0] and shape[1]:
        pixels, index = [student, teacher], torch.arange(9).expand(2, 1, 9)
        results.append(torch.ops.srpkd.indexed_tiles(pixels, pixels, index, "none", "l1", 1.0, False, True, True))
    for loss, U, _ in results:
        assert torch.equal(loss, torch.zeros(shape[0], dtype=torch.float64))
        assert torch.equal(U, torch.zeros_like(student))

