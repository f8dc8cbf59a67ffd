"""The reduction of the tile kernel's partial sums to the loss and its gradient, as Triton kernels.

The formulas are those of ``formulas.gradient_of``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import Relation, Scales, gradient_dtype
from .configurations import BLOCK_CHANNELS, BLOCK_DEPTH, BLOCK_PARTIALS, BLOCK_PIXELS, OPTIONS
from .primitives import FULL, feature_terms, jit, load_tile, product, store_tile, tl, triton
from .scales import moment_splits, power_of_two_scale, store_symmetric
from .tiles import Partials

# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N: tl.constexpr):
    """Return w_n size^2 of BLOCK_N pixels, where w_n = h_n alpha_n^2 and h is the sum of its splits."""
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
    """Compute M_w = Q^T diag(w) Q, times the square of M's power of two, as partial sums (splits, B, C, C).

    A program computes one tile over ``split_pixels`` pixels.
    """
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
    """Compute dL/dQ of one tile of the student's features, and the loss of each image, from their partial sums.

    A program reads only those elements of U that it then writes to the gradient: U and the gradient may share memory.
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
        size, inverse_square = power_of_two_scale(moment_ptr, channels, BLOCK_C)
        by_weighted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start_k in range(0, channels, BLOCK_K):
            features = load_tile(
                student_ptr, start_m, start_k, stride_sn, stride_sc, pixels, channels, BLOCK_M, BLOCK_K
            )
            moment = load_tile(moment_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
            correction = product(features, moment * inverse_square, correction, TERMS, FULL)
            weighted = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
            for split in range(weighted_splits):
                part_ptr = weighted_ptr + tl.cast(split, tl.int64) * stride_mp
                weighted += load_tile(part_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
            by_weighted = product(features, weighted * inverse_square, by_weighted, TERMS, FULL)
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


# -- launchers -------------------------------------------------------------------------------------------------------


def weighted_moment_of(student: Tensor, h: Tensor, scales: Scales) -> Tensor:
    """Return partial sums (splits, B, C, C) of M_w = Q^T diag(w) Q, times the square of M's power of two.

    Args:
        student: (B, N, C).
        h: (h_splits, B, N); the weights are w = alpha^2 h, with the splits of h summed.
        scales: of normalize="row".
    """
    batch, pixels, channels = student.shape
    tiles = batch * triton.cdiv(channels, BLOCK_CHANNELS) ** 2
    splits, split_pixels = moment_splits(tiles, pixels, student.device)
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
        split_pixels,
        TERMS=feature_terms(student.dtype),
        BLOCK_N=BLOCK_DEPTH,
        BLOCK_C=BLOCK_CHANNELS,
        **OPTIONS,
    )
    return weighted


def reduce_partials(student: Tensor, partials: Partials, scales: Scales, relation: Relation) -> tuple[Tensor, Tensor]:
    """Return the losses (B,), means over all pairs, and their gradients (B, N, C), as ``formulas.gradient_of``.

    Overwrites ``partials.U``, and returns it where dtype and strides fit.
    """
    batch, pixels, channels = student.shape
    loss, U, h = partials
    assert U is not None, "the tile kernel ran without a gradient"
    weighted = None if h is None or relation.normalize != "row" else weighted_moment_of(student, h, scales)
    dtype = gradient_dtype(student.dtype)
    gradient = U[0] if dtype == torch.float32 and len(U) == 1 else torch.empty_like(student, dtype=dtype)
    mean = student.new_empty(batch, dtype=torch.float32)
    gradient_kernel[(batch * triton.cdiv(pixels, BLOCK_PIXELS) * triton.cdiv(channels, BLOCK_CHANNELS),)](
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
        BLOCK_M=BLOCK_PIXELS,
        BLOCK_K=BLOCK_DEPTH,
        BLOCK_C=BLOCK_CHANNELS,
        BLOCK_P=BLOCK_PARTIALS,
        **OPTIONS,
    )
    return mean, gradient
