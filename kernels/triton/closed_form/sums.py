"""The sums of the partial moments in float64: partial losses, and the factors of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formulas import Scales
from ..primitives import FULL, jit, load_tile, split_terms, store_tile, tl, triton
from .moments import load_vector
from .options import BLOCK_FINISH, BLOCK_VECTOR, FINISH_OPTIONS

# -- kernels -----------------------------------------------------------------------------------------------------------


@jit
def sum_splits(ptr, start_i, start_j, rows, columns, stride_split, splits, BLOCK: tl.constexpr):
    """Return the sum in float64 of a tile of the partial moments, in the order of the splits."""
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for split in range(splits):
        part_ptr = ptr + tl.cast(split, tl.int64) * stride_split
        total += load_tile(part_ptr, start_i, start_j, columns, 1, rows, columns, BLOCK, BLOCK)
    return total


@jit
def store_terms(ptr, tile, start_i, start_j, rows, columns, stride_term, BLOCK: tl.constexpr):
    """Store the three bfloat16 terms of a tile of a matrix (rows, columns)."""
    first, second, third = split_terms(tile, FULL)
    store_tile(ptr, first, start_i, start_j, columns, 1, rows, columns, BLOCK, BLOCK)
    store_tile(ptr + stride_term, second, start_i, start_j, columns, 1, rows, columns, BLOCK, BLOCK)
    store_tile(ptr + 2 * stride_term, third, start_i, start_j, columns, 1, rows, columns, BLOCK, BLOCK)


@jit
def total(tile):
    """Return the sum of a tile's elements."""
    return tl.sum(tl.sum(tile, 1), 0)


@jit
def finish_kernel(
    moments_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    partial_ptr,
    factors_ptr,
    stride_term,
    pixels,
    channels_s,
    channels_t,
    splits,
    DIFFERENCE: tl.constexpr,
    SCALED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum the partial moments, and compute partial losses (B, programs) in float64 and the factors of the gradient.

    The factors are 4 M_ss (C_s, C_s) and -4 M_ts (C_t, C_s), one after the other, in three bfloat16 terms each. A
    program computes one tile of one moment, or with DIFFERENCE the same tile of all moments.
    """
    blocks_s, blocks_t = tl.cdiv(channels_s, BLOCK), tl.cdiv(channels_t, BLOCK)
    size_ss, size_st = channels_s * channels_s, channels_s * channels_t
    size = size_ss + size_st + channels_t * channels_t
    tiles_ss, tiles_st = blocks_s * blocks_s, blocks_s * blocks_t
    if DIFFERENCE:
        tiles = tiles_ss
    else:
        tiles = tiles_ss + tiles_st + blocks_t * blocks_t
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    tile = program % tiles
    moments_ptr += image * splits * size
    factors_ptr += image * (channels_s + channels_t) * channels_s
    if DIFFERENCE:
        start_i, start_j = tile // blocks_s * BLOCK, tile % blocks_s * BLOCK
        cross_ptr = moments_ptr + size_ss
        ff = sum_splits(moments_ptr, start_i, start_j, channels_s, channels_s, size, splits, BLOCK)
        ee = sum_splits(cross_ptr + size_ss, start_i, start_j, channels_s, channels_s, size, splits, BLOCK)
        fe = sum_splits(cross_ptr, start_i, start_j, channels_s, channels_s, size, splits, BLOCK)
        ef = tl.trans(sum_splits(cross_ptr, start_j, start_i, channels_s, channels_s, size, splits, BLOCK))
        loss = 0.5 * total(ff * ee + fe * ef)
        if GRAD:
            student = (ff + fe + ef + ee).to(tl.float32)
            teacher = (ef + ee - ff - fe).to(tl.float32)
            store_terms(factors_ptr, student, start_i, start_j, channels_s, channels_s, stride_term, BLOCK)
            factors_ptr += size_ss
            store_terms(factors_ptr, teacher, start_i, start_j, channels_s, channels_s, stride_term, BLOCK)
    elif tile < tiles_ss:
        start_i, start_j = tile // blocks_s * BLOCK, tile % blocks_s * BLOCK
        moment = sum_splits(moments_ptr, start_i, start_j, channels_s, channels_s, size, splits, BLOCK)
        loss = total(moment * moment)
        if GRAD:
            factor = (4 * moment).to(tl.float32)
            store_terms(factors_ptr, factor, start_i, start_j, channels_s, channels_s, stride_term, BLOCK)
    elif tile < tiles_ss + tiles_st:
        start_i, start_j = (tile - tiles_ss) // blocks_t * BLOCK, (tile - tiles_ss) % blocks_t * BLOCK
        moments_ptr += size_ss
        moment = sum_splits(moments_ptr, start_i, start_j, channels_s, channels_t, size, splits, BLOCK)
        loss = -2 * total(moment * moment)
        if GRAD:
            factor = tl.trans((-4 * moment).to(tl.float32))
            factors_ptr += size_ss
            store_terms(factors_ptr, factor, start_j, start_i, channels_t, channels_s, stride_term, BLOCK)
    else:
        tile_tt = tile - tiles_ss - tiles_st
        start_i, start_j = tile_tt // blocks_t * BLOCK, tile_tt % blocks_t * BLOCK
        moments_ptr += size_ss + size_st
        moment = sum_splits(moments_ptr, start_i, start_j, channels_t, channels_t, size, splits, BLOCK)
        loss = total(moment * moment)
    if SCALED:
        # D_ii counts as 0, but the sums contain 1 where only one of student and teacher has norm 0 at pixel i
        ties = tl.zeros([BLOCK_P], tl.int32)
        for start_n in range(tile * BLOCK_P, pixels, tiles * BLOCK_P):
            alpha_s = load_vector(alpha_s_ptr + image * pixels, start_n, pixels, BLOCK_P)
            alpha_t = load_vector(alpha_t_ptr + image * pixels, start_n, pixels, BLOCK_P)
            ties += ((alpha_s != 0) != (alpha_t != 0)).to(tl.int32)
        loss -= tl.sum(ties, 0).to(tl.float64)
    tl.store(partial_ptr + program, loss)


# -- launchers -------------------------------------------------------------------------------------------------------


def losses_and_factors(
    moments: Tensor, pixels: int, channels: tuple[int, int], scales: Scales, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return partial losses (B, programs) and the factors of the gradient (3, B, C_s + C_t, C_s).

    Args:
        moments: of ``moments_of``.
        pixels: N.
        channels: C_s, C_t.
        scales: alpha of student and teacher.
        need_grad: whether to compute the factors.
    """
    channels_s, channels_t = channels
    batch, splits, _ = moments.shape
    difference = channels_s == channels_t
    blocks_s, blocks_t = (triton.cdiv(channels, BLOCK_FINISH) for channels in (channels_s, channels_t))
    programs = blocks_s**2 if difference else blocks_s**2 + blocks_s * blocks_t + blocks_t**2
    partials = moments.new_empty((batch, programs), dtype=torch.float64)
    images = batch if need_grad else 0
    factors = moments.new_empty((3, images, channels_s + channels_t, channels_s), dtype=torch.bfloat16)
    finish_kernel[(batch * programs,)](
        moments,
        scales.student,
        scales.teacher,
        partials,
        factors,
        factors.stride(0),
        pixels,
        channels_s,
        channels_t,
        splits,
        DIFFERENCE=difference,
        SCALED=scales.student is not None,
        GRAD=need_grad,
        BLOCK=BLOCK_FINISH,
        BLOCK_P=BLOCK_VECTOR,
        **FINISH_OPTIONS,
    )
    return partials, factors
