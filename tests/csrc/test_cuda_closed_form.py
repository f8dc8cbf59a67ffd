"""The closed form of l2 in csrc/cuda/closed_form, emulated on the CPU, against float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from emulated_kernels import draw
from helpers import error
from torch import Tensor

from srpkd.kernels import Relation
from tests.csrc.test_cuda_loss import CASES, REDUCTIONS, Result, emulate, expected_of

ROW, COSINE, NONE = (Relation(normalize, "l2") for normalize in ("row", "cosine", "none"))
RELATIONS = ROW, COSINE, NONE
# the relative error of the gradient: float32, except for bfloat16 gradients, which have 8 bits
TOLERANCE = {"bf16": 4e-3, "fp16": 1e-6, "highest": 1e-6}

every_normalized = pytest.mark.parametrize("relation", [ROW, COSINE], ids=lambda relation: relation.normalize)
every_relation = pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.normalize)
every_case = pytest.mark.parametrize("case", TOLERANCE)
every_layout = pytest.mark.parametrize("layout", ["nlc", "nchw"])


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
@pytest.mark.core(3)
def test_constant_norms(library: ctypes.CDLL, case: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(CASES[case][0], 2, 75, channels, layout)
    student[:, 3] = teacher[:, 7] = student[:, 70] = teacher[:, 70] = 0
    check(library, student, teacher, replace(COSINE, detach_norms=True), case)


# equal channels use the difference form; incomplete and several blocks
@pytest.mark.parametrize("channels", [(5, 7), (7, 7), (70, 130), (130, 70), (72, 72)], ids=str)
@every_layout
@every_case
@every_relation
@pytest.mark.core(18)
def test_values(library: ctypes.CDLL, relation: Relation, case: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(CASES[case][0], 1, 75, channels, layout)
    if case == "highest":  # float32 features that need three terms
        student, teacher = (x + 2**-12 * torch.randn_like(x) for x in (student, teacher))
    result = check(library, student, teacher, relation, case)
    assert result.launches == {ROW: 5, COSINE: 4, NONE: 3}[relation]


# 1,200 pixels: ten ranges, of which the second stage of "row" loads eight together
@pytest.mark.parametrize("pixels", [1, 2, 64, 65, 200, 1200])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
@every_normalized
@pytest.mark.core(5)
def test_any_number_of_pixels(library: ctypes.CDLL, relation: Relation, channels: tuple[int, int], pixels: int) -> None:
    if pixels == 1:
        relation = NONE  # normalised, a single pixel has D = 1 - 1 = 0
    check(library, *draw(torch.bfloat16, 2, pixels, channels), relation, "bf16")


@pytest.mark.parametrize("channels", [(200, 8), (8, 200)], ids=str)
@every_relation
def test_four_blocks_of_channels_against_one(
    library: ctypes.CDLL, relation: Relation, channels: tuple[int, int]
) -> None:
    """Two images, whose factors are not square."""
    check(library, *draw(torch.bfloat16, 2, 70, channels), relation, "bf16")


@every_layout
@every_case
def test_pixels_and_channels_of_different_magnitude(library: ctypes.CDLL, case: str, layout: str) -> None:
    """Float16 terms have a small range: only digits far below the norm of a pixel may be lost."""
    student, teacher = draw(torch.float32, 1, 75, (5, 7), layout)
    sizes = 4.0 ** torch.randint(-6, 6, (1, 75, 1))
    student, teacher = ((x * sizes * 0.1 ** torch.arange(x.shape[2])).to(CASES[case][0]) for x in (student, teacher))
    check(library, student, teacher, replace(COSINE, eps=0.0), case)


@pytest.mark.parametrize("pixels", [64, 65])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_largest_float16_terms(library: ctypes.CDLL, channels: tuple[int, int], pixels: int) -> None:
    """Scaled features of nearly 1 in one channel: an element of the moments is nearly the number of pixels."""
    student, teacher = (2e-3 * x for x in draw(torch.float32, 1, pixels, channels))
    student[..., 0], teacher[:, ::2, 0], teacher[:, 1::2, 1] = 1.0, 1.0, 1.0
    result = run(library, student, teacher, COSINE, "highest")
    loss, gradient = expected_of(student, teacher, COSINE, "mean")
    assert error(result.loss, loss) < 1e-6
    # the gradient is that of the other channels, 2e-3 of what the projection subtracts
    assert error(result.gradient, gradient) < 1e-6 / 2e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("need_grad", [True, False])
@every_normalized
@pytest.mark.parametrize("channels", [(8, 16), (72, 72)], ids=str)
@pytest.mark.core(5)
def test_reductions(
    library: ctypes.CDLL, channels: tuple[int, int], relation: Relation, need_grad: bool, reduction: str
) -> None:
    student, teacher = draw(torch.float32, 3, 70, channels)
    result = check(library, student, teacher, relation, "highest", reduction, need_grad=need_grad)
    # without a gradient, the direct form of "row" needs no second stage
    assert result.launches == (4 if relation == COSINE or (channels == (8, 16) and not need_grad) else 5)


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
    # at most 2.9e-7 on the instruction sets that were tried, whose random numbers differ in the last bit
    assert error(result.gradient, gradient) < max(TOLERANCE[case], 5e-7 / noise)


@pytest.mark.parametrize("factor", [1 / 3, 1.0, 10.0, 2.0**40])
def test_rows_of_another_magnitude_near_convergence(library: ctypes.CDLL, factor: float) -> None:
    """The relation does not depend on the magnitude of the features, which the gains compensate."""
    student, teacher = converged("highest", 150, 40, 1e-3)
    student *= factor
    result = run(library, student, teacher, ROW, "highest")
    loss, gradient = expected_of(student, teacher, ROW, "mean")
    assert error(result.loss, loss) < 1e-5
    assert error(result.gradient, gradient) < 5e-4


@every_layout
@every_case
@every_relation
@pytest.mark.core(5)
def test_equal_features_give_zero(library: ctypes.CDLL, relation: Relation, case: str, layout: str) -> None:
    student, _ = draw(CASES[case][0], 1, 100, (72, 72), layout)
    result = run(library, student, student.clone(), relation, case)
    assert result.loss.item() == 0
    assert not result.gradient.any()


@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
@every_normalized
def test_zero_norm_pixels(library: ctypes.CDLL, relation: Relation, channels: tuple[int, int]) -> None:
    student, teacher = draw(torch.float32, 2, 150, channels)
    student[:, [3, 149]] = teacher[:, [7, 149]] = 0
    student[1, 30:90] = 0
    result = check(library, student, teacher, relation, "highest")
    if relation == COSINE:
        assert not result.gradient[:, 3].any()


@pytest.mark.slow
def test_ties_all_over_a_large_image(library: ctypes.CDLL) -> None:
    """Every block of threads counts them, and more than once."""
    student, teacher = draw(torch.bfloat16, 1, 3300, (8, 16))
    student[:, ::10] = teacher[:, 5::10] = 0
    check(library, student, teacher, COSINE, "bf16")


@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 2.0**10])
def test_row_norms_below_eps(library: ctypes.CDLL, factor: float, channels: tuple[int, int]) -> None:
    """The rows are 0, but not the columns: these pixels have a gradient. With a larger teacher, its rows are not 0."""
    student, teacher = draw(torch.float32, 2, 70, channels)
    student[:, 3:9] *= 1e-3
    teacher *= factor
    teacher[:, 7:20] *= 1e-3 / factor
    result = check(library, student, teacher, replace(ROW, eps=1.0), "highest")
    assert result.gradient[:, 3].any()


@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_zero_features(library: ctypes.CDLL, channels: tuple[int, int]) -> None:
    """Rows have norm 1, so that the loss does not depend on the student."""
    student, teacher = draw(torch.float32, 2, 70, channels)
    student[1] = teacher[0] = 0
    result = run(library, student, teacher, ROW, "highest", reduction="none")
    assert error(result.loss, torch.full((2,), 1 / 70)) < 1e-6
    assert result.gradient.abs().max() < 1e-6 / 70**2


@pytest.mark.parametrize("sizes", [(2.0**-50, 2.0**-50), (2.0**50, 2.0**50), (2.0**40, 2.0**-40)], ids=str)
@every_normalized
@pytest.mark.parametrize("channels", [(8, 16), (8, 8)], ids=str)
def test_features_of_any_size(
    library: ctypes.CDLL, channels: tuple[int, int], relation: Relation, sizes: tuple[float, float]
) -> None:
    student, teacher = (size * x for size, x in zip(sizes, draw(torch.float32, 1, 70, channels)))
    check(library, student, teacher, replace(relation, eps=0.0), "highest")


@pytest.mark.parametrize("channels", [(5, 7), (7, 7)], ids=str)
@every_normalized
@pytest.mark.parametrize("value", [1e20, math.inf, math.nan])
def test_overflow_gives_nan(library: ctypes.CDLL, value: float, relation: Relation, channels: tuple[int, int]) -> None:
    student, teacher = draw(torch.float32, 2, 40, channels)
    student[0, 3] *= value
    result = run(library, student, teacher, relation, "highest", reduction="none")
    assert result.loss.isnan().tolist() == [True, False]


@every_normalized
@pytest.mark.parametrize("channels", [(72, 8), (72, 72)], ids=str)
@pytest.mark.core(1)
def test_the_order_of_the_threads_does_not_change_the_bits(
    library: ctypes.CDLL, channels: tuple[int, int], relation: Relation
) -> None:
    student, teacher = draw(torch.bfloat16, 2, 150, channels)
    one, other = (run(library, student, teacher, relation, "bf16", seed=seed) for seed in range(2))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.gradient, other.gradient)
