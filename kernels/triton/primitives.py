from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # backend triton then says so in unavailable_reason, and nothing below is called
    triton = tl = None

# jit functions read globals as constexpr only; under the interpreter those are plain values
INTERPRET = triton is not None and tl.constexpr(triton.knobs.runtime.interpret)
FULL = triton is not None and tl.constexpr(3)  # how many bfloat16 terms hold a float32


def jit(function):
    """``triton.jit``, or the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function)


# -- how the kernels read and multiply -------------------------------------------------------------------------------


@jit
def load_tile(
    ptr, start_n, start_c, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Features (BLOCK_N, BLOCK_C) from pixel start_n and channel start_c on; 0 outside the image."""
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    # 64 bits say where the tile lies; within it 32 do, and take half the registers
    ptr += tl.cast(start_n, tl.int64) * stride_n + tl.cast(start_c, tl.int64) * stride_c
    mask = (start_n + offs_n < pixels) & (start_c + offs_c < channels)
    return tl.load(ptr + offs_n * stride_n + offs_c * stride_c, mask=mask, other=0.0)


@jit
def store_tile(
    ptr, tile, start_n, start_c, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store what ``load_tile`` would load."""
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    ptr += tl.cast(start_n, tl.int64) * stride_n + tl.cast(start_c, tl.int64) * stride_c
    mask = (start_n + offs_n < pixels) & (start_c + offs_c < channels)
    if ptr.dtype.element_ty == tl.bfloat16:
        tile = to_bfloat16(tile)
    tl.store(ptr + offs_n * stride_n + offs_c * stride_c, tile, mask=mask)


@jit
def to_bfloat16(x):
    """x rounded to the nearest bfloat16; under the interpreter, a float32 of that value.

    The interpreter truncates where a GPU rounds, and multiplies bfloat16 wrongly.
    """
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@jit
def round_off(x):
    """x rounded to 8 bits, in float32: by two integer instructions, where a conversion there and back takes longer."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@jit
def split_terms(x, TERMS: tl.constexpr):
    """Three bfloat16 tensors, of which the first TERMS add up to x."""
    x = x.to(tl.float32)
    first = round_off(x) if TERMS > 1 else x
    rest = x - first
    second = round_off(rest) if TERMS > 2 else rest
    return to_bfloat16(first), to_bfloat16(second), to_bfloat16(rest - second)


@jit
def dot(a, b, acc):
    """acc + a @ b of 16-bit tensors."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def product(a, b, acc, TERMS_A: tl.constexpr, TERMS_B: tl.constexpr):
    """acc + a @ b, where a and b have TERMS_A and TERMS_B times 8 bits."""
    a0, a1, a2 = split_terms(a, TERMS_A)
    b0, b1, b2 = split_terms(b, TERMS_B)
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
def features_product(a, b, acc, TERMS: tl.constexpr):
    """acc + a @ b where both are features: 16-bit ones as they are, float32 ones in TERMS terms."""
    if a.dtype == tl.float32:
        return product(a, b, acc, TERMS, TERMS)
    else:
        return dot(a, b, acc)


# -- launchers -------------------------------------------------------------------------------------------------------


def guard(device: torch.device) -> AbstractContextManager:
    """Makes ``device`` the current one: Triton launches there, not where its arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def addressable(features: Tensor) -> Tensor:
    """The features themselves, or a copy if within a tile (256 pixels or channels) their offsets exceed 32 bits."""
    return features if 256 * sum(features.stride()[1:]) < 2**31 else features.contiguous()


def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time at least; under the interpreter a number that makes small images split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def feature_terms(dtype: torch.dtype) -> int:
    """How many bfloat16 terms hold a number of that dtype."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
