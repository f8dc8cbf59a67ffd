"""Calls the emulated tiles for Hopper (csrc/cuda/sm90), and compares them with the float64 primitive."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from emulated_kernels import PRECISIONS, exact_tiles, extent, pointer
from helpers import error
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, Scales, TileSums
from srpkd.kernels.formulas import scales_of

# tf32: one float16 term of float32 features; tf32x3: two
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32x3": torch.float32}
# the error of U relative to float64 if G is exact: K is rounded to 8 bits, 11 bits, or two terms of 11 bits
TOLERANCE = {"bf16": 2e-3, "fp16": 3e-4, "tf32": 3e-4, "tf32x3": 1e-6}
ROW, COSINE = Relation("row", "l1"), Relation("cosine", "l1")
every_precision = pytest.mark.parametrize("precision", DTYPES)


class Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("images", "pixels", "student_channels", "teacher_channels")),
        *((name, ctypes.c_int) for name in ("precision", "grad", "normalize", "distance")),
        ("delta", ctypes.c_float),
    )


class Features(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("bytes", ctypes.c_int64),
        ("element_bytes", ctypes.c_int),
    )


def load_tiles(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    """Compile the emulated kernels."""
    result = compile_emulation("sm90_library.cpp", "sm90_kernels.cpp")
    result.relation_tiles.restype = result.uncovered.restype = ctypes.c_char_p
    return result


def exact_scales(student: Tensor, teacher: Tensor, relation: Relation) -> Scales:
    """Return the scales of features whose norms might overflow in float32."""
    exact = scales_of(student.double(), teacher.double(), relation, torch.float64)
    return Scales(*(None if x is None else x.float() for x in exact))


def emulate(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    scales: Scales,
    relation: Relation,
    precision: str,
    need_grad: bool = True,
    multiprocessors: int = 2,
    seed: int = 1,
) -> TileSums:
    """Compute the primitive with the emulated kernel."""
    batch, pixels, channels = student.shape
    problem = Problem(
        *(batch, pixels, channels, teacher.shape[2], PRECISIONS.index(precision), need_grad),
        *(NORMALIZATIONS.index(relation.normalize), DISTANCES.index(relation.distance), relation.delta),
    )
    features, kept = [], []
    for x, alpha in ((student, scales.student), (teacher, scales.teacher)):
        kept.append(None if alpha is None else alpha.float().contiguous())
        strides, size = (ctypes.c_int64 * 3)(*x.stride()), x.element_size()
        features.append(Features(x.data_ptr(), pointer(kept[-1]), strides, extent(x) * size, size))
    loss = torch.full((batch,), torch.nan, dtype=torch.float64)
    U = torch.full((batch, pixels, channels), torch.nan) if need_grad else None
    h = torch.full((batch, pixels), torch.nan) if need_grad and relation.normalize != "none" else None
    message = library.relation_tiles(
        ctypes.byref(problem), ctypes.byref(features[0]), ctypes.byref(features[1]), multiprocessors,
        ctypes.c_uint64(seed), pointer(loss), pointer(U), pointer(h),
    )  # fmt: skip
    assert message == b"", message.decode()
    return TileSums(loss, U, h)


def check(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    precision: str,
    scales: Scales | None = None,
    **options,
) -> TileSums:
    """Compare with the float64 primitive, computed with the same scales."""
    scales = scales or scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision, **options)
    expected = exact_tiles(student, teacher, scales, relation, tiles.U is not None)
    assert error(tiles.loss, expected.loss) < 1e-6
    if tiles.U is not None:
        assert error(tiles.U, expected.U) < TOLERANCE[precision]
    if tiles.h is not None:
        assert error(tiles.h, expected.h) < 2e-6
    return tiles
