"""What only "row" needs: the gains of both networks, the scales of the rows, and the distances between them."""

from __future__ import annotations

import torch

from ..plans import Array, Plan
from ..primitives import Matrix, contiguous, feature_terms, jit, kernel_constant, load_tile, store_vector, tl, triton
from .gradient import by_factor, gradient_blocks
from .options import BLOCK_PIXELS, BLOCK_VECTOR, FINISH_OPTIONS, OPTIONS

SAMPLE = kernel_constant(64)  # pixels and channels that determine the gains
LARGEST_GAIN = kernel_constant(2.0**60)
BLOCK, BLOCK_M = kernel_constant(BLOCK_VECTOR), kernel_constant(BLOCK_PIXELS)

# -- kernels -----------------------------------------------------------------------------------------------------------


@jit
def gain_of(ptr, stride_n, stride_c, pixels, channels):
    """Return 1 / mean |x| of a sample of an image; 1 if it is 0, NaN if it is NaN or overflows."""
    step = tl.cast(tl.maximum(pixels // SAMPLE, 1), tl.int64)
    some = Matrix(ptr, pixels, channels, stride_n * step, stride_c)
    sample = load_tile(some, 0, 0, SAMPLE, SAMPLE).to(tl.float32)
    size = tl.sum(tl.sum(tl.abs(sample), 1), 0)
    count = (tl.minimum(pixels, SAMPLE) * tl.minimum(channels, SAMPLE)).to(tl.float32)
    gain = tl.div_rn(count, tl.where(size == 0, count, size))
    return tl.where(gain > LARGEST_GAIN, LARGEST_GAIN, gain) + 0.0 * size


@jit
def gains_kernel(
    student_ptr,
    teacher_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    gains_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    pixels,
    channels_s,
    channels_t,
):
    """Compute the gains (B, 2) of student and teacher, and alpha (B, N) of both with the gains at all pixels.

    The first stage multiplies features by the gains. D does not depend on the magnitude of the features, so features
    that differ in nothing else have small differences then.
    """
    blocks = tl.cdiv(pixels, BLOCK)
    start = tl.program_id(0) % blocks * BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    gain_s = gain_of(student_ptr + image * stride_sb, stride_sn, stride_sc, pixels, channels_s)
    gain_t = gain_of(teacher_ptr + image * stride_tb, stride_tn, stride_tc, pixels, channels_t)
    ones = tl.full([BLOCK], 1.0, tl.float32)
    store_vector(alpha_s_ptr + image * pixels, ones * gain_s, start, pixels, BLOCK)
    store_vector(alpha_t_ptr + image * pixels, ones * gain_t, start, pixels, BLOCK)
    if start == 0:
        tl.store(gains_ptr + 2 * image, gain_s)
        tl.store(gains_ptr + 2 * image + 1, gain_t)


@jit
def dot_by_factor(
    total,
    features,
    factor,
    right,
    stride_term,
    start_m,
    start_c,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return total + (features @ factor) . right, for the columns of the factor from start_c on."""
    zero = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    by = by_factor(zero, features, factor, None, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C)
    return total + tl.sum(by * load_tile(right, start_m, start_c, BLOCK_M, BLOCK_C).to(tl.float32), 1)


@jit
def alpha_of(square, gain, eps):
    """Return alpha from the square of 2 gain norm: 0 for zero-norm rows, NaN if the norm is NaN or overflows."""
    root = tl.sqrt_rn(tl.where(square < 0, 0.0, square))  # rounding can make a square slightly negative
    norm = tl.div_rn(root, 2 * gain)
    return tl.where(norm <= eps, 0.0, tl.div_rn(2.0, tl.where(norm <= eps, 1.0, root)) + 0.0 * norm)


@jit
def row_scales_kernel(
    student_ptr,
    teacher_ptr,
    factors_ptr,
    teacher_factor_ptr,
    gains_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
    distance_ptr,
    partial_ptr,
    stride_sb,
    stride_sn,
    stride_sc,
    stride_tb,
    stride_tn,
    stride_tc,
    stride_term,
    stride_teacher_term,
    pixels,
    channels_s,
    channels_t,
    eps,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute alpha of both networks and the distances of the rows (B, N) from the factors of the first stage.

    If partial_ptr is not None, also the partial losses (B, programs of an image) of the direct form.
    """
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    program = tl.program_id(0)
    start_m = program % row_blocks * BLOCK_M
    image = (program // row_blocks).to(tl.int64)
    student = Matrix(student_ptr + image * stride_sb, pixels, channels_s, stride_sn, stride_sc)
    teacher = Matrix(teacher_ptr + image * stride_tb, pixels, channels_t, stride_tn, stride_tc)
    factors_ptr += image * (channels_s + channels_t) * channels_s
    factor_ss = contiguous(factors_ptr, channels_s, channels_s)
    factor_ts = contiguous(factors_ptr + channels_s * channels_s, channels_t, channels_s)
    factor_tt = contiguous(teacher_factor_ptr + image * channels_t * channels_t, channels_t, channels_t)
    # 4 q . M_ss q, -4 q . M_st p, 4 p . M_tt p: for equal features they are equal or opposite
    ss = tl.zeros([BLOCK_M], tl.float32)
    st = tl.zeros([BLOCK_M], tl.float32)
    tt = tl.zeros([BLOCK_M], tl.float32)
    for start_c in range(0, channels_s, BLOCK_C):
        ss = dot_by_factor(ss, student, factor_ss, student, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C)
        st = dot_by_factor(st, teacher, factor_ts, student, stride_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C)
    for start_c in range(0, channels_t, BLOCK_C):
        tt = dot_by_factor(
            tt, teacher, factor_tt, teacher, stride_teacher_term, start_m, start_c, TERMS, BLOCK_K, BLOCK_C
        )
    alpha_s = alpha_of(ss, tl.load(gains_ptr + 2 * image), eps)
    alpha_t = alpha_of(tt, tl.load(gains_ptr + 2 * image + 1), eps)
    store_vector(alpha_s_ptr + image * pixels, alpha_s, start_m, pixels, BLOCK_M)
    store_vector(alpha_t_ptr + image * pixels, alpha_t, start_m, pixels, BLOCK_M)
    distance = 0.25 * alpha_s * (alpha_s * ss + alpha_t * st)
    store_vector(distance_ptr + image * pixels, distance, start_m, pixels, BLOCK_M)
    if partial_ptr is not None:
        a, b = alpha_s.to(tl.float64), alpha_t.to(tl.float64)
        loss = 0.25 * (a * (a * ss.to(tl.float64) + 2 * b * st.to(tl.float64)) + b * b * tt.to(tl.float64))
        tl.store(partial_ptr + program, tl.sum(loss, 0))


# -- launchers -------------------------------------------------------------------------------------------------------


def plan_gains(plan: Plan, student: Array, teacher: Array, alphas: tuple[Array, Array]) -> Array:
    """Plan the launch that computes the gains (B, 2), and writes them into ``alphas`` (B, N) too."""
    batch, pixels, channels_s = student.shape
    gains = plan.scratch(batch, 2)
    plan.launch(
        gains_kernel,
        (batch * triton.cdiv(pixels, BLOCK_VECTOR),),
        student,
        teacher,
        *alphas,
        gains,
        *student.strides,
        *teacher.strides,
        pixels,
        channels_s,
        teacher.shape[2],
        **FINISH_OPTIONS,
    )
    return gains


def plan_row_scales(
    plan: Plan,
    student: Array,
    teacher: Array,
    alphas: tuple[Array, Array],
    gains: Array,
    factors: Array,
    teacher_factor: Array,
    eps: float,
) -> tuple[Array, Array | None]:
    """Plan the launch that computes ``alphas`` and the distances (B, N), and partial losses (B, parts).

    The latter only if the networks have different numbers of channels.
    """
    batch, pixels, channels_s = student.shape
    channels_t = teacher.shape[2]
    row_blocks = triton.cdiv(pixels, BLOCK_PIXELS)
    distances = plan.scratch(batch, pixels)
    partials = None if channels_s == channels_t else plan.scratch(batch, row_blocks, dtype=torch.float64)
    block_k, block_c = gradient_blocks(student.dtype, max(channels_s, channels_t), row=True)
    plan.launch(
        row_scales_kernel,
        (batch * row_blocks,),
        student,
        teacher,
        factors,
        teacher_factor,
        gains,
        *alphas,
        distances,
        partials,
        *student.strides,
        *teacher.strides,
        factors.strides[0],
        teacher_factor.strides[0],
        pixels,
        channels_s,
        channels_t,
        eps,
        TERMS=feature_terms(student.dtype),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        **OPTIONS,
    )
    return distances, partials
