"""The whole relation loss of csrc/cuda, emulated on the CPU: scales, tiles, correction and the sum of the loss.

The emulation runs the plan and the sequence of kernels that csrc/cuda/operator.cpp launches, and the tests compare its
results with float64. See test_cuda_emulation.py, which tests the tiles alone.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import DELTA, error
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation
from srpkd.kernels.formulas import gradient_dtype
from srpkd.kernels.reference import relation_loss as reference_loss

PRECISIONS = ("bf16", "fp16", "tf32", "tf32x3")
# features and precision of the products of the tiles; "medium": float32 features that the tiles read as bfloat16
CASES = {
    "bf16": (torch.bfloat16, "bf16"),
    "fp16": (torch.float16, "fp16"),
    "high": (torch.float32, "tf32"),
    "highest": (torch.float32, "tf32x3"),
    "medium": (torch.float32, "bf16"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the relative error of the gradient: K has 11 bits or 22; bfloat16 gradients have 8
TOLERANCE = {"bf16": 4e-3, "fp16": 2e-6, "high": 4e-4, "highest": 2e-6, "medium": 4e-4}
REDUCTIONS = ("mean", "sum", "none")
LAYOUTS = ("nlc", "nchw")
RELATIONS = [Relation(n, d, DELTA[n]) for n, d in itertools.product(NORMALIZATIONS, DISTANCES)]
ROW, COSINE = Relation("row", "l1"), Relation("cosine", "l1")
# multiprocessors; bytes of shared memory per block, per multiprocessor, and reserved per block
DEVICES = {
    "sm_80": (108, 166_912, 167_936, 1024),
    "sm_86": (84, 101_376, 102_400, 1024),
    "sm_90": (132, 232_448, 233_472, 1024),
    "small": (1, 101_376, 102_400, 1024),  # few blocks are enough: no splits, 128 pixels per block
}

every_case = pytest.mark.parametrize("case", CASES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Features(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("tile_data", ctypes.c_void_p),
        ("image_stride", ctypes.c_int64),
        ("line_stride", ctypes.c_int64),
        ("extent", ctypes.c_int64),
        ("channels", ctypes.c_int),
    )


class Intermediate(ctypes.Structure):
    _fields_ = (
        ("alpha", ctypes.c_void_p * 2),
        ("moment", ctypes.c_void_p),
        ("weighted", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
    )


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor | None
    alpha: Tensor  # (2, B, N): of the teacher, of the student
    moment: Tensor  # (B, C, C) of the student
    launches: int


@pytest.fixture(scope="session")
def library(emulated: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    result = emulated("loss.cpp")
    result.relation_loss.restype = ctypes.c_char_p
    return result


def emulate(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    case: str,
    reduction: str = "mean",
    need_grad: bool = True,
    device: str = "sm_90",
    backwards: bool = False,
    gradient_layout: Tensor | None = None,
    method: str = "tiles",
) -> Result:
    """Compute the loss with the emulated kernels. The strides of the features determine the layout."""
    dtype, precision = CASES[case]
    assert student.dtype == teacher.dtype == dtype
    batch, pixels, channels = student.shape
    pixels_adjacent = student.stride(1) == 1 and student.stride(2) != 1
    features, kept = (Features * 2)(), []
    for i, x in enumerate((teacher, student)):
        assert x.stride(1 if pixels_adjacent else 2) == 1
        extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
        flat = x.as_strided((extent,), (1,))
        kept.append(flat.bfloat16() if case == "medium" else flat)
        line_stride = x.stride(2 if pixels_adjacent else 1)
        features[i] = Features(x.data_ptr(), kept[i].data_ptr(), x.stride(0), line_stride, extent, x.shape[2])
    loss = torch.full((batch,) if reduction == "none" else (), torch.nan)
    like = student if gradient_layout is None else gradient_layout
    gradient = torch.full_like(like, torch.nan, dtype=gradient_dtype(dtype)) if need_grad else None
    alpha = torch.full((2, batch, pixels), torch.nan)
    moment, weighted = torch.full((2, batch, channels, channels), torch.nan)
    size = torch.full((batch, 2), torch.nan)
    intermediate = Intermediate(
        (ctypes.c_void_p * 2)(alpha[0].data_ptr(), alpha[1].data_ptr()), moment.data_ptr(), weighted.data_ptr(),
        size.data_ptr(),
    )  # fmt: skip
    message = library.relation_loss(
        method == "closed_form", DTYPES.index(dtype), PRECISIONS.index(precision), pixels_adjacent, features, batch,
        pixels,
        NORMALIZATIONS.index(relation.normalize), DISTANCES.index(relation.distance), ctypes.c_double(relation.delta),
        ctypes.c_double(relation.eps), REDUCTIONS.index(reduction), need_grad, (ctypes.c_int * 4)(*DEVICES[device]),
        backwards, ctypes.c_void_p(loss.data_ptr()), ctypes.c_void_p(gradient.data_ptr() if need_grad else None),
        (ctypes.c_int64 * 3)(*like.stride()), ctypes.byref(intermediate), launches := (ctypes.c_int * 1)(),
    )  # fmt: skip
    assert message == b"", message.decode()
    return Result(loss, gradient, alpha, moment * size[:, 1, None, None] ** 2, launches[0])


def draw(
    dtype: torch.dtype, batch: int, pixels: int, channels: tuple[int, int], layout: str = "nlc"
) -> tuple[Tensor, Tensor]:
    """Return random features (B, N, C) of student and teacher. Float32 features have bfloat16 values."""
    pair = ((torch.randn(batch, pixels, count) + 0.5).bfloat16().to(dtype) for count in channels)
    student, teacher = (x.mT.contiguous().mT if layout == "nchw" else x for x in pair)
    return student, teacher


def expected_of(student: Tensor, teacher: Tensor, relation: Relation, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of autograd in float64."""
    student = student.double().requires_grad_()
    losses = reference_loss(student, teacher.double(), relation)
    loss = losses if reduction == "none" else getattr(losses, reduction)()
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def check(
    library: ctypes.CDLL, student: Tensor, teacher: Tensor, relation: Relation, case: str, reduction="mean", **options
) -> Result:
    result = emulate(library, student, teacher, relation, case, reduction, **options)
    loss, gradient = expected_of(student, teacher, relation, reduction)
    assert error(result.loss, loss) < 1e-6
    if result.gradient is not None:
        assert result.gradient.dtype == gradient_dtype(student.dtype)
        assert error(result.gradient, gradient) < TOLERANCE[case]
    return result
