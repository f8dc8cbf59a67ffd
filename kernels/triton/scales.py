"""The scales alpha of both relation matrices, and M = Q^T Q, as Triton kernels: what precedes the tile kernel.

The formulas are those of formulas.py. In PyTorch they take several times as many launches, float32 copies of the
features and, if TF32 is allowed, products that are too coarse for scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import Relation, Scales
from .configurations import BLOCK_CHANNELS, BLOCK_DEPTH, BLOCK_PIXELS, OPTIONS
from .primitives import (
    FULL,
    feature_terms,
    features_product,
    jit,
    load_tile,
    multiprocessors,
    product,
    store_tile,
    tl,
    triton,
)

# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def store_symmetric(ptr, tile, start_i, start_j, channels, BLOCK_C: tl.constexpr):
    """Store a tile of a symmetric matrix (C, C) and its mirror image."""
    store_tile(ptr, tile, start_i, start_j, channels, 1, channels, channels, BLOCK_C, BLOCK_C)
    if start_i < start_j:
        store_tile(ptr, tl.trans(tile), start_j, start_i, channels, 1, channels, channels, BLOCK_C, BLOCK_C)


@jit
def moment_tile(
    ptr, out_ptr, tile, first, last, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Compute one tile of Q^T Q over the pixels [first, last), unless the tile is below the diagonal."""
    blocks = tl.cdiv(channels, BLOCK_C)
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if start_i <= start_j:
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(ptr, start_n, start_i, stride_n, stride_c, pixels, channels, BLOCK_N, BLOCK_C)
            right = load_tile(ptr, start_n, start_j, stride_n, stride_c, pixels, channels, BLOCK_N, BLOCK_C)
            acc = features_product(tl.trans(left), right, acc, FULL)
        store_symmetric(out_ptr, acc, start_i, start_j, channels, BLOCK_C)


@jit
def moment_kernel(
    student_ptr,
    teacher_ptr,
    moment_s_ptr,
    moment_t_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    stride_mp,
    pixels,
    channels_s,
    channels_t,
    splits,
    split_pixels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the partial moments Q^T Q (splits, B, C, C) of the student's and the teacher's features in one launch.

    A program computes one tile of the student's or the teacher's moment over ``split_pixels`` pixels.
    """
    tiles_s = tl.cdiv(channels_s, BLOCK_C) * tl.cdiv(channels_s, BLOCK_C)
    tiles = tiles_s + tl.cdiv(channels_t, BLOCK_C) * tl.cdiv(channels_t, BLOCK_C)
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    image = (program // tiles // splits).to(tl.int64)
    first = split * split_pixels
    last = tl.minimum(first + split_pixels, pixels)
    part = split.to(tl.int64) * stride_mp
    if tile < tiles_s:
        student_ptr += image * stride_sb
        moment_s_ptr += part + image * channels_s * channels_s
        moment_tile(
            student_ptr, moment_s_ptr, tile, first, last, stride_sn, stride_sc, pixels, channels_s, BLOCK_N, BLOCK_C
        )
    else:
        tile -= tiles_s
        teacher_ptr += image * stride_tb
        moment_t_ptr += part + image * channels_t * channels_t
        moment_tile(
            teacher_ptr, moment_t_ptr, tile, first, last, stride_tn, stride_tc, pixels, channels_t, BLOCK_N, BLOCK_C
        )


@jit
def power_of_two_scale(moment_ptr, channels, BLOCK_C: tl.constexpr):
    """Return ``formulas.power_of_two_scale`` of M (C, C), and the reciprocal of its square."""
    largest = tl.zeros([BLOCK_C], tl.float32)
    for start_c in range(0, channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        diagonal = tl.load(moment_ptr + offs_c * (channels + 1), mask=offs_c < channels, other=0.0)
        largest = tl.maximum(largest, diagonal)
    # from the bits of its exponent, at least those of the smallest normal number: otherwise 1 / size^2 overflows
    exponent = tl.maximum((tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) - 127, -126) >> 1
    size = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return size, ((127 - 2 * exponent) << 23).to(tl.float32, bitcast=True)


@jit
def scale_rows(
    ptr,
    moment_ptr,
    alpha_ptr,
    start_m,
    stride_n,
    stride_c,
    pixels,
    channels,
    eps,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute alpha of BLOCK_M pixels: 1 / sqrt(q^T M q) for "row", 1 / sqrt(q^T q) for "cosine"; 0 for zero norms."""
    square = tl.zeros([BLOCK_M], tl.float32)
    size = 1.0
    if NORMALIZE == "row":
        size, inverse_square = power_of_two_scale(moment_ptr, channels, BLOCK_C)
    for start_c in range(0, channels, BLOCK_C):
        by_moment = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if NORMALIZE == "row":
            for start_k in range(0, channels, BLOCK_K):
                left = load_tile(ptr, start_m, start_k, stride_n, stride_c, pixels, channels, BLOCK_M, BLOCK_K)
                moment = load_tile(moment_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
                by_moment = product(left, moment * inverse_square, by_moment, TERMS, FULL)
        features = load_tile(ptr, start_m, start_c, stride_n, stride_c, pixels, channels, BLOCK_M, BLOCK_C)
        features = features.to(tl.float32)
        square += tl.sum((by_moment if NORMALIZE == "row" else features) * features, 1)
    norm = tl.sqrt_rn(tl.where(square < 0, 0.0, square)) * size  # rounding can make a square slightly negative
    # 0 * norm makes alpha NaN if the norm overflows or is NaN; otherwise it would be 0, as for a zero-norm pixel
    alpha = tl.where(norm <= eps, 0.0, tl.div_rn(1.0, tl.where(norm <= eps, 1.0, norm)) + 0.0 * norm)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(alpha_ptr + offs_m, alpha, mask=offs_m < pixels)


@jit
def scale_kernel(
    student_ptr,
    teacher_ptr,
    moment_s_ptr,
    moment_t_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    pixels,
    channels_s,
    channels_t,
    eps,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute alpha (B, N) of the student and the teacher in one launch.

    A program computes a row block of the student's or the teacher's alpha.
    """
    program = tl.program_id(0) // 2
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    start_m = program % row_blocks * BLOCK_M
    image = (program // row_blocks).to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        scale_rows(
            student_ptr + image * stride_sb,
            moment_s_ptr + image * channels_s * channels_s if NORMALIZE == "row" else None,
            alpha_s_ptr + image * pixels,
            start_m,
            stride_sn,
            stride_sc,
            pixels,
            channels_s,
            eps,
            NORMALIZE,
            TERMS,
            BLOCK_M,
            BLOCK_K,
            BLOCK_C,
        )
    else:
        scale_rows(
            teacher_ptr + image * stride_tb,
            moment_t_ptr + image * channels_t * channels_t if NORMALIZE == "row" else None,
            alpha_t_ptr + image * pixels,
            start_m,
            stride_tn,
            stride_tc,
            pixels,
            channels_t,
            eps,
            NORMALIZE,
            TERMS,
            BLOCK_M,
            BLOCK_K,
            BLOCK_C,
        )


# -- launchers -------------------------------------------------------------------------------------------------------


def moment_splits(programs: int, pixels: int, device: torch.device) -> tuple[int, int]:
    """Return the number of parts that occupies the device with a sum over pixels, and the pixels of a part."""
    most = min(8, 4 * multiprocessors(device) // programs, triton.cdiv(pixels, 4 * BLOCK_DEPTH))
    split_pixels = triton.cdiv(triton.cdiv(pixels, max(1, most)), BLOCK_DEPTH) * BLOCK_DEPTH
    return triton.cdiv(pixels, split_pixels), split_pixels


def moments_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q^T Q (B, C_s, C_s) and (B, C_t, C_t) in float32 of features (B, N, C_s) and (B, N, C_t)."""
    batch, pixels, channels_s = student.shape
    channels_t = teacher.shape[2]
    tiles = batch * (triton.cdiv(channels_s, BLOCK_CHANNELS) ** 2 + triton.cdiv(channels_t, BLOCK_CHANNELS) ** 2)
    splits, split_pixels = moment_splits(tiles, pixels, student.device)
    sizes = [batch * channels**2 for channels in (channels_s, channels_t)]
    # several parts share one tensor, so that one launch sums both moments; with a single part there are two tensors, so
    # that the teacher's can be freed early
    if splits > 1:
        parts = student.new_empty((splits, sum(sizes)), dtype=torch.float32)
        moment_s, moment_t = parts[:, : sizes[0]], parts[:, sizes[0] :]
    else:
        moment_s, moment_t = (student.new_empty((1, size), dtype=torch.float32) for size in sizes)
    moment_kernel[(tiles * splits,)](
        student,
        teacher,
        moment_s,
        moment_t,
        *student.stride(),
        *teacher.stride(),
        moment_s.stride(0),
        pixels,
        channels_s,
        channels_t,
        splits,
        split_pixels,
        BLOCK_N=BLOCK_DEPTH,
        BLOCK_C=BLOCK_CHANNELS,
        **OPTIONS,
    )
    if splits > 1:
        moment_s, moment_t = parts.sum(0).split(sizes)
    return moment_s.view(batch, channels_s, channels_s), moment_t.view(batch, channels_t, channels_t)


def scales_of(student: Tensor, teacher: Tensor, relation: Relation) -> Scales:
    """Return ``formulas.scales_of`` in float32."""
    if relation.normalize == "none":
        return Scales(None, None, None)
    batch, pixels, _ = student.shape
    moment_s, moment_t = moments_of(student, teacher) if relation.normalize == "row" else (None, None)
    alpha_s, alpha_t = (student.new_empty((batch, pixels), dtype=torch.float32) for _ in range(2))
    scale_kernel[(2 * batch * triton.cdiv(pixels, BLOCK_PIXELS),)](
        student,
        teacher,
        moment_s,
        moment_t,
        alpha_s,
        alpha_t,
        *student.stride(),
        *teacher.stride(),
        pixels,
        student.shape[2],
        teacher.shape[2],
        relation.eps,
        NORMALIZE=relation.normalize,
        TERMS=feature_terms(student.dtype),
        BLOCK_M=BLOCK_PIXELS,
        BLOCK_K=BLOCK_DEPTH,
        BLOCK_C=BLOCK_CHANNELS,
        **OPTIONS,
    )
    return Scales(alpha_s, alpha_t, moment_s)
