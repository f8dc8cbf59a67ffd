"""The algebra around the tiles as Triton kernels: M = Q^T Q and the scales before, M_w and the gradient after.

The mathematics is that of algebra.py, whose PyTorch takes several times as many launches, float32 copies of the
features and, where TF32 is allowed, fewer bits than the scales need. Also here: how all the kernels of backend
``triton`` read features and multiply them.

A float32 factor is split into bfloat16 terms of 8 bits each, as many as its precision needs, and the products of
terms are added up, the small ones first. Unlike TF32 this keeps float32's range, reaches any precision, works with
any operand layout, and means the same under Triton's interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import Relation, Scales, gradient_dtype
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

# The tiles of these kernels: of features, of matrices over channels, and how deep a step of a sum over either is.
PIXELS, CHANNELS, DEPTH = 64, 64, 32
PARTIALS = 1024  # how many partial losses are added at a time
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


class Partials(NamedTuple):
    """What the programs of the tile kernel leave, to be summed in a fixed order.

    loss: (B, programs). U: (splits, B, N, C_s) and h: (splits, B, N), or None, as in ``Tiles``.
    """

    loss: Tensor
    U: Tensor | None
    h: Tensor | None


# -- M and the scales ------------------------------------------------------------------------------------------------


@jit
def store_symmetric(ptr, tile, start_i, start_j, channels, BLOCK_C: tl.constexpr):
    """Store a tile of a symmetric (C, C) matrix, and its mirror image."""
    store_tile(ptr, tile, start_i, start_j, channels, 1, channels, channels, BLOCK_C, BLOCK_C)
    if start_i < start_j:
        store_tile(ptr, tl.trans(tile), start_j, start_i, channels, 1, channels, channels, BLOCK_C, BLOCK_C)


@jit
def moment_tile(
    ptr, out_ptr, tile, first, last, stride_n, stride_c, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One tile of Q^T Q over the pixels from first to last, unless it lies below the diagonal."""
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
    """Q^T Q (splits, B, C, C) of the student's and of the teacher's features, in one launch.

    A program does one tile of one of the two over ``split_pixels`` pixels.
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
    """``algebra.size_of`` of M (C, C), the power of two next below the root of its largest element; and 1 / size^2."""
    largest = tl.zeros([BLOCK_C], tl.float32)
    for start_c in range(0, channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        diagonal = tl.load(moment_ptr + offs_c * (channels + 1), mask=offs_c < channels, other=0.0)
        largest = tl.maximum(largest, diagonal)
    # by its exponent's bits, those of the smallest normal number at least, lest 1 / size^2 overflow
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
    """alpha of BLOCK_M pixels: 1 / sqrt(q^T M q) for "row", 1 / sqrt(q^T q) for "cosine", 0 for a dead pixel."""
    square = tl.zeros([BLOCK_M], tl.float32)
    size = 1.0
    if NORMALIZE == "row":
        size, shrink = power_of_two_scale(moment_ptr, channels, BLOCK_C)
    for start_c in range(0, channels, BLOCK_C):
        moved = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if NORMALIZE == "row":
            for start_k in range(0, channels, BLOCK_K):
                left = load_tile(ptr, start_m, start_k, stride_n, stride_c, pixels, channels, BLOCK_M, BLOCK_K)
                moment = load_tile(moment_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
                moved = product(left, moment * shrink, moved, TERMS, FULL)
        features = load_tile(ptr, start_m, start_c, stride_n, stride_c, pixels, channels, BLOCK_M, BLOCK_C)
        features = features.to(tl.float32)
        square += tl.sum((moved if NORMALIZE == "row" else features) * features, 1)
    norm = tl.sqrt_rn(tl.where(square < 0, 0.0, square)) * size  # rounding can leave a square just below 0
    # 0 * norm: where the square overflows, NaN rather than the 0 of a dead pixel, and where it is NaN that stays
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
    """alpha (B, N) of the student and of the teacher, in one launch: a program does a row block of one of the two."""
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


# -- the gradient ----------------------------------------------------------------------------------------------------


@jit
def load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N: tl.constexpr):
    """w_n size^2 of BLOCK_N pixels, w_n = h_n alpha_n^2."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    h = tl.zeros([BLOCK_N], tl.float32)
    for split in range(h_splits):
        h += tl.load(h_ptr + tl.cast(split, tl.int64) * stride_hs + offs_n, mask=offs_n < pixels, other=0.0)
    alpha = tl.load(alpha_ptr + offs_n, mask=offs_n < pixels, other=0.0) * size
    return h * alpha * alpha


@jit
def weighted_moment_kernel(
    student_ptr,
    h_ptr,
    alpha_ptr,
    moment_ptr,
    weighted_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_hs,
    stride_mp,
    pixels,
    channels,
    h_splits,
    splits,
    split_pixels,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """M_w = Q^T diag(w) Q times M's size^2, (splits, B, C, C): a program does one tile over ``split_pixels`` pixels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start_i = program // blocks % blocks * BLOCK_C
    start_j = program % blocks * BLOCK_C
    split = program // (blocks * blocks) % splits
    image = (program // (blocks * blocks) // splits).to(tl.int64)
    if start_i <= start_j:
        student_ptr += image * stride_sb
        size, _ = power_of_two_scale(moment_ptr + image * channels * channels, channels, BLOCK_C)
        first = split * split_pixels
        last = tl.minimum(first + split_pixels, pixels)
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(student_ptr, start_n, start_i, stride_sn, stride_sc, pixels, channels, BLOCK_N, BLOCK_C)
            right = load_tile(student_ptr, start_n, start_j, stride_sn, stride_sc, pixels, channels, BLOCK_N, BLOCK_C)
            weights = load_weights(
                h_ptr + image * pixels, alpha_ptr + image * pixels, size, start_n, stride_hs, pixels, h_splits, BLOCK_N
            )
            acc = product(tl.trans(left.to(tl.float32) * weights[:, None]), right, acc, FULL, TERMS)
        weighted_ptr += split.to(tl.int64) * stride_mp + image * channels * channels
        store_symmetric(weighted_ptr, acc, start_i, start_j, channels, BLOCK_C)


@jit
def gradient_kernel(
    student_ptr,
    U_ptr,
    h_ptr,
    alpha_ptr,
    moment_ptr,
    weighted_ptr,
    partial_ptr,
    loss_ptr,
    gradient_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_us,
    stride_ub,
    stride_un,
    stride_uc,
    stride_gb,
    stride_gn,
    stride_gc,
    stride_hs,
    stride_mp,
    pixels,
    channels,
    splits,
    weighted_splits,
    partials,
    weight,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dL/dQ of one tile of the student's features, and the loss of each image: sums of what the programs left.

    A program reads of U only what it then writes of the gradient, so that the two may be the same memory.
    """
    row_blocks, blocks = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start_c = program % blocks * BLOCK_C
    start_m = program // blocks % row_blocks * BLOCK_M
    image = (program // blocks // row_blocks).to(tl.int64)
    student_ptr += image * stride_sb
    U_ptr += image * stride_ub

    correction = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    size = 1.0
    if NORMALIZE == "cosine":
        features = load_tile(student_ptr, start_m, start_c, stride_sn, stride_sc, pixels, channels, BLOCK_M, BLOCK_C)
        correction = features.to(tl.float32)
    if NORMALIZE == "row":
        moment_ptr += image * channels * channels
        weighted_ptr += image * channels * channels
        size, shrink = power_of_two_scale(moment_ptr, channels, BLOCK_C)
        by_weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start_k in range(0, channels, BLOCK_K):
            features = load_tile(
                student_ptr, start_m, start_k, stride_sn, stride_sc, pixels, channels, BLOCK_M, BLOCK_K
            )
            moment = load_tile(moment_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
            correction = product(features, moment * shrink, correction, TERMS, FULL)
            weighted = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
            for split in range(weighted_splits):
                part_ptr = weighted_ptr + tl.cast(split, tl.int64) * stride_mp
                weighted += load_tile(part_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
            by_weighted = product(features, weighted * shrink, by_weighted, TERMS, FULL)
    if NORMALIZE != "none":
        alpha_ptr += image * pixels
        h_ptr += image * pixels
        correction *= load_weights(h_ptr, alpha_ptr, size, start_m, stride_hs, pixels, splits, BLOCK_M)[:, None]
    if NORMALIZE == "row":
        correction += by_weighted
    total = -correction
    for split in range(splits):
        part_ptr = U_ptr + tl.cast(split, tl.int64) * stride_us
        total += load_tile(part_ptr, start_m, start_c, stride_un, stride_uc, pixels, channels, BLOCK_M, BLOCK_C)
    gradient_ptr += image * stride_gb
    store_tile(gradient_ptr, total * weight, start_m, start_c, stride_gn, stride_gc, pixels, channels, BLOCK_M, BLOCK_C)

    if start_m + start_c == 0:
        value = tl.zeros([BLOCK_P], tl.float32)
        for start_p in range(0, partials, BLOCK_P):
            offs_p = start_p + tl.arange(0, BLOCK_P)
            value += tl.load(partial_ptr + image * partials + offs_p, mask=offs_p < partials, other=0.0)
        tl.store(loss_ptr + image, tl.sum(value) * weight)


def moment_splits(programs: int, pixels: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a sum over pixels is split to occupy the device, and how many pixels each has."""
    most = min(8, 4 * multiprocessors(device) // programs, triton.cdiv(pixels, 4 * DEPTH))
    part = triton.cdiv(triton.cdiv(pixels, max(1, most)), DEPTH) * DEPTH
    return triton.cdiv(pixels, part), part


def moments_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Q^T Q (B, C, C) in float32 of (B, N, C_s) and of (B, N, C_t)."""
    batch, pixels, channels_s = student.shape
    channels_t = teacher.shape[2]
    tiles = batch * (triton.cdiv(channels_s, CHANNELS) ** 2 + triton.cdiv(channels_t, CHANNELS) ** 2)
    splits, part = moment_splits(tiles, pixels, student.device)
    sizes = [batch * channels**2 for channels in (channels_s, channels_t)]
    # parts lie side by side, for one launch to sum both; if there is just one, apart, to free the teacher's early
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
        part,
        BLOCK_N=DEPTH,
        BLOCK_C=CHANNELS,
        **OPTIONS,
    )
    if splits > 1:
        moment_s, moment_t = parts.sum(0).split(sizes)
    return moment_s.view(batch, channels_s, channels_s), moment_t.view(batch, channels_t, channels_t)


def scales_of(student: Tensor, teacher: Tensor, relation: Relation) -> Scales:
    """``algebra.scales_of`` in float32."""
    if relation.normalize == "none":
        return Scales(None, None, None)
    batch, pixels, _ = student.shape
    moment_s, moment_t = moments_of(student, teacher) if relation.normalize == "row" else (None, None)
    alpha_s, alpha_t = (student.new_empty((batch, pixels), dtype=torch.float32) for _ in range(2))
    scale_kernel[(2 * batch * triton.cdiv(pixels, PIXELS),)](
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
        BLOCK_M=PIXELS,
        BLOCK_K=DEPTH,
        BLOCK_C=CHANNELS,
        **OPTIONS,
    )
    return Scales(alpha_s, alpha_t, moment_s)


def weighted_moment_of(student: Tensor, h: Tensor, scales: Scales) -> Tensor:
    """The parts (splits, B, C, C) of Q^T diag(w) Q times M's size^2, w = alpha^2 times h (splits, B, N) summed."""
    batch, pixels, channels = student.shape
    tiles = batch * triton.cdiv(channels, CHANNELS) ** 2
    splits, part = moment_splits(tiles, pixels, student.device)
    weighted = student.new_empty((splits, batch, channels, channels), dtype=torch.float32)
    weighted_moment_kernel[(tiles * splits,)](
        student,
        h,
        scales.student,
        scales.moment,
        weighted,
        *student.stride(),
        h.stride(0),
        weighted.stride(0),
        pixels,
        channels,
        h.shape[0],
        splits,
        part,
        TERMS=feature_terms(student.dtype),
        BLOCK_N=DEPTH,
        BLOCK_C=CHANNELS,
        **OPTIONS,
    )
    return weighted


def loss_and_gradient(student: Tensor, partials: Partials, scales: Scales, relation: Relation) -> tuple[Tensor, Tensor]:
    """The losses (B,), means over all pairs, and ``algebra.gradient_of``, from what the tile kernel left."""
    batch, pixels, channels = student.shape
    loss, U, h = partials
    weighted = weighted_moment_of(student, h, scales) if relation.normalize == "row" else None
    dtype = gradient_dtype(student.dtype)
    gradient = U[0] if dtype == torch.float32 and len(U) == 1 else torch.empty_like(student, dtype=dtype)
    mean = student.new_empty(batch, dtype=torch.float32)
    gradient_kernel[(batch * triton.cdiv(pixels, PIXELS) * triton.cdiv(channels, CHANNELS),)](
        student,
        U,
        h,
        scales.student,
        scales.moment,
        weighted,
        loss,
        mean,
        gradient,
        *student.stride(),
        *U.stride(),
        *gradient.stride(),
        0 if h is None else h.stride(0),
        0 if weighted is None else weighted.stride(0),
        pixels,
        channels,
        len(U),
        0 if weighted is None else len(weighted),
        loss.shape[1],
        1 / pixels**2,
        NORMALIZE=relation.normalize,
        TERMS=feature_terms(student.dtype),
        BLOCK_M=PIXELS,
        BLOCK_K=DEPTH,
        BLOCK_C=CHANNELS,
        BLOCK_P=PARTIALS,
        **OPTIONS,
    )
    return mean, gradient
