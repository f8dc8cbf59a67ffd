"""The sums of the partial moments in float64: partial losses, and the factors of scales and gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plans import Array, Plan
from ..primitives import (
    FULL,
    contiguous,
    jit,
    kernel_constant,
    load_tile,
    load_vector,
    moved,
    split_terms,
    store_tile,
    tl,
    triton,
)
from .moments import moments_size
from .options import BLOCK_FINISH, BLOCK_VECTOR, FINISH_OPTIONS

BLOCK, BLOCK_P = kernel_constant(BLOCK_FINISH), kernel_constant(BLOCK_VECTOR)

# -- kernels -----------------------------------------------------------------------------------------------------------


@jit
def sum_splits(matrix, start_i, start_j, stride_split, splits):
    """Return the sum in float64 of a tile of the partial moments, in the order of the splits."""
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for split in range(splits):
        total += load_tile(moved(matrix, tl.cast(split, tl.int64) * stride_split), start_i, start_j, BLOCK, BLOCK)
    return total


@jit
def store_terms(matrix, tile, start_i, start_j, stride_term):
    """Store the three bfloat16 terms of a tile of a matrix."""
    terms = split_terms(tile, FULL)
    second = moved(matrix, stride_term)
    store_tile(matrix, terms[0], start_i, start_j)
    store_tile(second, terms[1], start_i, start_j)
    store_tile(moved(second, stride_term), terms[2], start_i, start_j)


@jit
def total(tile):
    """Return the sum of a tile's elements."""
    return tl.sum(tl.sum(tile, 1), 0)


@jit
def finish_kernel(
    moments_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    gains_ptr,
    partial_ptr,
    factors_ptr,
    teacher_factor_ptr,
    sums_ptr,
    stride_term,
    stride_teacher_term,
    pixels,
    channels_s,
    channels_t,
    splits,
    STAGE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Sum the partial moments, and compute partial losses (B, programs) in float64 and the factors of the gradient.

    The factors are 4 M_ss (C_s, C_s) and -4 M_ts (C_t, C_s), one after the other, in three bfloat16 terms each. A
    program computes one tile of one moment, or with DIFFERENCE the same tile of all moments.

    The first STAGE of "row" also computes 4 M_tt (C_t, C_t) in terms, no loss, and with DIFFERENCE sums of S (B, 3, C,
    C). The second has the factors 4 (W_ss - W_d) and -4 W_ts times the gains, and a loss only with DIFFERENCE.
    """
    if DIFFERENCE:
        channels_t = channels_s  # so that all matrices share masks
    blocks_s, blocks_t = tl.cdiv(channels_s, BLOCK), tl.cdiv(channels_t, BLOCK)
    size_ss, size_st = channels_s * channels_s, channels_s * channels_t
    size = moments_size(channels_s, channels_t, MOMENTS)
    tiles_ss, tiles_st = blocks_s * blocks_s, blocks_s * blocks_t
    tiles = tiles_ss if DIFFERENCE else moments_size(blocks_s, blocks_t, MOMENTS)
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    tile = program % tiles
    moments_ptr += image * splits * size
    moment_ss = contiguous(moments_ptr, channels_s, channels_s)
    moment_st = contiguous(moments_ptr + size_ss, channels_s, channels_t)
    moment_tt = contiguous(moments_ptr + size_ss + size_st, channels_t, channels_t)
    if factors_ptr is not None:
        factors_ptr += image * (channels_s + channels_t) * channels_s
        factor_ss = contiguous(factors_ptr, channels_s, channels_s)
        factor_ts = contiguous(factors_ptr + size_ss, channels_t, channels_s)
    if STAGE == "first":
        factor_tt = contiguous(teacher_factor_ptr + image * channels_t * channels_t, channels_t, channels_t)
    gain_ss, gain_st = 1.0, 1.0
    if STAGE == "second":
        gain_s, gain_t = tl.load(gains_ptr + 2 * image), tl.load(gains_ptr + 2 * image + 1)
        gain_ss, gain_st = gain_s * gain_s, gain_s * gain_t
    if DIFFERENCE:
        start_i, start_j = tile // blocks_s * BLOCK, tile % blocks_s * BLOCK
        ff = sum_splits(moment_ss, start_i, start_j, size, splits)
        ee = sum_splits(moment_tt, start_i, start_j, size, splits)
        fe = sum_splits(moment_st, start_i, start_j, size, splits)
        ef = tl.trans(sum_splits(moment_st, start_j, start_i, size, splits))
        if STAGE != "only":
            sum_ff = contiguous(sums_ptr + image * 3 * size_ss, channels_s, channels_s)
            sum_fe = moved(sum_ff, size_ss)
            sum_ee = moved(sum_fe, size_ss)
        if STAGE == "second":
            raw_ff = load_tile(sum_ff, start_i, start_j, BLOCK, BLOCK)
            raw_ef = load_tile(sum_fe, start_j, start_i, BLOCK, BLOCK)
            raw_ee = load_tile(sum_ee, start_i, start_j, BLOCK, BLOCK)
            loss = 0.25 * total(ff * raw_ee + ee * raw_ff + 2 * fe * tl.trans(raw_ef))
        else:
            loss = 0.5 * total(ff * ee + fe * ef)
        if STAGE == "first":
            store_tile(sum_ff, ff, start_i, start_j)
            store_tile(sum_fe, fe, start_i, start_j)
            store_tile(sum_ee, ee, start_i, start_j)
            store_terms(factor_tt, (ff + ee - fe - ef).to(tl.float32), start_i, start_j, stride_teacher_term)
        if factors_ptr is not None:
            student = ff + fe + ef + ee
            if MOMENTS > 3:
                by_distance = moved(moment_tt, size_ss)
                student -= 4 * sum_splits(by_distance, start_i, start_j, size, splits)
            student = student.to(tl.float32) * gain_ss
            teacher = (ef + ee - ff - fe).to(tl.float32) * gain_st
            store_terms(factor_ss, student, start_i, start_j, stride_term)
            store_terms(factor_ts, teacher, start_i, start_j, stride_term)
    elif tile < tiles_ss:
        start_i, start_j = tile // blocks_s * BLOCK, tile % blocks_s * BLOCK
        moment = sum_splits(moment_ss, start_i, start_j, size, splits)
        loss = total(moment * moment)
        if factors_ptr is not None:
            store_terms(factor_ss, (4 * moment).to(tl.float32) * gain_ss, start_i, start_j, stride_term)
    elif tile < tiles_ss + tiles_st:
        start_i, start_j = (tile - tiles_ss) // blocks_t * BLOCK, (tile - tiles_ss) % blocks_t * BLOCK
        moment = sum_splits(moment_st, start_i, start_j, size, splits)
        loss = -2 * total(moment * moment)
        if factors_ptr is not None:
            factor = tl.trans((-4 * moment).to(tl.float32) * gain_st)
            store_terms(factor_ts, factor, start_j, start_i, stride_term)
    else:
        tile_tt = tile - tiles_ss - tiles_st
        start_i, start_j = tile_tt // blocks_t * BLOCK, tile_tt % blocks_t * BLOCK
        moment = sum_splits(moment_tt, start_i, start_j, size, splits)
        loss = total(moment * moment)
        if STAGE == "first":
            store_terms(factor_tt, (4 * moment).to(tl.float32), start_i, start_j, stride_teacher_term)
    if alpha_s_ptr is not None and STAGE == "only":
        # D_ii counts as 0, but the sums contain 1 where only one of student and teacher has norm 0 at pixel i
        ties = tl.zeros([BLOCK_P], tl.int32)
        for start_n in range(tile * BLOCK_P, pixels, tiles * BLOCK_P):
            alpha_s = load_vector(alpha_s_ptr + image * pixels, start_n, pixels, BLOCK_P)
            alpha_t = load_vector(alpha_t_ptr + image * pixels, start_n, pixels, BLOCK_P)
            ties += ((alpha_s != 0) != (alpha_t != 0)).to(tl.int32)
        loss -= tl.sum(ties, 0).to(tl.float64)
    if partial_ptr is not None:
        tl.store(partial_ptr + program, loss)


# -- launchers -------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """The only stage of sums for "cosine" and "none", or one of two for "row", and what this reads or writes besides.

    Attributes:
        name: "only", "first" or "second".
        gains: (B, 2), read by the second stage.
        teacher_factor: (3, B, C_t, C_t), written by the first stage.
        sums: (B, 3, C, C), written by the first stage and read by the second; for equal numbers of channels.
    """

    name: str
    gains: Array | None = None
    teacher_factor: Array | None = None
    sums: Array | None = None


ONLY = Stage("only")


def plan_sums(
    plan: Plan,
    moments: Array,
    pixels: int,
    channels: tuple[int, int],
    alphas: tuple[Array | None, Array | None],
    need_factors: bool,
    count: int = 3,
    stage: Stage = ONLY,
) -> tuple[Array | None, Array | None]:
    """Plan the launch that computes partial losses (B, programs) and the factors (3, B, C_s + C_t, C_s).

    Args:
        plan: the plan that the launch is added to.
        moments: of ``plan_moments``.
        pixels: N.
        channels: C_s, C_t.
        alphas: the scales of student and teacher.
        need_factors: whether to compute the factors.
        count: the number of moments.
        stage: of "row", the first computes no losses, and the second only for equal numbers of channels.
    """
    channels_s, channels_t = channels
    batch, splits, _ = moments.shape
    difference = channels_s == channels_t
    blocks_s, blocks_t = (triton.cdiv(width, BLOCK_FINISH) for width in channels)
    programs = blocks_s**2 if difference else sum((blocks_s**2, blocks_s * blocks_t, blocks_t**2)[:count])
    partials = factors = None
    if stage.name == "only" or (stage.name == "second" and difference):
        partials = plan.scratch(batch, programs, dtype=torch.float64)
    if need_factors:
        factors = plan.scratch(3, batch, channels_s + channels_t, channels_s, dtype=torch.bfloat16)
    plan.launch(
        finish_kernel,
        (batch * programs,),
        moments,
        *alphas,
        stage.gains,
        partials,
        factors,
        stage.teacher_factor,
        stage.sums,
        batch * (channels_s + channels_t) * channels_s,
        batch * channels_t**2,
        pixels,
        channels_s,
        channels_t,
        splits,
        STAGE=stage.name,
        DIFFERENCE=difference,
        MOMENTS=count,
        **FINISH_OPTIONS,
    )
    return partials, factors
