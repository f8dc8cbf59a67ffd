"""The gradient of the closed form, and the reduction of the partial losses."""

from __future__ import annotations

import torch

from ..plans import Array, Plan
from ..primitives import (
    FULL,
    Matrix,
    contiguous,
    feature_terms,
    jit,
    kernel_constant,
    load_terms,
    load_tile,
    load_vector,
    split_terms,
    store_tile,
    terms_product,
    tl,
    triton,
)
from .options import BLOCK_PIXELS, BLOCK_SUM, BLOCK_VECTOR, FINISH_OPTIONS, OPTIONS

BLOCK_M, BLOCK_P = kernel_constant(BLOCK_PIXELS), kernel_constant(BLOCK_VECTOR)

# -- kernels -----------------------------------------------------------------------------------------------------------


@jit
def by_factor(
    acc,
    features,
    factor,
    alpha_ptr,
    stride_term,
    start_m,
    start_c,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return acc + alpha times features (BLOCK_M pixels) @ factor, for the columns of the factor from start_c on."""
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start_k in range(0, features.columns, BLOCK_K):
        left = split_terms(load_tile(features, start_m, start_k, BLOCK_M, BLOCK_K), TERMS)
        right = load_terms(factor, stride_term, start_k, start_c, BLOCK_K, BLOCK_C)
        total += terms_product(left, right, tl.zeros([BLOCK_M, BLOCK_C], tl.float32), TERMS, FULL)
    if alpha_ptr is not None:
        total *= load_vector(alpha_ptr, start_m, features.rows, BLOCK_M)[:, None]
    return acc + total


@jit
def by_factors(
    student,
    teacher,
    alpha_s_ptr,
    alpha_t_ptr,
    distance_ptr,
    factors_ptr,
    stride_term,
    start_m,
    start_c,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the sum of both networks' features times alpha times factor; the student's also times 1 - distance.

    Both products are computed in the same order: for equal features they cancel exactly.
    """
    channels = student.columns
    of_student = contiguous(factors_ptr, channels, channels)
    of_teacher = contiguous(factors_ptr + channels * channels, teacher.columns, channels)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total = by_factor(total, student, of_student, alpha_s_ptr, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C)
    if distance_ptr is not None:
        total *= 1 - load_vector(distance_ptr, start_m, student.rows, BLOCK_M)[:, None]
    return by_factor(total, teacher, of_teacher, alpha_t_ptr, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C)


@jit
def gradient_block(
    student,
    teacher,
    alpha_s_ptr,
    alpha_t_ptr,
    distance_ptr,
    factors_ptr,
    raw_factors_ptr,
    stride_term,
    start_m,
    start_c,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return V (BLOCK_M, BLOCK_C) of the pixels from start_m and the channels from start_c on, and z there.

    For "row" V is the gradient times N^2.
    """
    if raw_factors_ptr is None:
        V = by_factors(
            student,
            teacher,
            alpha_s_ptr,
            alpha_t_ptr,
            None,
            factors_ptr,
            stride_term,
            start_m,
            start_c,
            TERMS,
            BLOCK_K,
            BLOCK_C,
        )
        z = load_tile(student, start_m, start_c, BLOCK_M, BLOCK_C).to(tl.float32)
        if alpha_s_ptr is not None:
            z *= load_vector(alpha_s_ptr, start_m, student.rows, BLOCK_M)[:, None]
    else:
        V = by_factors(
            student, teacher, None, None, None, factors_ptr, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C
        )
        of_rows = by_factors(
            student,
            teacher,
            alpha_s_ptr,
            alpha_t_ptr,
            distance_ptr,
            raw_factors_ptr,
            stride_term,
            start_m,
            start_c,
            TERMS,
            BLOCK_K,
            BLOCK_C,
        )
        V = 0.5 * (V + of_rows * load_vector(alpha_s_ptr, start_m, student.rows, BLOCK_M)[:, None])
        z = V  # not used
    return V, z


@jit
def closed_form_gradient_kernel(
    student_ptr,
    teacher_ptr,
    factors_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    partial_ptr,
    loss_ptr,
    gradient_ptr,
    raw_factors_ptr,
    distance_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    stride_gb,
    stride_gn,
    stride_gc,
    stride_term,
    pixels,
    channels_s,
    channels_t,
    partials,
    weight,
    DETACH_NORMS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dL/dQ of BLOCK_M pixels, and the loss of each image from its partial sums.

    With several blocks of channels, V is computed twice for "cosine": the first time for z . V. For "row",
    raw_factors_ptr has the factors of the first stage, and factors_ptr those of the second.
    """
    COSINE: tl.constexpr = alpha_s_ptr is not None and raw_factors_ptr is None
    PROJECT: tl.constexpr = COSINE and not DETACH_NORMS
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    program = tl.program_id(0)
    start_m = program % row_blocks * BLOCK_M
    image = (program // row_blocks).to(tl.int64)
    student = Matrix(student_ptr + image * stride_sb, pixels, channels_s, stride_sn, stride_sc)
    teacher = Matrix(teacher_ptr + image * stride_tb, pixels, channels_t, stride_tn, stride_tc)
    gradient = Matrix(gradient_ptr + image * stride_gb, pixels, channels_s, stride_gn, stride_gc)
    factors_ptr += image * (channels_s + channels_t) * channels_s
    if alpha_s_ptr is not None:
        alpha_s_ptr += image * pixels
        alpha_t_ptr += image * pixels
    if raw_factors_ptr is not None:
        raw_factors_ptr += image * (channels_s + channels_t) * channels_s
        distance_ptr += image * pixels
    along = tl.zeros([BLOCK_M], tl.float32)
    if COSINE and DETACH_NORMS:
        # D_ii counts as 0, but V includes it where only the teacher's norm is 0: D_ii = 1
        along = tl.where(load_vector(alpha_t_ptr, start_m, pixels, BLOCK_M) == 0, 4.0, 0.0)
    if PROJECT and not ONE_BLOCK:
        for start_c in range(0, channels_s, BLOCK_C):
            V, z = gradient_block(
                student,
                teacher,
                alpha_s_ptr,
                alpha_t_ptr,
                None,
                factors_ptr,
                None,
                stride_term,
                start_m,
                start_c,
                TERMS,
                BLOCK_K,
                BLOCK_C,
            )
            along += tl.sum(z * V, 1)
    for start_c in range(0, channels_s, BLOCK_C):
        V, z = gradient_block(
            student,
            teacher,
            alpha_s_ptr,
            alpha_t_ptr,
            distance_ptr,
            factors_ptr,
            raw_factors_ptr,
            stride_term,
            start_m,
            start_c,
            TERMS,
            BLOCK_K,
            BLOCK_C,
        )
        if COSINE:
            if PROJECT and ONE_BLOCK:
                along = tl.sum(z * V, 1)
            alpha = load_vector(alpha_s_ptr, start_m, pixels, BLOCK_M)
            V = (V - along[:, None] * z) * alpha[:, None]
        store_tile(gradient, V * weight, start_m, start_c)

    if start_m == 0:
        store_loss(partial_ptr, loss_ptr, image, partials, weight)


@jit
def store_loss(partial_ptr, loss_ptr, image, partials, weight):
    """Compute the loss of an image from its partial sums."""
    loss = tl.zeros([BLOCK_P], tl.float64)
    for start_p in range(0, partials, BLOCK_P):
        loss += load_vector(partial_ptr + image * partials, start_p, partials, BLOCK_P)
    loss = tl.sum(loss, 0)
    # a sum of squares up to rounding; the comparison keeps NaN
    tl.store(loss_ptr + image, (tl.where(loss < 0, 0.0, loss) * weight).to(tl.float32))


@jit
def loss_kernel(partial_ptr, loss_ptr, partials, weight):
    """Compute the loss of each image from its partial sums, where no gradient is required."""
    store_loss(partial_ptr, loss_ptr, tl.program_id(0).to(tl.int64), partials, weight)


# -- launchers -------------------------------------------------------------------------------------------------------


def gradient_blocks(dtype: torch.dtype, channels: int, row: bool = False) -> tuple[int, int]:
    """Return the channels that are summed at a time and those of a block of the gradient.

    With more, the accumulators and the terms of the features do not fit into registers.
    """
    block_k = BLOCK_SUM // 2 if dtype == torch.float32 or (row and dtype == torch.float16) else BLOCK_SUM
    most = 64 if row or dtype == torch.float32 else 128
    return block_k, min(most, max(32, triton.next_power_of_2(channels)))


def plan_gradient(
    plan: Plan,
    student: Array,
    teacher: Array,
    alphas: tuple[Array | None, Array | None],
    partials: Array,
    factors: Array,
    loss: Array,
    gradient: Array,
    detach_norms: bool = False,
    of_row: tuple[Array, Array] | None = None,
) -> None:
    """Plan the launch that computes the losses (B,), means over all pairs, and their gradients (B, N, C_s).

    Args:
        plan: the plan that the launch is added to.
        student, teacher: (B, N, C_s) and (B, N, C_t).
        alphas: the scales of both.
        partials, factors: of ``plan_sums``.
        loss, gradient: the results.
        detach_norms: whether the norms are constants to the gradient; not for "row".
        of_row: for "row", the factors of its first stage and the distances of its rows.
    """
    batch, pixels, channels_s = student.shape
    block_k, block_c = gradient_blocks(student.dtype, channels_s, of_row is not None)
    plan.launch(
        closed_form_gradient_kernel,
        (batch * triton.cdiv(pixels, BLOCK_PIXELS),),
        student,
        teacher,
        factors,
        *alphas,
        partials,
        loss,
        gradient,
        *(of_row or (None, None)),
        *student.strides,
        *teacher.strides,
        *gradient.strides,
        factors.strides[0],
        pixels,
        channels_s,
        teacher.shape[2],
        partials.shape[1],
        1 / pixels**2,
        DETACH_NORMS=detach_norms,
        ONE_BLOCK=channels_s <= block_c,
        TERMS=feature_terms(student.dtype),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        **OPTIONS,
    )


def plan_loss(plan: Plan, pixels: int, partials: Array, loss: Array) -> None:
    """Plan the launch that computes the losses (B,), means over all pairs, from ``partials`` of ``plan_sums``."""
    batch, count = partials.shape
    plan.launch(loss_kernel, (batch,), partials, loss, count, 1 / pixels**2, **FINISH_OPTIONS)
