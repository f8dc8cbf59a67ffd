"""Moments M = Q^T Q and M_w = Q^T diag(w) Q of features, as Triton kernels: the C x C algebra around the tiles.

``moment_kernel`` and ``weighted_moment_kernel`` compute the tiles on and above the diagonal as partial sums over ranges
of pixels. ``terms_kernel`` adds the partial sums in a fixed order and splits the result, divided by the square of a
power of two, into bfloat16 terms. It does so once per element: a kernel that multiplies by M would otherwise split it
again in every program.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .configurations import BLOCK_TERMS, OPTIONS, moment_blocks
from .plans import Array, Plan
from .primitives import (
    FULL,
    feature_terms,
    features_product,
    jit,
    load_tile,
    load_vector,
    multiprocessors,
    product,
    split_terms,
    store_tile,
    terms_product,
    tl,
    triton,
)

BLOCK_LARGEST = triton is not None and tl.constexpr(64)  # elements of ``largest`` that are read at a time
BLOCK_SPLITS = triton is not None and tl.constexpr(8)  # partial sums that are read at a time

# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def store_symmetric(ptr, tile, start_i, start_j, channels, BLOCK_C: tl.constexpr):
    """Store a tile of a symmetric matrix (C, C) and its mirror image."""
    store_tile(ptr, tile, start_i, start_j, channels, 1, channels, channels, BLOCK_C, BLOCK_C)
    if start_i < start_j:
        store_tile(ptr, tl.trans(tile), start_j, start_i, channels, 1, channels, channels, BLOCK_C, BLOCK_C)


@jit
def moment_kernel(
    student_ptr,
    teacher_ptr,
    partial_s_ptr,
    partial_t_ptr,
    largest_s_ptr,
    largest_t_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    pixels,
    channels_s,
    channels_t,
    batch,
    splits,
    split_pixels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute partial sums of M of the student's and the teacher's features, (splits, B, C, C) each.

    A program computes a tile over ``split_pixels`` pixels, if it is not below the diagonal. ``largest``
    (B, splits, C blocks) receives the largest element of each tile on the diagonal.
    """
    blocks_s, blocks_t = tl.cdiv(channels_s, BLOCK_C), tl.cdiv(channels_t, BLOCK_C)
    tiles = blocks_s * blocks_s + blocks_t * blocks_t
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    image = (program // tiles // splits).to(tl.int64)
    part = split.to(tl.int64) * batch + image
    if tile < blocks_t * blocks_t:
        ptr, stride_n, stride_c, channels, blocks = (
            teacher_ptr + image * stride_tb,
            stride_tn,
            stride_tc,
            channels_t,
            blocks_t,
        )
        partial_ptr, largest_ptr = partial_t_ptr, largest_t_ptr
    else:
        tile -= blocks_t * blocks_t
        ptr, stride_n, stride_c, channels, blocks = (
            student_ptr + image * stride_sb,
            stride_sn,
            stride_sc,
            channels_s,
            blocks_s,
        )
        partial_ptr, largest_ptr = partial_s_ptr, largest_s_ptr
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if start_i <= start_j:
        first = split * split_pixels
        last = tl.minimum(first + split_pixels, pixels)
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(ptr, start_n, start_i, stride_n, stride_c, pixels, channels, BLOCK_N, BLOCK_C)
            right = load_tile(ptr, start_n, start_j, stride_n, stride_c, pixels, channels, BLOCK_N, BLOCK_C)
            acc = features_product(tl.trans(left), right, acc, FULL)
        store_tile(
            partial_ptr + part * channels * channels,
            acc,
            start_i,
            start_j,
            channels,
            1,
            channels,
            channels,
            BLOCK_C,
            BLOCK_C,
        )
        if start_i == start_j:
            # of M, the largest element is on the diagonal; in a part of it, no other element is larger either. In one
            # reduction: Triton 3.6 fails to compile two for sm_100
            tl.store(largest_ptr + (image * splits + split) * blocks + tile // blocks, tl.max(acc))


@jit
def power_of_two_scale(largest_ptr, count):
    """Return a power of two near the root of the largest element of M, and the reciprocal of its square.

    As ``formulas.power_of_two_scale``, but of the largest of ``count`` partial sums. Divided by the square, products
    with M have the magnitude of the features, apart from the number of partial sums.
    """
    largest = tl.zeros([BLOCK_LARGEST], tl.float32)
    for start in range(0, count, BLOCK_LARGEST):
        largest = tl.maximum(largest, load_vector(largest_ptr, start, count, BLOCK_LARGEST))
    # from the bits of its exponent, at least those of the smallest normal number: otherwise 1 / size^2 overflows
    exponent = tl.maximum((tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) - 127, -126) >> 1
    size = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return size, ((127 - 2 * exponent) << 23).to(tl.float32, bitcast=True)


@jit
def terms_kernel(
    partial_s_ptr,
    partial_t_ptr,
    largest_s_ptr,
    largest_t_ptr,
    size_s_ptr,
    size_t_ptr,
    terms_s_ptr,
    terms_t_ptr,
    channels_s,
    channels_t,
    batch,
    splits,
    count_s,
    count_t,
    BLOCK_C: tl.constexpr,
):
    """Add the partial sums of M of student and teacher; write the bfloat16 terms (3, B, C, C) of M / size^2.

    A program computes a tile and its mirror image. ``size`` (B,) is the ``power_of_two_scale`` of ``largest``. With
    channels_t = 0 there is only one matrix.
    """
    blocks_s, blocks_t = tl.cdiv(channels_s, BLOCK_C), tl.cdiv(channels_t, BLOCK_C)
    tiles = blocks_s * blocks_s + blocks_t * blocks_t
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    if tile < blocks_t * blocks_t:
        partial_ptr, largest_ptr, size_ptr, terms_ptr = partial_t_ptr, largest_t_ptr, size_t_ptr, terms_t_ptr
        channels, blocks, count = channels_t, blocks_t, count_t
    else:
        tile -= blocks_t * blocks_t
        partial_ptr, largest_ptr, size_ptr, terms_ptr = partial_s_ptr, largest_s_ptr, size_s_ptr, terms_s_ptr
        channels, blocks, count = channels_s, blocks_s, count_s
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if start_i <= start_j:
        size, inverse_square = power_of_two_scale(largest_ptr + image * count, count)
        if tile == 0:
            tl.store(size_ptr + image, size)
        matrix = tl.cast(channels, tl.int64) * channels
        partial_ptr += image * matrix
        offs_i = start_i + tl.arange(0, BLOCK_C)[None, :, None]
        offs_j = start_j + tl.arange(0, BLOCK_C)[None, None, :]
        inside = (offs_i < channels) & (offs_j < channels)
        total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start in range(0, splits, BLOCK_SPLITS):  # several at a time, to wait for memory less often
            offs_p = start + tl.arange(0, BLOCK_SPLITS)[:, None, None]
            pointers = partial_ptr + offs_p.to(tl.int64) * batch * matrix + offs_i * channels + offs_j
            total += tl.sum(tl.load(pointers, mask=(offs_p < splits) & inside, other=0.0), 0)
        term0, term1, term2 = split_terms(total * inverse_square, FULL)
        terms_ptr += image * matrix
        store_symmetric(terms_ptr, term0, start_i, start_j, channels, BLOCK_C)
        store_symmetric(terms_ptr + batch * matrix, term1, start_i, start_j, channels, BLOCK_C)
        store_symmetric(terms_ptr + 2 * batch * matrix, term2, start_i, start_j, channels, BLOCK_C)


@jit
def moment_product(
    features,
    terms_ptr,
    start_k,
    start_c,
    channels,
    stride_term,
    acc,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return acc + features @ M[k, c] for a tile of M, given by its terms (3, ...) that are ``stride_term`` apart."""
    b0 = load_tile(terms_ptr, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
    b1 = load_tile(terms_ptr + stride_term, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
    b2 = load_tile(terms_ptr + 2 * stride_term, start_k, start_c, channels, 1, channels, channels, BLOCK_K, BLOCK_C)
    a0, a1, a2 = split_terms(features, TERMS)
    return terms_product(a0, a1, a2, b0, b1, b2, acc, TERMS, FULL)


@jit
def load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N: tl.constexpr):
    """Return w_n size^2 of BLOCK_N pixels, where w_n = h_n alpha_n^2 and h is the sum of its splits."""
    h = tl.zeros([BLOCK_N], tl.float32)
    for split in range(h_splits):
        h += load_vector(h_ptr + tl.cast(split, tl.int64) * stride_hs, start_n, pixels, BLOCK_N)
    alpha = load_vector(alpha_ptr, start_n, pixels, BLOCK_N) * size
    return h * alpha * alpha


@jit
def weighted_moment_kernel(
    student_ptr,
    h_ptr,
    alpha_ptr,
    size_ptr,
    partial_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_hs,
    pixels,
    channels,
    batch,
    h_splits,
    splits,
    split_pixels,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute M_w = Q^T diag(w) Q, times the square of M's power of two, as partial sums (splits, B, C, C).

    A program computes a tile over ``split_pixels`` pixels, if it is not below the diagonal.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start_i = program // blocks % blocks * BLOCK_C
    start_j = program % blocks * BLOCK_C
    split = program // (blocks * blocks) % splits
    image = (program // (blocks * blocks) // splits).to(tl.int64)
    if start_i <= start_j:
        student_ptr += image * stride_sb
        h_ptr += image * pixels
        alpha_ptr += image * pixels
        size = tl.load(size_ptr + image)
        first = split * split_pixels
        last = tl.minimum(first + split_pixels, pixels)
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(student_ptr, start_n, start_i, stride_sn, stride_sc, pixels, channels, BLOCK_N, BLOCK_C)
            right = load_tile(student_ptr, start_n, start_j, stride_sn, stride_sc, pixels, channels, BLOCK_N, BLOCK_C)
            weights = load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N)
            acc = product(tl.trans(left.to(tl.float32) * weights[:, None]), right, acc, FULL, TERMS)
        partial_ptr += (split.to(tl.int64) * batch + image) * channels * channels
        store_tile(partial_ptr, acc, start_i, start_j, channels, 1, channels, channels, BLOCK_C, BLOCK_C)


# -- launchers -------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """M of one network's features as ``terms_kernel`` computes it.

    Attributes:
        terms: bfloat16 (3, B, C, C); their sum times size^2 is M.
        size: (B,).
        largest: (B, splits, blocks), of which size is the power of two.
    """

    terms: Array
    size: Array
    largest: Array


def moment_splits(programs: int, pixels: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return the number of parts of a sum over pixels that occupies the device, and the pixels of a part.

    A part has at least two blocks of pixels; there are at most 32, since their results are written and read again.
    """
    most = min(32, 2 * multiprocessors(device) // programs, triton.cdiv(pixels, 2 * block))
    split_pixels = triton.cdiv(triton.cdiv(pixels, max(1, most)), block) * block
    return triton.cdiv(pixels, split_pixels), split_pixels


def plan_moments(plan: Plan, student: Array, teacher: Array) -> tuple[Moments, Moments]:
    """Plan the launches that compute M of features (B, N, C_s) and (B, N, C_t)."""
    batch, pixels, channels_s = student.shape
    channels = (channels_s, teacher.shape[2])
    block_n, block_c, options = moment_blocks(student.dtype, max(channels))
    blocks = [triton.cdiv(count, block_c) for count in channels]
    tiles = sum(count**2 for count in blocks)
    # tiles below the diagonal do no work
    splits, split_pixels = moment_splits(
        batch * sum(count * (count + 1) // 2 for count in blocks), pixels, block_n, plan.device
    )
    moments = [
        Moments(
            plan.scratch(3, batch, count, count, dtype=torch.bfloat16),
            plan.scratch(batch),
            plan.scratch(batch, splits, triton.cdiv(count, block_c)),
        )
        for count in channels
    ]
    partial = [plan.scratch(splits, batch, count, count) for count in channels]
    plan.launch(
        moment_kernel,
        (batch * tiles * splits,),
        student,
        teacher,
        *partial,
        *(each.largest for each in moments),
        *student.strides,
        *teacher.strides,
        pixels,
        *channels,
        batch,
        splits,
        split_pixels,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        **options,
    )
    plan_terms(plan, partial, moments)
    for array in partial:
        plan.free(array)
    return moments[0], moments[1]


def plan_terms(plan: Plan, partial: list[Array], moments: list[Moments]) -> None:
    """Plan the launch of ``terms_kernel`` for the partial sums (splits, B, C, C) of one or two matrices."""
    splits, batch = partial[0].shape[:2]
    channels = [array.shape[2] for array in partial]
    counts = [math.prod(each.largest.shape[1:]) for each in moments]
    first, last = moments[0], moments[-1]
    plan.launch(
        terms_kernel,
        (batch * sum(triton.cdiv(count, BLOCK_TERMS) ** 2 for count in channels),),
        partial[0],
        partial[-1],
        first.largest,
        last.largest,
        first.size,
        last.size,
        first.terms,
        last.terms,
        channels[0],
        channels[1] if len(channels) == 2 else 0,
        batch,
        splits,
        counts[0],
        counts[-1],
        BLOCK_C=BLOCK_TERMS,
        **OPTIONS,
    )


def plan_weighted_moment(plan: Plan, student: Array, h: Array, alpha: Array, moments: Moments) -> Array:
    """Plan the launches that compute the terms (3, B, C, C) of M_w = Q^T diag(w) Q, w = alpha^2 h.

    Args:
        student: (B, N, C).
        h: (h_splits, B, N); the weights use the sum of its splits.
        alpha: (B, N), of normalize="row".
        moments: of the student.
    """
    batch, pixels, channels = student.shape
    block_n, block_c, options = moment_blocks(torch.float32, channels)
    blocks = triton.cdiv(channels, block_c)
    splits, split_pixels = moment_splits(batch * blocks * (blocks + 1) // 2, pixels, block_n, plan.device)
    terms = plan.scratch(3, batch, channels, channels, dtype=torch.bfloat16)
    partial = plan.scratch(splits, batch, channels, channels)
    plan.launch(
        weighted_moment_kernel,
        (batch * blocks**2 * splits,),
        student,
        h,
        alpha,
        moments.size,
        partial,
        *student.strides,
        h.strides[0],
        pixels,
        channels,
        batch,
        h.shape[0],
        splits,
        split_pixels,
        TERMS=feature_terms(student.dtype),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        **options,
    )
    plan_terms(plan, [partial], [moments._replace(terms=terms)])
    plan.free(partial)
    return terms
