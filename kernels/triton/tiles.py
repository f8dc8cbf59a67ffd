"""The tile kernel of backend ``triton``: loss, U and h of a row block in one pass over the columns."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ..formulas import Relation
from .configurations import MOST_SPLITS, TERMS, Configuration, number_format
from .plans import Array, Plan
from .primitives import (
    INTERPRET,
    Matrix,
    features_product,
    jit,
    load_tile,
    load_transposed,
    load_vector,
    multiprocessors,
    product,
    store_tile,
    store_vector,
    tl,
    triton,
)
from .scales import PlannedScales


class Partials(NamedTuple):
    """The partial sums that the programs of the tile kernel write, to be summed in a fixed order.

    loss: (B, programs). U: (splits, B, N, C_s) and h: (splits, B, N), None under the conditions of ``TileSums``.
    With one split, U may be an array (B, N, C_s) of any strides. U_strides: strides of the four axes.
    """

    splits: int
    loss: Array
    U: Array | None
    h: Array | None

    @property
    def U_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.U is None else (0, 0, 0, 0, *self.U.strides)[-4:]


# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def distance_value(difference, delta, DISTANCE: tl.constexpr):
    """Return rho(D), elementwise."""
    if DISTANCE == "l1":
        return tl.abs(difference)
    elif DISTANCE == "l2":
        return difference * difference
    else:
        size = tl.abs(difference)
        return tl.where(size <= delta, 0.5 * difference * difference, delta * (size - 0.5 * delta))


@jit
def distance_scale(factor, DISTANCE: tl.constexpr):
    """Return rho(factor D) / rho(D) for factor > 0. The Huber distance has no such number."""
    if DISTANCE == "l1":
        return factor
    else:
        return factor * factor


@jit
def distance_grad(difference, delta, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr):
    """Return rho'(D), elementwise; 0 at a tie of the l1 distance."""
    if DISTANCE == "l1" and NORMALIZE == "none":  # D may have any size
        return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    elif DISTANCE == "l1":
        return tie_sign(difference)
    elif DISTANCE == "l2":
        return 2 * difference
    else:
        return tl.clamp(difference, -delta, delta, propagate_nan=tl.PropagateNan.ALL)


@jit
def tie_sign(x):
    """Return sign(x), exactly 0 at 0, in two instructions; between -1 and 1 for abs(x) < 2^-101.

    A multiply-add that saturates to [0, 1] takes no more time than one that does not.
    """
    if INTERPRET:
        step = tl.minimum(tl.maximum(x * 1.2676506002282294e30 + 0.5, 0.0), 1.0)
    else:  # 0f71800000 is 2^100
        step = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f71800000, 0f3F000000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 2 * step - 1


@jit
def gram_block(
    rows,
    columns,
    features,
    channels,
    start_m,
    start_n,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return G_ij = q_i . q_j (BLOCK_M, BLOCK_N) for the rows from start_m and the columns from start_n.

    ``rows`` (BLOCK_M, BLOCK_C) and ``columns`` (BLOCK_C, BLOCK_N) are the features of these pixels if all channels fit
    into BLOCK_C; otherwise they are None, and the features are loaded BLOCK_C channels at a time.
    """
    gram = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if rows is None:
        for start_c in range(0, channels, BLOCK_C):
            left = load_tile(features, start_m, start_c, BLOCK_M, BLOCK_C)
            right = load_transposed(features, start_c, start_n, BLOCK_C, BLOCK_N)
            gram = features_product(left, right, gram, TERMS)
    else:
        gram = features_product(rows, columns, gram, TERMS)
    return gram


@jit
def relation_kernel(
    student_ptr,
    teacher_ptr,
    alpha_ptr,
    ratio_ptr,
    power_ptr,
    mantissa_ptr,
    loss_ptr,
    U_ptr,
    h_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    stride_us,
    stride_ub,
    stride_un,
    stride_uc,
    stride_hs,
    pixels,
    channels_s,
    channels_t,
    column_splits,
    split_columns,
    delta,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    RECTIFY: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    LOOP_S: tl.constexpr,
    LOOP_T: tl.constexpr,
):
    """Compute the ``Partials``: loss (B * splits * row blocks), U (splits, B, N, C_s) and h (splits, B, N).

    A program computes BLOCK_M rows over ``split_columns`` columns; see the docstring of the package. With LOOP_S or
    LOOP_T the channels do not fit into BLOCK_S or BLOCK_T: the program loops over them, and computes BLOCK_S channels
    of U (grid axis 1). EVEN_S and EVEN_T say that they are multiples of the block: masks that are known at compile time
    need fewer registers. TERMS is the number of bfloat16 terms of a float32, see primitives.py.

    D_ij = mantissa_i (ratio_i G_s,ij - power_i G_t,ij), with the scales of ``scale_kernel``: power_i G_t,ij is exact,
    so D of equal features is exactly 0 also if the compiler fuses the multiplications with the subtraction.

    ``h_ptr`` is None unless the gradient has terms from the norms.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    start_m = program % row_blocks * BLOCK_M
    split = program // row_blocks % column_splits
    image = (program // row_blocks // column_splits).to(tl.int64)
    start_u = tl.program_id(1) * BLOCK_S
    student = Matrix(student_ptr + image * stride_sb, pixels, None if EVEN_S else channels_s, stride_sn, stride_sc)
    teacher = Matrix(teacher_ptr + image * stride_tb, pixels, None if EVEN_T else channels_t, stride_tn, stride_tc)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if NORMALIZE != "none":
        alpha_ptr += image * pixels
        ratio_ptr += image * pixels
        power_ptr += image * pixels
        mantissa_ptr += image * pixels
        alpha_m = load_vector(alpha_ptr, start_m, pixels, BLOCK_M)
        ratio_m = load_vector(ratio_ptr, start_m, pixels, BLOCK_M)[:, None]
        power_m = load_vector(power_ptr, start_m, pixels, BLOCK_M)[:, None]
        mantissa_m = load_vector(mantissa_ptr, start_m, pixels, BLOCK_M)
        if DISTANCE == "l2":
            alpha_m *= mantissa_m
    student_m = None
    teacher_m = None
    if not LOOP_S:
        student_m = load_tile(student, start_m, 0, BLOCK_M, BLOCK_S)
    if not LOOP_T:
        teacher_m = load_tile(teacher, start_m, 0, BLOCK_M, BLOCK_T)

    loss = tl.zeros([BLOCK_M], tl.float32)
    h = tl.zeros([BLOCK_M], tl.float32)
    U = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    first = split * split_columns
    last = tl.minimum(first + split_columns, pixels)
    if not NEED_GRAD:
        first = tl.maximum(first, start_m)  # the tiles below the diagonal mirror those above it
    # Outside the image features and scales are 0, hence G and D are 0 and add nothing to any sum.
    for start_n in range(first, last, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        student_n = None
        teacher_n = None
        if not LOOP_S:
            student_n = load_transposed(student, 0, start_n, BLOCK_S, BLOCK_N)
        gram_s = gram_block(
            student_m, student_n, student, channels_s, start_m, start_n, TERMS, BLOCK_M, BLOCK_N, BLOCK_S
        )
        if not LOOP_T:
            teacher_n = load_transposed(teacher, 0, start_n, BLOCK_T, BLOCK_N)
        gram_t = gram_block(
            teacher_m, teacher_n, teacher, channels_t, start_m, start_n, TERMS, BLOCK_M, BLOCK_N, BLOCK_T
        )

        if RECTIFY:  # scales are not negative: A_ij has the sign of G_ij; NaN stays
            gram_s = tl.where(gram_s < 0, 0.0, gram_s)
            gram_t = tl.where(gram_t < 0, 0.0, gram_t)

        mirrors = (start_n >= start_m + BLOCK_M).to(tl.float32)  # 0 on the diagonal block, which is its own mirror
        if NORMALIZE == "none":
            difference = gram_s - gram_t
        else:
            alpha_n = load_vector(alpha_ptr, start_n, pixels, BLOCK_N)[None, :]
            ratio_n = load_vector(ratio_ptr, start_n, pixels, BLOCK_N)[None, :]
            power_n = load_vector(power_ptr, start_n, pixels, BLOCK_N)[None, :]
            mantissa_n = load_vector(mantissa_ptr, start_n, pixels, BLOCK_N)[None, :]
            # Only the Huber distance needs D itself. Otherwise ``difference`` is D_ij / mantissa_i, and the factor
            # follows where a row of rho(D) has been summed; for l2 it is also a factor of alpha.
            if DISTANCE == "l2" and NORMALIZE == "row":
                alpha_n *= mantissa_n
            if NORMALIZE == "cosine":
                difference = gram_s * (ratio_m * ratio_n) - gram_t * (power_m * power_n)
                difference *= mantissa_n
                # a pixel's relation to itself is a tie: make it exactly 0; NaN stays
                offs_n = start_n + tl.arange(0, BLOCK_N)
                difference = tl.where(offs_m[:, None] == offs_n[None, :], 0.0 * difference, difference)
            else:
                difference = gram_s * ratio_m - gram_t * power_m
                mirrored = gram_s * ratio_n - gram_t * power_n
                if DISTANCE == "huber":
                    mirrored *= mantissa_n
            if DISTANCE == "huber":
                difference *= mantissa_m[:, None]
        value = tl.sum(distance_value(difference, delta, DISTANCE), 1)
        if NEED_GRAD:
            loss += value
        elif NORMALIZE == "row":
            mirrored_value = distance_value(mirrored, delta, DISTANCE)
            if DISTANCE != "huber":
                value *= distance_scale(mantissa_m, DISTANCE)
                mirrored_value *= distance_scale(mantissa_n, DISTANCE)
            loss += value + mirrors * tl.sum(mirrored_value, 1)
        else:
            loss += value + mirrors * value

        if NEED_GRAD:
            K = distance_grad(difference, delta, NORMALIZE, DISTANCE)
            if NORMALIZE == "row":
                h += tl.sum(K * gram_s, 1)
                K = K * alpha_m[:, None] + distance_grad(mirrored, delta, NORMALIZE, DISTANCE) * alpha_n
            elif NORMALIZE == "cosine":  # the other factor of K, 2 alpha_i, follows after the loop over columns
                K *= alpha_n
                h += tl.sum(K * gram_s, 1)
            if RECTIFY:
                K = tl.where(gram_s <= 0, 0.0, K)
            if LOOP_S:
                student_n = load_transposed(student, start_u, start_n, BLOCK_S, BLOCK_N)
            # one bfloat16 term represents a sign exactly
            U = product(K, tl.trans(student_n), U, 1 if NORMALIZE == "none" and DISTANCE == "l1" else TERMS, TERMS)

    if start_u == 0:
        if DISTANCE != "huber" and (NORMALIZE == "cosine" or (NORMALIZE == "row" and NEED_GRAD)):
            loss *= distance_scale(mantissa_m, DISTANCE)
        tl.store(loss_ptr + program, tl.sum(loss))
    if NEED_GRAD:
        if NORMALIZE == "none":
            U *= 2
        if NORMALIZE == "cosine":
            U *= 2 * alpha_m[:, None]
            h *= 2
        if h_ptr is not None and start_u == 0:
            h_ptr += split.to(tl.int64) * stride_hs + image * pixels
            store_vector(h_ptr, h * alpha_m, start_m, pixels, BLOCK_M)
        U_ptr += split.to(tl.int64) * stride_us + image * stride_ub
        store_tile(Matrix(U_ptr, pixels, student.columns, stride_un, stride_uc), U, start_m, start_u)


# -- launchers -------------------------------------------------------------------------------------------------------


# Bytes that the parts of U beyond the first may take: only small images need split columns.
WORKSPACE = 12 << 20


@functools.lru_cache(maxsize=1024)
def column_splits(batch: int, pixels: int, channels: int, need_grad: bool, block: int, slots: int) -> tuple[int, int]:
    """Return the number of programs that share the columns of a row block, and the columns of each.

    The choice is the smallest number with the shortest estimated time on ``slots`` programs that run at a time.
    """
    blocks = triton.cdiv(pixels, block)
    most = min(blocks, 1 + WORKSPACE // (4 * batch * pixels * channels), MOST_SPLITS) if need_grad else blocks

    def duration(splits: int) -> int:
        programs = batch * blocks * (splits if need_grad else (splits + 1) / 2)  # half of them are below the diagonal
        return math.ceil(programs / slots) * (triton.cdiv(blocks, splits) + 1)  # 1: the work outside the loop

    split_blocks = triton.cdiv(blocks, min(range(1, most + 1), key=duration))
    return triton.cdiv(blocks, split_blocks), split_blocks * block


def plan_tiles(
    plan: Plan,
    student: Array,
    teacher: Array,
    scales: PlannedScales,
    relation: Relation,
    chosen: Configuration,
    need_grad: bool,
    gradient: Array | None = None,
) -> Partials:
    """Plan the launch of the tile kernel on features (B, N, C_s), (B, N, C_t) and their scales.

    Args:
        gradient: float32 (B, N, C_s), to use as U if the columns are not split.
    """
    (batch, pixels, channels), channels_t = student.shape, teacher.shape[2]
    chunks = triton.cdiv(channels, chosen.block_s) if need_grad else 1
    slots = max(1, multiprocessors(plan.device) // chunks)
    splits, split_columns = column_splits(batch, pixels, channels, need_grad, chosen.block_m, slots)
    loss = plan.scratch(batch, splits * triton.cdiv(pixels, chosen.block_m))
    U = h = None
    if need_grad:
        U = gradient if splits == 1 and gradient is not None else plan.scratch(splits, *student.shape)
    if need_grad and relation.differentiates_norms:
        h = plan.scratch(splits, batch, pixels)
    partials = Partials(splits, loss, U, h)
    plan.launch(
        relation_kernel,
        (math.prod(loss.shape), chunks),
        student,
        teacher,
        *scales.vectors,
        loss,
        U,
        h,
        *student.strides,
        *teacher.strides,
        *partials.U_strides,
        0 if h is None else h.strides[0],
        pixels,
        channels,
        channels_t,
        splits,
        split_columns,
        relation.delta,
        # few depend on the channels: new counts rarely compile
        NORMALIZE=relation.normalize,
        DISTANCE=relation.distance,
        RECTIFY=relation.rectify,
        NEED_GRAD=need_grad,
        TERMS=TERMS[number_format(student.dtype)],
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_S=chosen.block_s,
        BLOCK_T=chosen.block_t,
        EVEN_S=channels % chosen.block_s == 0,
        EVEN_T=channels_t % chosen.block_t == 0,
        LOOP_S=channels > chosen.block_s,
        LOOP_T=channels_t > chosen.block_t,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=True,
    )
    return partials
