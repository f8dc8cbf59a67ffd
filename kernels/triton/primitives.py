"""How the kernels of backend ``triton`` read, multiply and store tiles, and the device queries of their launchers.

A float32 factor is split into bfloat16 terms of 8 bits each, as many as its precision needs. The products of the terms
are summed, the small ones first. Unlike TF32 this keeps the range of float32, reaches any precision, works with any
operand layout, and gives the same results under Triton's interpreter.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the backend's unavailable_reason reports this, and nothing below is called
    triton = tl = None

# jit functions can read globals only if they are constexpr; under the interpreter a constexpr is a plain value
INTERPRET = triton is not None and tl.constexpr(triton.knobs.runtime.interpret)
FULL = triton is not None and tl.constexpr(3)  # number of bfloat16 terms that represent a float32 exactly


# Arguments whose value gives no better code: without this, Triton would compile a kernel again if one becomes 1, or a
# multiple of 16.
COUNTS = ("batch", "splits", "h_splits", "count_s", "count_t", "partials", "image_blocks", "upstream_stride")


def jit(function):
    """Return ``triton.jit(function)``, or the function itself if Triton is not installed."""
    if triton is None:
        return function
    names = [name for name in COUNTS if name in inspect.signature(function).parameters]
    return triton.jit(do_not_specialize=names)(function)


# -- tiles -----------------------------------------------------------------------------------------------------------


@jit
def tile_mask(start_n, start_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return which elements of a tile are inside the image; a bound of None is known to hold."""
    offs_n = start_n + tl.arange(0, BLOCK_N)[:, None]
    offs_c = start_c + tl.arange(0, BLOCK_C)[None, :]
    if pixels is None:
        mask = offs_c < channels
    elif channels is None:
        mask = offs_n < pixels
    else:
        mask = (offs_n < pixels) & (offs_c < channels)
    return mask


@jit
def tile_pointers(ptr, start_n, start_c, stride_n, stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the addresses of a tile (BLOCK_N, BLOCK_C) that starts at pixel start_n and channel start_c."""
    # the start of the tile needs 64-bit offsets; inside the tile 32 bits suffice and take half the registers
    ptr += tl.cast(start_n, tl.int64) * stride_n + tl.cast(start_c, tl.int64) * stride_c
    return ptr + tl.arange(0, BLOCK_N)[:, None] * stride_n + tl.arange(0, BLOCK_C)[None, :] * stride_c


@jit
def load_tile(
    ptr, start_n, start_c, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Load features (BLOCK_N, BLOCK_C) starting at pixel start_n and channel start_c; 0 outside the image.

    ``pixels`` or ``channels`` is None if the tile is inside that bound.
    """
    mask = tile_mask(start_n, start_c, pixels, channels, BLOCK_N, BLOCK_C)
    pointers = tile_pointers(ptr, start_n, start_c, stride_n, stride_c, BLOCK_N, BLOCK_C)
    return tl.load(pointers, mask=mask, other=0.0)


@jit
def store_tile(
    ptr, tile, start_n, start_c, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store a tile (BLOCK_N, BLOCK_C) where ``load_tile`` with the same arguments would load it."""
    if ptr.dtype.element_ty == tl.bfloat16:
        tile = to_bfloat16(tile)
    mask = tile_mask(start_n, start_c, pixels, channels, BLOCK_N, BLOCK_C)
    tl.store(tile_pointers(ptr, start_n, start_c, stride_n, stride_c, BLOCK_N, BLOCK_C), tile, mask=mask)


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
def dot(a, b, acc):
    """Return acc + a @ b of 16-bit tensors."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def terms_product(a0, a1, a2, b0, b1, b2, acc, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr):
    """Return acc + a @ b, where the first TERMS_A of a0, a1, a2 sum to a, and the first TERMS_B of b0, b1, b2 to b."""
    if TERMS_A > 2:
        acc = dot(a2, b0, acc)
    if TERMS_B > 2:
        acc = dot(a0, b2, acc)
    if TERMS_A > 1 and TERMS_B > 1 and TERMS_A + TERMS_B > 4:
        acc = dot(a1, b1, acc)
    if TERMS_A > 1:
        acc = dot(a1, b0, acc)
    if TERMS_B > 1:
        acc = dot(a0, b1, acc)
    return dot(a0, b0, acc)


@jit
def product(a, b, acc, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr):
    """Return acc + a @ b, with a split into TERMS_A and b into TERMS_B bfloat16 terms."""
    a0, a1, a2 = split_terms(a, TERMS_A)
    b0, b1, b2 = split_terms(b, TERMS_B)
    return terms_product(a0, a1, a2, b0, b1, b2, acc, TERMS_A, TERMS_B)


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
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def addressable(features: Tensor) -> Tensor:
    """Return the features, or a contiguous copy if offsets inside a tile (256 pixels, channels) exceed 32 bits."""
    return features if 256 * sum(features.stride()[1:]) < 2**31 else features.contiguous()


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; under the interpreter 4, so that the columns of small images are split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def feature_terms(dtype: torch.dtype) -> int:
    """Return the number of bfloat16 terms that represent a number of that dtype exactly."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
