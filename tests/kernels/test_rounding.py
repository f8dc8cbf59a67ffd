"""The yardstick of the kernels' errors, tests/rounding.py, on kernels that round as GPUs do."""

from __future__ import annotations

import pytest
import torch
from helpers import RELATIONS, features, name_of, value_and_gradient
from rounding import error_norms, predicted_errors
from torch import Tensor

from srpkd.kernels import Relation, blocked, formulas

pytestmark = pytest.mark.usefixtures("one_thread")
every_relation = pytest.mark.parametrize("relation", RELATIONS, ids=name_of)


def to_tf32(x: Tensor) -> Tensor:
    """Round float32 values to 10 bits after the point, as cuBLAS does with TF32."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    """Drop the bits that TF32 lacks: what tensor cores do with float32 values that nothing has rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rounded_products(student: Tensor, teacher: Tensor, relation: Relation, rounded) -> tuple[Tensor, Tensor]:
    """Loss (B,) and gradient by tiles whose products read rounded features; the scales are exact."""
    scales = formulas.scales_of(student.double(), teacher.double(), relation, torch.float64)
    pair = rounded(student).double(), rounded(teacher).double()
    tiles = blocked.relation_tiles(*pair, scales, relation, need_grad=True)
    gradient = formulas.gradient_of(student.double(), tiles, scales, relation)
    return tiles.loss / student.shape[1] ** 2, gradient


@pytest.mark.parametrize(("precision", "rounded"), [("high", to_tf32), ("medium", to_bfloat16)], ids=["high", "medium"])
@every_relation
def test_products_of_each_precision_are_within_the_prediction(relation: Relation, precision: str, rounded) -> None:
    student, teacher = features(pixels=300, channels=(64, 100), dtype=torch.float32)
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    predicted = predicted_errors(student, teacher, relation, precision)
    found = error_norms(rounded_products(student, teacher, relation, rounded), exact)
    assert found.loss <= 3 * predicted.loss
    assert 0.1 * predicted.gradient <= found.gradient <= predicted.gradient  # K is not rounded here
    # the next better precision predicts much less: a kernel that silently used a worse one would fail
    better = predicted_errors(student, teacher, relation, {"high": "highest", "medium": "high"}[precision])
    # (of l1 the pairs whose sign flips have errors of full size, and their number grows with the unit of rounding)
    assert found.gradient > (2 if relation.distance == "l1" else 3) * better.gradient


@every_relation
def test_features_that_nothing_has_rounded_exceed_the_prediction(relation: Relation) -> None:
    student, teacher = features(pixels=300, channels=(64, 100), dtype=torch.float32)
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    predicted = predicted_errors(student, teacher, relation, "high")
    found = error_norms(rounded_products(student, teacher, relation, truncated), exact)
    assert found.loss > 3 * predicted.loss


def test_a_gradient_whose_exact_value_is_zero() -> None:
    """The cosine relations of one channel are constant: the prediction is absolute, and not 0."""
    student, teacher = features(pixels=60, channels=(1, 3), dtype=torch.float32)
    relation = Relation("cosine", "l1")
    loss, gradient = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    predicted = predicted_errors(student, teacher, relation)
    found = error_norms(value_and_gradient(student, teacher, relation, "blocked"), (loss, gradient))
    assert gradient.norm() < 1e-12
    assert 0.01 * predicted.gradient < found.gradient < predicted.gradient
    assert found.loss < predicted.loss < 1e-5 * loss.norm()
