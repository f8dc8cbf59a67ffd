"""The closed form as Triton kernels, on the CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_closed_form.py

The interpreter's products round to nearest, those of tensor cores towards zero: docs/kernels.md has a simulation.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from helpers import NARROW, STRIDES, error, value_and_gradient
from torch import Tensor

from srpkd.kernels import NORMALIZATIONS, Relation
from srpkd.kernels.triton import closed_form, plans

RELATIONS = [Relation(normalize, "l2") for normalize in NORMALIZATIONS]
ROW, COSINE = Relation("row", "l2"), Relation("cosine", "l2")
ULP = 2.0**-23  # of float32, added to bounds: the error of eager can be 0 by chance
LEAST = 1e-2  # the smallest norm that errors are relative to: some gradients are 0 up to rounding

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="TRITON_INTERPRET=1 is not set: these tests run in Triton's interpreter, in a separate process",
)

every_relation = pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.normalize)
every_normalized = pytest.mark.parametrize("relation", [ROW, COSINE], ids=lambda relation: relation.normalize)
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])


def draw(batch: int, pixels: int, channels: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random features (B, N, C) of student and teacher."""
    student, teacher = ((torch.randn(batch, pixels, count) + 0.5).to(dtype) for count in channels)
    return student, teacher


def converged(batch: int, pixels: int, channels: int, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return features of a teacher, and of a student that differs from it by noise."""
    teacher = torch.randn(batch, pixels, channels) + 0.5
    return (teacher + noise * torch.randn_like(teacher)).to(dtype), teacher.to(dtype)


def run(student: Tensor, teacher: Tensor, relation: Relation) -> tuple[Tensor, Tensor]:
    """Return the loss of each image and N^2 times the gradient of their sum."""
    loss, gradient = closed_form.loss_and_gradient(student, teacher, relation, True)
    assert gradient is not None
    return loss, gradient.double() * student.shape[1] ** 2


def assert_as_accurate_as_eager(
    student: Tensor, teacher: Tensor, relation: Relation, loss_bound: float = ULP
) -> tuple[Tensor, Tensor]:
    """Loss, with and without a gradient, and gradient have at most 3 times the error of eager PyTorch in that dtype.

    ``loss_bound`` is added to the bound of the loss.
    """
    pixels = student.shape[1]
    loss, gradient = run(student, teacher, relation)
    forward, nothing = closed_form.loss_and_gradient(student, teacher, relation, False)
    assert nothing is None
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", pixels**2)
    eager = value_and_gradient(student, teacher, relation, "reference", pixels**2)
    bound = 3 * error(eager[0], expected[0]) + loss_bound
    assert error(loss, expected[0]) <= bound
    assert error(forward, expected[0]) <= bound
    assert error(gradient, expected[1], LEAST) <= 3 * error(eager[1], expected[1], LEAST) + 2 * ULP
    return loss, gradient


# incomplete, full and several blocks; equal channels use the difference form
@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(torch.float32, channels) for channels in ((1, 3), (24, 40), (40, 40), (70, 70), (140, 30))]
    + [(dtype, channels) for dtype in NARROW if dtype != torch.float32 for channels in ((40, 40), (140, 30))],
    ids=lambda value: str(value).removeprefix("torch."),
)
@every_relation
@pytest.mark.core(6)
def test_errors(relation, dtype, channels):
    # the direct form of "row" adds up float32 sums of each row, without an average over squares
    bound = 4 * ULP if relation == ROW and channels[0] != channels[1] else ULP
    assert_as_accurate_as_eager(*draw(1, 40, channels, dtype), relation, bound)


@pytest.mark.parametrize("channels", [(24, 40), (40, 40), (140, 30)], ids=str)
@every_dtype
@pytest.mark.core(3)
def test_constant_norms(dtype, channels):
    student, teacher = draw(2, 40, channels, dtype)
    student[:, 3] = teacher[:, 7] = student[:, 39] = teacher[:, 39] = 0
    assert_as_accurate_as_eager(student, teacher, replace(COSINE, detach_norms=True))


@pytest.mark.parametrize("noise", [1e-1, 1e-4])
@every_dtype
@every_relation
@pytest.mark.core(3)
def test_errors_near_convergence(relation, dtype, noise):
    """The relative error of the loss grows as the rounding errors of features relative to their difference."""
    student, teacher = converged(1, 100, 40, noise, dtype)
    loss, _ = assert_as_accurate_as_eager(student, teacher, relation, ULP + ULP / noise / 10)
    assert dtype != torch.float32 or (loss < 10 * noise**2 * (1 if relation.normalize == "cosine" else 2000)).all()


@pytest.mark.parametrize("factor", [1 / 3, 10.0, 2.0**40])
@pytest.mark.core(1)
def test_rows_of_another_magnitude_near_convergence(factor):
    """The relation does not depend on the magnitude of the features, which the gains compensate."""
    student, teacher = converged(1, 100, 40, 1e-3, torch.float32)
    student *= factor
    loss, gradient = run(student, teacher, ROW)
    expected = value_and_gradient(student.double(), teacher.double(), ROW, "reference", 100**2)
    assert error(loss, expected[0]) < 1e-5
    assert error(gradient, expected[1]) < 5e-4


@every_relation
@pytest.mark.core(1)
def test_different_channels_near_convergence(relation):
    """The direct form loses digits, but no more than float32 sums lose relative to a mean squared relation."""
    student, _ = converged(1, 100, 24, 0.0, torch.float32)
    teacher = student @ torch.linalg.qr(torch.randn(40, 24))[0].T  # the same relations up to rounding
    teacher += 1e-3 * torch.randn_like(teacher)
    loss, gradient = run(student, teacher, relation)
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", 100**2)
    relations = student.double() @ student.double().mT
    if relation.normalize == "row":
        relations /= relations.norm(dim=-1, keepdim=True)
    if relation.normalize == "cosine":
        relations /= student.double().norm(dim=-1, keepdim=True) * student.double().norm(dim=-1).unsqueeze(1)
    assert (loss - expected[0]).abs() < ULP * relations.square().mean()
    assert error(gradient, expected[1]) < 1e-3


@every_relation
@every_dtype
@pytest.mark.core(3)
def test_equal_features_give_zero(dtype, relation):
    student, _ = draw(2, 100, (40, 40), dtype)
    loss, gradient = run(student, student.clone(), relation)
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize("channels", [(24, 40), (40, 40)], ids=str)
@every_relation
@pytest.mark.core(1)
def test_zero_norm_pixels(relation, channels):
    """Pixels of the student, the teacher or both. For "cosine" the diagonal counts as 0 at these too."""
    student, teacher = draw(2, 70, channels, torch.float32)
    student[:, [3, 69]] = teacher[:, [7, 69]] = 0
    student[1, 30:50] = 0
    _, gradient = assert_as_accurate_as_eager(student, teacher, relation)
    if relation.normalize == "cosine":
        assert not gradient[:, 3].any()


@pytest.mark.parametrize("channels", [(24, 40), (40, 40)], ids=str)
@pytest.mark.core(1)
def test_row_norms_below_eps(channels):
    """The rows are 0, but not the columns: these pixels have a gradient."""
    student, teacher = draw(2, 70, channels, torch.float32)
    student[:, 3:9] *= 1e-3
    teacher[:, 7:20] *= 1e-3
    _, gradient = assert_as_accurate_as_eager(student, teacher, replace(ROW, eps=1.0), 4 * ULP)
    assert gradient[:, 3].any()


@every_normalized
def test_one_pixel(relation):
    student, teacher = draw(1, 1, (24, 40), torch.float32)
    for one in (student, torch.zeros_like(student)):
        loss, gradient = run(one, teacher, relation)
        if relation == COSINE or one is student:
            assert loss.item() < 4 * ULP
        else:  # the diagonal counts
            assert error(loss, torch.ones(1)) < 4 * ULP
        assert gradient.norm().item() < 1e-5


@pytest.mark.parametrize(("pixels", "splits"), [(2, 1), (31, 1), (33, 2), (64, 2), (129, 3), (500, 4)])
@every_normalized
@pytest.mark.core(3)
def test_any_number_of_pixels(relation, pixels, splits, monkeypatch):
    """And several partial sums, of different lengths."""
    monkeypatch.setattr(closed_form.moments, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(closed_form.moments, "SPLIT_PIXELS", 512)
    monkeypatch.setattr(plans, "_plans", {})
    assert_as_accurate_as_eager(*draw(1, pixels, (5, 7), torch.float32), relation, 4 * ULP)
    assert dict(launches())["moments_kernel"][0] == 3 * splits  # three tiles


def launches() -> list[tuple[str, tuple[int, ...]]]:
    """Return the names of the kernels and the grids of the launches of the last plan."""
    plan = list(plans._plans.values())[-1]
    return [(launch.kernel.fn.__name__, launch.grid) for launch in plan.launches]


@pytest.mark.parametrize("channels", [(5, 7), (7, 7)], ids=str)
@pytest.mark.parametrize("need_grad", [True, False])
def test_launches(need_grad, channels, monkeypatch):
    """Seven for "row", four for "cosine", three for "none"; the direct form of "row" needs five without a gradient."""
    stage = ["moments_kernel", "finish_kernel"]
    second = stage if need_grad or channels == (7, 7) else []
    before = {
        "row": ["gains_kernel", *stage, "row_scales_kernel", *second],
        "cosine": ["scale_kernel", *stage],
        "none": stage,
    }
    last = "closed_form_gradient_kernel" if need_grad else "loss_kernel"
    for relation in RELATIONS:
        monkeypatch.setattr(plans, "_plans", {})
        closed_form.loss_and_gradient(*draw(1, 40, channels, torch.float32), relation, need_grad)
        assert [name for name, _ in launches()] == [*before[relation.normalize], last]


@pytest.mark.parametrize("size", [1e-15, 1e15])
@pytest.mark.parametrize("channels", [(24, 40), (40, 40)], ids=str)
@every_normalized
@pytest.mark.core(3)
def test_features_of_any_size(relation, channels, size):
    student, teacher = draw(1, 60, channels, torch.float32)
    relation = replace(relation, eps=0.0)
    expected = run(student, teacher, relation)
    size = 2.0 ** round(math.log2(size))  # a power of two, so that rounding does not change
    loss, gradient = run(size * student, size * teacher, relation)
    assert error(loss, expected[0]) < 1e-6
    assert error(gradient * size, expected[1]) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about the overflow
@pytest.mark.parametrize(("value", "need_grad"), [(1e20, True), (torch.inf, True), (torch.nan, True), (1e20, False)])
@pytest.mark.parametrize("channels", [(5, 7), (7, 7)], ids=str)
@every_normalized
@pytest.mark.core(4)
def test_overflow_gives_nan(relation, channels, need_grad, value):
    student, teacher = draw(2, 40, channels, torch.float32)
    student[0, 3] *= value
    loss, gradient = closed_form.loss_and_gradient(student, teacher, relation, need_grad)
    assert loss.isnan().tolist() == [True, False]
    assert gradient is None or gradient[0].isnan().any()


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("channels", [(24, 40), (40, 40)], ids=str)
@every_normalized
@pytest.mark.core(3)
def test_float32_follows_the_matmul_precision(relation, precision, channels, set_precision):
    """The bounds are those of the benchmark's gate."""
    student, teacher = draw(1, 70, channels, torch.float32)
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", 70**2)
    set_precision(precision)
    loss, gradient = run(student, teacher, relation)
    bound = {"high": 1e-4, "medium": 5e-3}[precision]
    assert error(loss, expected[0]) < bound
    assert error(gradient, expected[1]) < bound
    set_precision("highest")
    assert not torch.equal(loss, run(student, teacher, relation)[0])


@pytest.mark.parametrize("make", [make for key, make in STRIDES.items() if key != "contiguous"])
@every_normalized
@pytest.mark.core(3)
def test_strides_are_read_in_place(relation, make):
    """The memory between the features is NaN, so that a read outside them fails the test."""
    student, teacher = torch.rand(2, 6, 5, 7), torch.rand(2, 9, 5, 7)
    expected = run(student.flatten(2).mT, teacher.flatten(2).mT, relation)
    views = [make(x).reshape(*x.shape[:2], -1).mT for x in (student, teacher)]
    loss, gradient = run(*views, relation)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("channels", [(24, 40), (40, 40)], ids=str)
@every_normalized
@pytest.mark.core(1)
def test_two_runs_give_the_same_bits(relation, channels):
    student, teacher = draw(2, 70, channels, torch.bfloat16)
    loss, gradient = run(student, teacher, relation)
    again = run(student, teacher, relation)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
