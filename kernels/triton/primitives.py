"""How the kernels of backend ``triton`` read, multiply and store tiles, and the device queries of their launchers.

A float32 factor is split into bfloat16 terms of 8 bits each, as many as its precision needs. The products of the terms
are summed, the small ones first. Unlike TF32 this keeps the range of float32, reaches any precision, works with any
operand layout, and gives the same results under Triton's interpreter.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the backend's unavailable_reason reports this, and nothing below is called
    triton = tl = None


def kernel_constant(value: Any) -> Any:
    """Return a global that kernels can read: a constexpr; under the interpreter, and without Triton, a plain value."""
    return value if triton is None else tl.constexpr(value)


INTERPRET = kernel_constant(triton is not None and triton.knobs.runtime.interpret)
FULL = kernel_constant(3)  # number of bfloat16 terms that represent a float32 exactly


# Arguments whose value gives no better code: without this, Triton would compile a kernel again if one becomes 1, or a
# multiple of 16.
COUNTS: tuple[str, ...] = ("batch", "splits", "h_splits", "count_s", "count_t", "counters", "losses", "partials")
COUNTS += ("image_blocks", "upstream_stride")


def jit(function):
    """Return ``triton.jit(function)``, or the function itself if Triton is not installed."""
    if triton is None:
        return function
    names = [name for name in COUNTS if name in inspect.signature(function).parameters]
    return triton.jit(do_not_specialize=names)(function)


# -- tiles -----------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A matrix in memory, such as the features of an image: its rows are pixels, its columns channels.

    Attributes:
        ptr: the first element.
        rows, columns: the size. None if all tiles are known to be inside that bound; Triton 3.6 cannot return such a
            matrix from a function.
        stride_r, stride_c: elements from row to row, and from column to column.
    """

    ptr: Any
    rows: Any
    columns: Any
    stride_r: Any
    stride_c: Any


@jit
def contiguous(ptr, rows, columns):
    """Return the matrix whose rows follow each other in memory."""
    return Matrix(ptr, rows, columns, columns, 1)


@jit
def moved(matrix, elements):
    """Return the matrix that starts some elements later in memory."""
    return Matrix(matrix.ptr + elements, matrix.rows, matrix.columns, matrix.stride_r, matrix.stride_c)


@jit
def tile_mask(matrix, start_r, start_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return which elements of a tile are inside the matrix."""
    offs_r = start_r + tl.arange(0, BLOCK_R)[:, None]
    offs_c = start_c + tl.arange(0, BLOCK_C)[None, :]
    if matrix.rows is None:
        mask = offs_c < matrix.columns
    elif matrix.columns is None:
        mask = offs_r < matrix.rows
    else:
        mask = (offs_r < matrix.rows) & (offs_c < matrix.columns)
    return mask


@jit
def tile_pointers(matrix, start_r, start_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the addresses of a tile (BLOCK_R, BLOCK_C) that starts at row start_r and column start_c."""
    # the start of the tile needs 64-bit offsets; inside the tile 32 bits suffice and take half the registers
    ptr = matrix.ptr + tl.cast(start_r, tl.int64) * matrix.stride_r + tl.cast(start_c, tl.int64) * matrix.stride_c
    return ptr + tl.arange(0, BLOCK_R)[:, None] * matrix.stride_r + tl.arange(0, BLOCK_C)[None, :] * matrix.stride_c


@jit
def load_tile(matrix, start_r, start_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load a tile (BLOCK_R, BLOCK_C) of a matrix that starts at row start_r and column start_c; 0 outside."""
    mask = tile_mask(matrix, start_r, start_c, BLOCK_R, BLOCK_C)
    return tl.load(tile_pointers(matrix, start_r, start_c, BLOCK_R, BLOCK_C), mask=mask, other=0.0)


@jit
def load_transposed(matrix, start_c, start_r, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load a tile (BLOCK_C, BLOCK_R) of the transposed matrix."""
    transposed = Matrix(matrix.ptr, matrix.columns, matrix.rows, matrix.stride_c, matrix.stride_r)
    return load_tile(transposed, start_c, start_r, BLOCK_C, BLOCK_R)


@jit
def store_tile(matrix, tile, start_r, start_c):
    """Store a tile where ``load_tile`` would load it."""
    if matrix.ptr.dtype.element_ty == tl.bfloat16:
        tile = to_bfloat16(tile)
    mask = tile_mask(matrix, start_r, start_c, tile.shape[0], tile.shape[1])
    tl.store(tile_pointers(matrix, start_r, start_c, tile.shape[0], tile.shape[1]), tile, mask=mask)


@jit
def load_vector(ptr, start, size, BLOCK: tl.constexpr):
    """Load BLOCK elements of a contiguous vector from ``start`` on; 0 beyond its size."""
    offs = start + tl.arange(0, BLOCK)
    return tl.load(ptr + offs, mask=offs < size, other=0.0)


@jit
def store_vector(ptr, vector, start, size, BLOCK: tl.constexpr):
    """Store BLOCK elements of a contiguous vector from ``start`` on."""
    offs = start + tl.arange(0, BLOCK)
    tl.store(ptr + offs, vector, mask=offs < size)


@jit
def to_bfloat16(x):
    """Round x to the nearest bfloat16; under the interpreter, return a float32 of that value.

    The interpreter truncates where a GPU rounds, and its products of bfloat16 tensors are wrong.
    """
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@jit
def round_off(x):
    """Round float32 x to 8 bits and keep it in float32: two integer instructions, fewer than two conversions."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@jit
def split_terms(x, TERMS: tl.constexpr):
    """Return three bfloat16 tensors. The first TERMS of them sum to x, up to the precision of TERMS * 8 bits."""
    x = x.to(tl.float32)
    first = round_off(x) if TERMS > 1 else x
    rest = x - first
    second = round_off(rest) if TERMS > 2 else rest
    return to_bfloat16(first), to_bfloat16(second), to_bfloat16(rest - second)


@jit
def load_terms(matrix, stride_term, start_r, start_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load a tile of a matrix that is stored as three terms, ``stride_term`` elements from one to the next."""
    second = moved(matrix, stride_term)
    third = moved(second, stride_term)  # twice the stride may not fit into 32 bits
    return (
        load_tile(matrix, start_r, start_c, BLOCK_R, BLOCK_C),
        load_tile(second, start_r, start_c, BLOCK_R, BLOCK_C),
        load_tile(third, start_r, start_c, BLOCK_R, BLOCK_C),
    )


@jit
def dot(a, b, acc):
    """Return acc + a @ b of 16-bit tensors."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def terms_product(a, b, acc, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr):
    """Return acc + a @ b of factors in three terms each, of which the first TERMS_A and TERMS_B count."""
    if TERMS_A > 2:
        acc = dot(a[2], b[0], acc)
    if TERMS_B > 2:
        acc = dot(a[0], b[2], acc)
    if TERMS_A > 1 and TERMS_B > 1 and TERMS_A + TERMS_B > 4:
        acc = dot(a[1], b[1], acc)
    if TERMS_A > 1:
        acc = dot(a[1], b[0], acc)
    if TERMS_B > 1:
        acc = dot(a[0], b[1], acc)
    return dot(a[0], b[0], acc)


@jit
def product(a, b, acc, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr):
    """Return acc + a @ b, with a split into TERMS_A and b into TERMS_B bfloat16 terms."""
    return terms_product(split_terms(a, TERMS_A), split_terms(b, TERMS_B), acc, TERMS_A, TERMS_B)


@jit
def features_product(a, b, acc, TERMS: tl.constexpr):
    """Return acc + a @ b of features: 16-bit features as they are, float32 features split into TERMS terms."""
    if a.dtype == tl.float32:
        return product(a, b, acc, TERMS, TERMS)
    else:
        return dot(a, b, acc)


# -- launchers -------------------------------------------------------------------------------------------------------


def guard(device: torch.device) -> AbstractContextManager:
    """Return a context that makes ``device`` current: Triton launches there, not on the device of its arguments."""
    # a single device is always current
    return torch.cuda.device(device) if device.type == "cuda" and torch.cuda.device_count() > 1 else nullcontext()


def addressable(features: Tensor) -> Tensor:
    """Return the features, or a contiguous copy if offsets inside a tile (256 pixels, channels) exceed 32 bits."""
    return features if 256 * sum(features.stride()[1:]) < 2**31 else features.contiguous()


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; under the interpreter 4, so that the columns of small images are split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def feature_terms(dtype: torch.dtype) -> int:
    """Return the number of bfloat16 terms that represent a number of that dtype exactly."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
