"""The moments of both networks' features, as partial sums over ranges of pixels."""

from __future__ import annotations

import torch

from ..configurations import TERMS, number_format
from ..moments import store_symmetric
from ..plans import Array, Plan
from ..primitives import (
    Matrix,
    contiguous,
    jit,
    kernel_constant,
    load_tile,
    load_vector,
    multiprocessors,
    product,
    store_tile,
    tl,
    triton,
)
from .options import BLOCK_CHANNELS, BLOCK_SUM, OPTIONS, SPLIT_PIXELS

BLOCK_N, BLOCK_C = kernel_constant(BLOCK_SUM), kernel_constant(BLOCK_CHANNELS)

# -- kernels -----------------------------------------------------------------------------------------------------------


@jit
def weighted_moment_tile(
    left,
    right,
    alpha_l_ptr,
    alpha_r_ptr,
    distance_ptr,
    out_ptr,
    tile,
    first,
    last,
    SYMMETRIC: tl.constexpr,
    TERMS: tl.constexpr,
    TERMS_WEIGHTED: tl.constexpr,
):
    """Compute one tile of the sum of left_n (alpha_l alpha_r)_n right_n^T over the pixels [first, last).

    If distance_ptr is not None, the weights are multiplied by 1 - distance.
    The weight is on one side, so that 16-bit features on the other are one or two exact terms.
    """
    pixels, blocks = left.rows, tl.cdiv(right.columns, BLOCK_C)
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if not SYMMETRIC or start_i <= start_j:
        total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            a = load_tile(left, start_n, start_i, BLOCK_N, BLOCK_C)
            b = load_tile(right, start_n, start_j, BLOCK_N, BLOCK_C)
            if alpha_l_ptr is not None:
                weights = load_vector(alpha_l_ptr, start_n, pixels, BLOCK_N)
                weights *= load_vector(alpha_r_ptr, start_n, pixels, BLOCK_N)
                if distance_ptr is not None:
                    weights *= 1 - load_vector(distance_ptr, start_n, pixels, BLOCK_N)
                b = b.to(tl.float32) * weights[:, None]
            zero = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
            total += product(tl.trans(a), b, zero, TERMS, TERMS_WEIGHTED)
        out = contiguous(out_ptr, left.columns, right.columns)
        if SYMMETRIC:
            store_symmetric(out, total, start_i, start_j)
        else:
            store_tile(out, total, start_i, start_j)


@jit
def load_combined(student, teacher, alpha_s_ptr, alpha_t_ptr, sign, start_n, start_c):
    """Load z + sign * y of BLOCK_N pixels: f for sign = 1, e for sign = -1, z for sign = 0."""
    z = load_tile(student, start_n, start_c, BLOCK_N, BLOCK_C)
    y = load_tile(teacher, start_n, start_c, BLOCK_N, BLOCK_C)
    z, y = z.to(tl.float32), y.to(tl.float32)
    if alpha_s_ptr is not None:
        z *= load_vector(alpha_s_ptr, start_n, student.rows, BLOCK_N)[:, None]
        y *= load_vector(alpha_t_ptr, start_n, student.rows, BLOCK_N)[:, None]
    return z + sign * y


@jit
def moments_size(channels_s, channels_t, MOMENTS: tl.constexpr):
    """Return the number of elements of the first MOMENTS moments, or of tiles, given blocks of channels."""
    size = channels_s * channels_s + channels_s * channels_t
    if MOMENTS > 2:
        size += channels_t * channels_t
    if MOMENTS > 3:
        size += channels_s * channels_s
    return size


@jit
def moments_kernel(
    student_ptr,
    teacher_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    distance_ptr,
    moments_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    pixels,
    channels_s,
    channels_t,
    splits,
    split_pixels,
    DIFFERENCE: tl.constexpr,
    MOMENTS: tl.constexpr,
    TERMS: tl.constexpr,
    TERMS_WEIGHTED: tl.constexpr,
):
    """Compute partial sums of the first MOMENTS moments, (B, splits, C_s^2 + C_s C_t + C_t^2 + C_s^2).

    They are M_ss, M_st, M_tt, or with DIFFERENCE S_ff, S_fe, S_ee, and W_d. If distance_ptr is not None, the first is
    M_ss - W_d. A program computes one tile over ``split_pixels`` pixels.
    """
    if DIFFERENCE:
        channels_t = channels_s  # so that both networks share masks
    blocks_s, blocks_t = tl.cdiv(channels_s, BLOCK_C), tl.cdiv(channels_t, BLOCK_C)
    tiles_ss, tiles_st = blocks_s * blocks_s, blocks_s * blocks_t
    tiles = moments_size(blocks_s, blocks_t, MOMENTS)
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles
    first = part % splits * split_pixels
    last = tl.minimum(first + split_pixels, pixels)
    image = (part // splits).to(tl.int64)
    student = Matrix(student_ptr + image * stride_sb, pixels, channels_s, stride_sn, stride_sc)
    teacher = Matrix(teacher_ptr + image * stride_tb, pixels, channels_t, stride_tn, stride_tc)
    if alpha_s_ptr is not None:
        alpha_s_ptr += image * pixels
        alpha_t_ptr += image * pixels
    if distance_ptr is not None:
        distance_ptr += image * pixels
    size_ss, size_st = channels_s * channels_s, channels_s * channels_t
    moments_ptr += part.to(tl.int64) * moments_size(channels_s, channels_t, MOMENTS)
    if DIFFERENCE:
        matrix = tile // tiles_ss
        sign_l = tl.where(matrix == 2, -1.0, tl.where(matrix == 3, 0.0, 1.0))
        sign_r = tl.where(matrix == 0, 1.0, tl.where(matrix == 3, 0.0, -1.0))
        tile = tile % tiles_ss
        start_i, start_j = tile // blocks_s * BLOCK_C, tile % blocks_s * BLOCK_C
        if matrix == 1 or start_i <= start_j:
            total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
            for start_n in range(first, last, BLOCK_N):
                start_n = tl.multiple_of(start_n, BLOCK_N)
                left = load_combined(student, teacher, alpha_s_ptr, alpha_t_ptr, sign_l, start_n, start_i)
                right = load_combined(student, teacher, alpha_s_ptr, alpha_t_ptr, sign_r, start_n, start_j)
                if MOMENTS > 3:
                    distances = load_vector(distance_ptr, start_n, pixels, BLOCK_N)
                    right *= tl.where(matrix == 3, distances, 1.0)[:, None]
                zero = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
                total += product(tl.trans(left), right, zero, TERMS_WEIGHTED, TERMS_WEIGHTED)
            out = contiguous(moments_ptr + matrix * size_ss, channels_s, channels_s)
            store_tile(out, total, start_i, start_j)
            if matrix != 1 and start_i < start_j:
                store_tile(out, tl.trans(total), start_j, start_i)
    elif tile < tiles_ss:
        weighted_moment_tile(
            student,
            student,
            alpha_s_ptr,
            alpha_s_ptr,
            distance_ptr,
            moments_ptr,
            tile,
            first,
            last,
            True,
            TERMS,
            TERMS_WEIGHTED,
        )
    elif tile < tiles_ss + tiles_st:
        weighted_moment_tile(
            student,
            teacher,
            alpha_s_ptr,
            alpha_t_ptr,
            None,
            moments_ptr + size_ss,
            tile - tiles_ss,
            first,
            last,
            False,
            TERMS,
            TERMS_WEIGHTED,
        )
    else:
        weighted_moment_tile(
            teacher,
            teacher,
            alpha_t_ptr,
            alpha_t_ptr,
            None,
            moments_ptr + size_ss + size_st,
            tile - tiles_ss - tiles_st,
            first,
            last,
            True,
            TERMS,
            TERMS_WEIGHTED,
        )


# -- launchers -------------------------------------------------------------------------------------------------------


def term_counts(dtype: torch.dtype, float32_factor: bool) -> tuple[int, int]:
    """Return the numbers of bfloat16 terms of the left and the right factor of a moment.

    16-bit features are exact. Weights and sums of features are float32 numbers, and so is the right factor then.
    """
    terms = TERMS[number_format(dtype)]
    if dtype == torch.float32:
        return terms, terms
    # with (2, 2) terms, product() leaves out the smallest product, which float16 needs
    return terms, 3 if float32_factor or terms == 2 else terms


def split_count(tiles: int, pixels: int, device: torch.device) -> tuple[int, int]:
    """Return into how many parts the pixels are split, and the pixels of a part, at most SPLIT_PIXELS."""
    wanted = max(4 * multiprocessors(device) // tiles, triton.cdiv(pixels, SPLIT_PIXELS), 1)
    split_pixels = triton.cdiv(triton.cdiv(pixels, wanted), BLOCK_SUM) * BLOCK_SUM
    return triton.cdiv(pixels, split_pixels), split_pixels


def plan_moments(
    plan: Plan,
    student: Array,
    teacher: Array,
    alphas: tuple[Array | None, Array | None],
    count: int = 3,
    distances: Array | None = None,
) -> Array:
    """Plan the launch that computes partial sums of the first ``count`` moments, (B, splits, size of all).

    See ``moments_kernel``. ``alphas`` are the scales of student and teacher.
    """
    batch, pixels, channels_s = student.shape
    channels_t = teacher.shape[2]
    blocks_s, blocks_t = (triton.cdiv(channels, BLOCK_CHANNELS) for channels in (channels_s, channels_t))
    tiles = sum((blocks_s**2, blocks_s * blocks_t, blocks_t**2, blocks_s**2)[:count])
    splits, split_pixels = split_count(batch * tiles, pixels, plan.device)
    size = sum((channels_s**2, channels_s * channels_t, channels_t**2, channels_s**2)[:count])
    moments = plan.scratch(batch, splits, size)
    difference = channels_s == channels_t
    terms, weighted_terms = term_counts(student.dtype, difference or alphas[0] is not None)
    plan.launch(
        moments_kernel,
        (batch * splits * tiles,),
        student,
        teacher,
        *alphas,
        distances,
        moments,
        *student.strides,
        *teacher.strides,
        pixels,
        channels_s,
        channels_t,
        splits,
        split_pixels,
        DIFFERENCE=difference,
        MOMENTS=count,
        TERMS=terms,
        TERMS_WEIGHTED=weighted_terms,
        **OPTIONS,
    )
    return moments
