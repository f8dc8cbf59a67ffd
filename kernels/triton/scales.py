"""The scales alpha of both relation matrices, as a Triton kernel that precedes the tile kernel.

The formulas are those of formulas.py. In PyTorch they take several times as many launches, float32 copies of the
features and, if TF32 is allowed, products that are too coarse for scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import Relation, Scales
from .configurations import BLOCK_CHANNELS, product_blocks
from .moments import Moments, moment_product, plan_moments
from .plans import Array, Plan
from .primitives import (
    Matrix,
    contiguous,
    feature_terms,
    jit,
    load_tile,
    multiprocessors,
    store_vector,
    tl,
    triton,
)

# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def split_power(x):
    """Split x >= 0 into (mantissa, power): mantissa in [1, 2), power a power of two; (1, 0) for x = 0.

    Their product is x. The mantissa of a subnormal number is less than 1.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(x == 0, 0.0, tl.maximum(power, 1.1754943508222875e-38))
    return tl.where(x == 0, 1.0, tl.div_rn(x, tl.where(x == 0, 1.0, power))), power


@jit
def scale_kernel(
    student_ptr,
    teacher_ptr,
    terms_s_ptr,
    terms_t_ptr,
    size_s_ptr,
    size_t_ptr,
    alpha_ptr,
    ratio_ptr,
    power_ptr,
    mantissa_ptr,
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
    batch,
    eps,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the scales (B, N) of a row block of student and teacher; see ``PlannedScales``.

    alpha is 1 / sqrt(q^T M q) for "row", with M from ``terms_kernel``, and 1 / sqrt(q^T q) for "cosine"; 0 for pixels
    of zero norm. M is symmetric: the program multiplies by the blocks on and above its diagonal.
    """
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    start_m = tl.program_id(0) % row_blocks * BLOCK_M
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    alpha_s = tl.zeros([BLOCK_M], tl.float32)
    alpha_t = tl.zeros([BLOCK_M], tl.float32)
    for network in range(2):  # a loop, so that its body is compiled once
        if network == 0:
            ptr, stride_n, stride_c, channels = teacher_ptr + image * stride_tb, stride_tn, stride_tc, channels_t
        else:
            ptr, stride_n, stride_c, channels = student_ptr + image * stride_sb, stride_sn, stride_sc, channels_s
        if NORMALIZE == "row":
            elements = tl.cast(channels, tl.int64) * channels
            if network == 0:
                terms_ptr, size = terms_t_ptr + image * elements, tl.load(size_t_ptr + image)
            else:
                terms_ptr, size = terms_s_ptr + image * elements, tl.load(size_s_ptr + image)
            moment = contiguous(terms_ptr, channels, channels)
        matrix = Matrix(ptr, pixels, channels, stride_n, stride_c)
        square = tl.zeros([BLOCK_M], tl.float32)
        for start_c in range(0, channels, BLOCK_C):
            features = load_tile(matrix, start_m, start_c, BLOCK_M, BLOCK_C)
            if NORMALIZE == "row":
                by_moment = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                last_k = start_c + BLOCK_C - BLOCK_K
                for start_k in range(0, last_k + 1, BLOCK_K):
                    left = load_tile(matrix, start_m, start_k, BLOCK_M, BLOCK_K)
                    by_moment *= tl.where(start_k == start_c, 2.0, 1.0)  # the blocks below the diagonal
                    by_moment = moment_product(
                        left, moment, batch * elements, start_k, start_c, by_moment, TERMS, BLOCK_K, BLOCK_C
                    )
            features = features.to(tl.float32)
            square += tl.sum((by_moment if NORMALIZE == "row" else features) * features, 1)
        norm = tl.sqrt_rn(tl.where(square < 0, 0.0, square))  # rounding can make a square slightly negative
        if NORMALIZE == "row":
            norm *= size
        # 0 * norm makes alpha NaN if the norm overflows or is NaN; otherwise it would be 0, as for a zero-norm pixel
        alpha = tl.where(norm <= eps, 0.0, tl.div_rn(1.0, tl.where(norm <= eps, 1.0, norm)) + 0.0 * norm)
        alpha_t, alpha_s = alpha_s, alpha
    mantissa, power = split_power(alpha_t)
    ratio = tl.div_rn(alpha_s, mantissa) + 0.0 * alpha_t  # NaN if alpha_t is
    offset = image * pixels
    store_vector(alpha_ptr + offset, alpha_s, start_m, pixels, BLOCK_M)
    store_vector(ratio_ptr + offset, ratio, start_m, pixels, BLOCK_M)
    store_vector(power_ptr + offset, power, start_m, pixels, BLOCK_M)
    store_vector(mantissa_ptr + offset, mantissa, start_m, pixels, BLOCK_M)
    if alpha_t_ptr is not None:
        store_vector(alpha_t_ptr + offset, alpha_t, start_m, pixels, BLOCK_M)


# -- launchers -------------------------------------------------------------------------------------------------------


class PlannedScales(NamedTuple):
    """The scales of both relation matrices, arrays (B, N); None for "none".

    With them, D_ij = mantissa_i (ratio_i G_s,ij - power_i G_t,ij) for "row"; for "cosine" the product of the values of
    i and j takes the place of each. ``power`` is the power of two in the teacher's alpha = mantissa * power: products
    with it are exact, so D of equal features is exactly 0 however the compiler rounds the two products.

    Attributes:
        vectors: alpha of the student; ratio = alpha / mantissa; power; mantissa.
        moments: the student's M, for "row".
    """

    vectors: tuple[Array | None, ...] = (None,) * 4
    moments: Moments | None = None


def split_scales(scales: Scales) -> tuple[Tensor, ...]:
    """Return alpha, ratio, power and mantissa of ``PlannedScales``, from float32 scales (B, N) as tensors."""
    if scales.student is None or scales.teacher is None:
        return ()
    teacher = scales.teacher
    mantissa, exponent = torch.frexp(teacher)
    power = torch.where(teacher == 0, 0, torch.ldexp(torch.ones_like(teacher), exponent - 1))
    mantissa = torch.where(teacher == 0, 1, 2 * mantissa)
    return scales.student, scales.student / mantissa + 0 * teacher, power, mantissa


def plan_scales(
    plan: Plan, student: Array, teacher: Array, relation: Relation, alpha_t: Array | None = None
) -> PlannedScales:
    """Plan the launches that compute the scales of features (B, N, C_s), (B, N, C_t).

    Args:
        alpha_t: receives the teacher's alpha (B, N), which is mantissa * power.
    """
    if relation.normalize == "none":
        return PlannedScales()
    batch, pixels, _ = student.shape
    vectors = tuple(plan.scratch(batch, pixels) for _ in range(4))
    matrices: list[Array | None] = [None] * 4
    moments_s = moments_t = None
    if relation.normalize == "row":
        moments_s, moments_t = plan_moments(plan, student, teacher)
        matrices = [moments_s.terms, moments_t.terms, moments_s.size, moments_t.size]
    block_m, block_k, options = product_blocks(student.dtype, batch * pixels, multiprocessors(plan.device))
    plan.launch(
        scale_kernel,
        (batch * triton.cdiv(pixels, block_m),),
        student,
        teacher,
        *matrices,
        *vectors,
        alpha_t,
        *student.strides,
        *teacher.strides,
        pixels,
        student.shape[2],
        teacher.shape[2],
        batch,
        relation.eps,
        NORMALIZE=relation.normalize,
        TERMS=feature_terms(student.dtype),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_C=BLOCK_CHANNELS,
        **options,
    )
    if moments_t is not None:
        plan.free(moments_t.terms, moments_t.size, moments_t.largest)
    return PlannedScales(vectors, moments_s)
