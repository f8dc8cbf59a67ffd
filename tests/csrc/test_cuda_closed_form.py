"""The closed form of l2 in csrc/cuda/closed_form, emulated on the CPU, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulated_kernels import draw
from helpers import error
from torch import Tensor

from srpkd.kernels import Relation
from tests.csrc.test_cuda_loss import CASES, REDUCTIONS, Result, emulate, expected_of

COSINE, NONE = Relation("cosine", "l2"), Relation("none", "l2")
# the relative error of the gradient: float32, except for bfloat16 gradients, which have 8 bits
TOLERANCE = {"bf16": 4e-3, "fp16": 1e-6, "highest": 1e-6}

every_relation = pytest.mark.parametrize("relation", [COSINE, NONE], ids=lambda relation: relation.normalize)
every_case = pytest.mark.parametrize("case", TOLERANCE)
every_layout = pytest.mark.parametrize("layout", ["nlc", "nchw"])


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    result = compile_emulation("loss.cpp", "-O1")
    result.relation_loss.restype = ctypes.c_char_p
    return result


def run(library: ctypes.CDLL, student: Tensor, teacher: Tensor, relation: Relation, case: str, **options) -> Result:
    return emulate(library, student, teacher, relation, case, kernels="closed_form", **options)


def check(
    library: ctypes.CDLL, student: Tensor, teacher: Tensor, relation: Relation, case: str, reduction="mean", **options
) -> Result:
    result = run(library, student, teacher, relation, case, reduction=reduction, **options)
    loss, gradient = expected_of(student, teacher, relation, reduction)
    assert error(result.loss, loss) < 1e-6
    if result.gradient is not None:
        assert error(result.gradient, gradient) < TOLERANCE[case]
    return result


def converged(case: str, pixels: int, channels: int, noise: float) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(1, pixels, channels) + 0.5
    student = teacher + noise * torch.randn_like(teacher)
    return student.to(CASES[case][0]), teacher.to(CASES[case][0])


@pytest.mark.parametrize("channels", [(5, 7), (72, 72)], ids=str)
@every_layout
@every_case
def test_constant_norms(library: ctypes.CDLL, case: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(CASES[case][0], 2, 75, channels, layout)
    student[:, 3] = teacher[:, 7] = student[:, 70] = teacher[:, 70] = 0
    check(library, student, teacher, replace(COSINE, detach_norms=True), case)


# equal channels use the difference form; incomplete and several blocks
@pytest.mark.parametrize("channels", [(5, 7), (7, 7), (70, 130), (130, 70), (72, 72)], ids=str)
@every_layout
@every_case
@every_relation
def test_values(library: ctypes.CDLL, relation: Relation, case: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(CASES[case][0], 1, 75, channels, layout)
    if case == "highest":  # float32 features that need three terms
        student, teacher = (x + 2**-12 * torch.randn_like(x) for x in (student, teacher))
    result = check(library, student, teacher, relation, case)
    assert result.launches == (4 if relation == COSINE else 3)


@pytest.mark.parametrize("pixels", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_any_number_of_pixels(library: ctypes.CDLL, channels: tuple[int, int], pixels: int) -> None:
    relation = COSINE if pixels > 1 else NONE  # normalised, a single pixel has D = 1 - 1 = 0
    check(library, *draw(torch.bfloat16, 2, pixels, channels), relation, "bf16")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_reductions(library: ctypes.CDLL, reduction: str, need_grad: bool) -> None:
    student, teacher = draw(torch.float32, 3, 70, (8, 16))
    check(library, student, teacher, COSINE, "highest", reduction, need_grad=need_grad)


def test_many_images(library: ctypes.CDLL) -> None:
    """More than the groups of threads that sum the losses."""
    check(library, *draw(torch.bfloat16, 35, 3, (4, 8)), NONE, "bf16")


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("case", ["highest", "bf16"])
@every_relation
def test_near_convergence(library: ctypes.CDLL, relation: Relation, case: str, noise: float) -> None:
    """The bound of the gate for float32; rounding errors of features are relative to their difference."""
    student, teacher = converged(case, 150, 40, noise)
    result = run(library, student, teacher, relation, case)
    loss, gradient = expected_of(student, teacher, relation, "mean")
    assert error(result.loss, loss) < 2e-6 + 1e-8 / noise
    assert error(result.gradient, gradient) < max(TOLERANCE[case], 3e-7 / noise)


@every_layout
@every_case
@every_relation
def test_equal_features_give_zero(library: ctypes.CDLL, relation: Relation, case: str, layout: str) -> None:
    student, _ = draw(CASES[case][0], 1, 100, (72, 72), layout)
    result = run(library, student, student.clone(), relation, case)
    assert result.loss.item() == 0
    assert not result.gradient.any()


@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_zero_norm_pixels(library: ctypes.CDLL, channels: tuple[int, int]) -> None:
    student, teacher = draw(torch.float32, 2, 150, channels)
    student[:, [3, 149]] = teacher[:, [7, 149]] = 0
    student[1, 30:90] = 0
    result = check(library, student, teacher, COSINE, "highest")
    assert not result.gradient[:, 3].any()


@pytest.mark.parametrize("size", [2.0**-50, 2.0**50])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_features_of_any_size(library: ctypes.CDLL, channels: tuple[int, int], size: float) -> None:
    student, teacher = draw(torch.float32, 1, 70, channels)
    check(library, size * student, size * teacher, replace(COSINE, eps=0.0), "highest")


def test_overflow_gives_nan(library: ctypes.CDLL) -> None:
    student, teacher = draw(torch.float32, 2, 40, (5, 7))
    student[0, 3] *= 1e20
    result = run(library, student, teacher, COSINE, "highest", reduction="none")
    assert result.loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("channels", [(72, 8), (72, 72)], ids=str)
def test_the_order_of_the_threads_does_not_change_the_bits(library: ctypes.CDLL, channels: tuple[int, int]) -> None:
    student, teacher = draw(torch.bfloat16, 1, 150, channels)
    one, other = (run(library, student, teacher, COSINE, "bf16", seed=seed) for seed in range(2))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.gradient, other.gradient)
