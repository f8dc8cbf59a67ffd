"""Moments M = Q^T Q and M_w = Q^T diag(w) Q of features, as Triton kernels: the C x C algebra around the tiles.

Both are computed as partial sums over ranges of pixels, of the tiles on and above the diagonal. The partial sums are
then added in a fixed order, and the result, divided by the square of a power of two, is split into bfloat16 terms. This
is done once per element: a kernel that multiplies by M would otherwise split it again in every program.

``terms_kernel`` does so for M: the power of two depends on all tiles of an image. It is known when M_w is computed, so
the last program of a tile in ``weighted_moment_kernel`` adds up the tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .configurations import (
    BLOCK_TERMS,
    BLOCK_WEIGHTED,
    MOST_SPLITS,
    MOST_WEIGHTED,
    OPTIONS,
    WEIGHTED_MOMENT_BLOCKS,
    moment_blocks,
)
from .plans import Array, Plan
from .primitives import (
    FULL,
    Matrix,
    contiguous,
    feature_terms,
    features_product,
    jit,
    kernel_constant,
    load_terms,
    load_tile,
    load_vector,
    moved,
    multiprocessors,
    product,
    split_terms,
    store_tile,
    terms_product,
    tl,
    triton,
)

BLOCK_LARGEST = kernel_constant(64)  # elements of ``largest`` that are read at a time
BLOCK_SPLITS = kernel_constant(8)  # partial sums that are read at a time
BLOCK_H = kernel_constant(MOST_SPLITS)  # partial sums of h that are read at a time

# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def store_symmetric(matrix, tile, start_i, start_j):
    """Store a tile of a symmetric matrix and its mirror image."""
    store_tile(matrix, tile, start_i, start_j)
    if start_i < start_j:
        store_tile(matrix, tl.trans(tile), start_j, start_i)


@jit
def sum_partials(ptr, image, start_i, start_j, channels, batch, splits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sum of a tile of the partial sums (splits, B, C, C), in their order."""
    stride_split = tl.cast(batch, tl.int64) * channels * channels
    ptr += image * channels * channels
    total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_P):
        # The loads of several parts are under way at once. A load of a three-dimensional tile would not do: Triton 3.6
        # spreads the parts over threads, and spills registers.
        for part in tl.static_range(BLOCK_P):
            rows = tl.where(start + part < splits, channels, 0)
            matrix = contiguous(ptr + (start + part) * stride_split, rows, channels)
            total += load_tile(matrix, start_i, start_j, BLOCK_C, BLOCK_C)
    return total


@jit
def store_terms(ptr, tile, image, start_i, start_j, channels, batch):
    """Split a tile of a symmetric matrix into terms; store them and their mirror images in the terms (3, B, C, C)."""
    size = tl.cast(channels, tl.int64) * channels
    terms = split_terms(tile, FULL)
    matrix = contiguous(ptr + image * size, channels, channels)
    store_symmetric(matrix, terms[0], start_i, start_j)
    store_symmetric(moved(matrix, batch * size), terms[1], start_i, start_j)
    store_symmetric(moved(matrix, 2 * batch * size), terms[2], start_i, start_j)


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
        ptr, stride_n, stride_c = teacher_ptr + image * stride_tb, stride_tn, stride_tc
        channels, blocks, partial_ptr, largest_ptr = channels_t, blocks_t, partial_t_ptr, largest_t_ptr
    else:
        tile -= blocks_t * blocks_t
        ptr, stride_n, stride_c = student_ptr + image * stride_sb, stride_sn, stride_sc
        channels, blocks, partial_ptr, largest_ptr = channels_s, blocks_s, partial_s_ptr, largest_s_ptr
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if start_i <= start_j:
        first = split * split_pixels
        last = tl.minimum(first + split_pixels, pixels)
        features = Matrix(ptr, pixels, channels, stride_n, stride_c)
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(features, start_n, start_i, BLOCK_N, BLOCK_C)
            right = load_tile(features, start_n, start_j, BLOCK_N, BLOCK_C)
            acc = features_product(tl.trans(left), right, acc, FULL)
        store_tile(contiguous(partial_ptr + part * channels * channels, channels, channels), acc, start_i, start_j)
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
    counter_ptr,
    channels_s,
    channels_t,
    batch,
    splits,
    count_s,
    count_t,
    BLOCK_C: tl.constexpr,
):
    """Add the partial sums of M of student and teacher; write the bfloat16 terms (3, B, C, C) of M / size^2.

    A program computes a tile and its mirror image. ``size`` (B,) is the ``power_of_two_scale`` of ``largest``. Each
    tile of the student's M has a counter for ``weighted_moment_kernel``, which is set to 0.
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
        tl.store(counter_ptr + image * blocks_s * blocks_s + tile, 0)
    start_i, start_j = tile // blocks * BLOCK_C, tile % blocks * BLOCK_C
    if start_i <= start_j:
        size, inverse_square = power_of_two_scale(largest_ptr + image * count, count)
        if tile == 0:
            tl.store(size_ptr + image, size)
        total = sum_partials(partial_ptr, image, start_i, start_j, channels, batch, splits, BLOCK_SPLITS, BLOCK_C)
        store_terms(terms_ptr, total * inverse_square, image, start_i, start_j, channels, batch)


@jit
def moment_product(
    features,
    moment,
    stride_term,
    start_k,
    start_c,
    acc,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return acc + features @ M[k, c] for a tile of M, whose terms are ``stride_term`` elements apart."""
    terms = load_terms(moment, stride_term, start_k, start_c, BLOCK_K, BLOCK_C)
    return terms_product(split_terms(features, TERMS), terms, acc, TERMS, FULL)


@jit
def load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N: tl.constexpr):
    """Return w_n size^2 of BLOCK_N pixels, where w_n = h_n alpha_n^2 and h is the sum of its splits."""
    alpha = load_vector(alpha_ptr, start_n, pixels, BLOCK_N) * size
    # all splits at once: Triton prefetches the loads of a loop only if there is no loop in it
    offs_p = tl.arange(0, BLOCK_H)[:, None]
    offs_n = start_n + tl.arange(0, BLOCK_N)[None, :]
    pointers = h_ptr + offs_p.to(tl.int64) * stride_hs + offs_n
    h = tl.load(pointers, mask=(offs_p < h_splits) & (offs_n < pixels), other=0.0)
    return tl.sum(h, 0) * alpha * alpha


@jit
def weighted_moment_kernel(
    student_ptr,
    h_ptr,
    alpha_ptr,
    size_ptr,
    partial_ptr,
    terms_ptr,
    counter_ptr,
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
    counters,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the bfloat16 terms (3, B, C, C) of M_w = Q^T diag(w) Q.

    A program computes a tile over ``split_pixels`` pixels, if it is not below the diagonal, as one of the partial sums
    (splits, B, C, C). The last program of a tile adds them up, in the order of the splits. An image has ``counters``
    counters, which are 0 at the start, at least one for each tile.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start_i = program // blocks % blocks * BLOCK_C
    start_j = program % blocks * BLOCK_C
    split = program // (blocks * blocks) % splits
    image = (program // (blocks * blocks) // splits).to(tl.int64)
    if start_i <= start_j:
        student = Matrix(student_ptr + image * stride_sb, pixels, channels, stride_sn, stride_sc)
        h_ptr += image * pixels
        alpha_ptr += image * pixels
        size = tl.load(size_ptr + image)
        first = split * split_pixels
        last = tl.minimum(first + split_pixels, pixels)
        acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start_n in range(first, last, BLOCK_N):
            start_n = tl.multiple_of(start_n, BLOCK_N)
            left = load_tile(student, start_n, start_i, BLOCK_N, BLOCK_C)
            right = load_tile(student, start_n, start_j, BLOCK_N, BLOCK_C)
            weights = load_weights(h_ptr, alpha_ptr, size, start_n, stride_hs, pixels, h_splits, BLOCK_N)
            acc = product(tl.trans(left.to(tl.float32) * weights[:, None]), right, acc, FULL, TERMS)
        part_ptr = partial_ptr + (split.to(tl.int64) * batch + image) * channels * channels
        store_tile(contiguous(part_ptr, channels, channels), acc, start_i, start_j)
        # One thread counts. The barrier puts the stores of the other threads before its release, and the one by which
        # it hands out the count puts their loads after its acquire.
        tl.debug_barrier()
        tile = program % (blocks * blocks)
        arrived = tl.atomic_add(counter_ptr + image * counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = sum_partials(partial_ptr, image, start_i, start_j, channels, batch, splits, BLOCK_P, BLOCK_C)
            inverse = tl.div_rn(1.0, size)  # exact: a power of two
            store_terms(terms_ptr, total * inverse * inverse, image, start_i, start_j, channels, batch)


# -- launchers -------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """M of one network's features as ``terms_kernel`` computes it.

    Attributes:
        terms: bfloat16 (3, B, C, C); their sum times size^2 is M.
        size: (B,).
        largest: (B, splits, blocks), of which size is the power of two.
        counters: int32 (B, tiles), 0; of the student's M only.
    """

    terms: Array
    size: Array
    largest: Array
    counters: Array | None = None


def moment_splits(programs: int, pixels: int, block: int, device: torch.device, most: int = 32) -> tuple[int, int]:
    """Return the number of parts of a sum over pixels that occupies the device, and the pixels of a part.

    A part has at least two blocks of pixels. ``most`` limits the parts, since their results are written and read again.
    """
    most = min(most, 2 * multiprocessors(device) // programs, triton.cdiv(pixels, 2 * block))
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
    tiles_s, tiles_t = (triton.cdiv(count, BLOCK_TERMS) ** 2 for count in channels)
    counters = plan.scratch(batch, tiles_s, dtype=torch.int32)
    plan.launch(
        terms_kernel,
        (batch * (tiles_s + tiles_t),),
        *partial,
        *(each.largest for each in moments),
        *(each.size for each in moments),
        *(each.terms for each in moments),
        counters,
        *channels,
        batch,
        splits,
        *(math.prod(each.largest.shape[1:]) for each in moments),
        BLOCK_C=BLOCK_TERMS,
        **OPTIONS,
    )
    plan.free(*partial)
    return moments[0]._replace(counters=counters), moments[1]


def plan_weighted_moment(plan: Plan, student: Array, h: Array, alpha: Array, moments: Moments) -> Array:
    """Plan the launch that computes the terms (3, B, C, C) of M_w = Q^T diag(w) Q, w = alpha^2 h.

    Args:
        student: (B, N, C).
        h: (h_splits, B, N); the weights use the sum of its splits.
        alpha: (B, N), of normalize="row".
        moments: of the student.
    """
    batch, pixels, channels = student.shape
    block_n, block_c, options = WEIGHTED_MOMENT_BLOCKS
    blocks = triton.cdiv(channels, block_c)
    tiles = blocks * (blocks + 1) // 2
    splits, split_pixels = moment_splits(batch * tiles, pixels, block_n, plan.device, MOST_WEIGHTED)
    counters = moments.counters
    assert counters is not None and counters.shape[1] >= blocks**2, "one for each tile of the student's M"
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
        terms,
        counters,
        *student.strides,
        h.strides[0],
        pixels,
        channels,
        batch,
        h.shape[0],
        splits,
        split_pixels,
        counters.shape[1],
        TERMS=feature_terms(student.dtype),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_P=BLOCK_WEIGHTED,
        **options,
    )
    plan.free(partial)
    return terms
