"""The reduction of the tile kernel's partial sums to the loss and its gradient, as Triton kernels.

The formulas are those of ``formulas.gradient_of``.
"""

from __future__ import annotations

import math

from ..formulas import Relation
from .configurations import BLOCK_CHANNELS, OPTIONS, product_blocks
from .moments import load_weights, moment_product, plan_weighted_moment
from .plans import Array, Plan
from .primitives import (
    Matrix,
    contiguous,
    feature_terms,
    jit,
    kernel_constant,
    load_tile,
    load_vector,
    moved,
    multiprocessors,
    store_tile,
    tl,
    triton,
)
from .scales import PlannedScales
from .tiles import Partials

BLOCK_PARTIALS = kernel_constant(1024)  # partial losses that are added at a time

# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def store_losses(partial_ptr, loss_ptr, losses, partials, weight):
    """Write weight times the sum of ``partials`` adjacent partial losses to each of the losses, one per program."""
    program = tl.program_id(0)
    if program < losses:
        partial_ptr += program.to(tl.int64) * partials
        value = tl.zeros([BLOCK_PARTIALS], tl.float32)
        for start_p in range(0, partials, BLOCK_PARTIALS):
            value += load_vector(partial_ptr, start_p, partials, BLOCK_PARTIALS)
        tl.store(loss_ptr + program, tl.sum(value) * weight)


@jit
def loss_kernel(partial_ptr, loss_ptr, losses, partials, loss_weight):
    """Compute the losses from their partial sums, where no gradient is required."""
    store_losses(partial_ptr, loss_ptr, losses, partials, loss_weight)


@jit
def gradient_kernel(
    student_ptr,
    U_ptr,
    h_ptr,
    alpha_ptr,
    size_ptr,
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
    pixels,
    channels,
    batch,
    splits,
    losses,
    partials,
    weight,
    loss_weight,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dL/dQ of one tile of the student's features, and the losses, from their partial sums.

    NORMALIZE is "none" if the gradient has no terms from the norms.
    A program reads only those elements of U that it then writes to the gradient: U and the gradient may share memory.
    """
    row_blocks, blocks = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start_c = program % blocks * BLOCK_C
    start_m = program // blocks % row_blocks * BLOCK_M
    image = (program // blocks // row_blocks).to(tl.int64)
    student = Matrix(student_ptr + image * stride_sb, pixels, channels, stride_sn, stride_sc)

    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if NORMALIZE != "none":
        size = tl.load(size_ptr + image) if NORMALIZE == "row" else 1.0
        weights = load_weights(
            h_ptr + image * pixels, alpha_ptr + image * pixels, size, start_m, stride_hs, pixels, splits, BLOCK_M
        )
    if NORMALIZE == "cosine":
        features = load_tile(student, start_m, start_c, BLOCK_M, BLOCK_C)
        total = features.to(tl.float32) * -weights[:, None]
    if NORMALIZE == "row":
        stride_term = tl.cast(batch, tl.int64) * channels * channels
        for matrix in range(2):  # a loop, so that its body is compiled once
            if matrix == 0:
                terms_ptr = moment_ptr + image * channels * channels
            else:
                terms_ptr = weighted_ptr + image * channels * channels
                total *= weights[:, None]
            moment = contiguous(terms_ptr, channels, channels)
            for start_k in range(0, channels, BLOCK_K):
                features = load_tile(student, start_m, start_k, BLOCK_M, BLOCK_K)
                total = moment_product(features, moment, stride_term, start_k, start_c, total, TERMS, BLOCK_K, BLOCK_C)
        total = -total
    U = Matrix(U_ptr + image * stride_ub, pixels, channels, stride_un, stride_uc)
    for split in range(splits):
        total += load_tile(moved(U, tl.cast(split, tl.int64) * stride_us), start_m, start_c, BLOCK_M, BLOCK_C)
    gradient = Matrix(gradient_ptr + image * stride_gb, pixels, channels, stride_gn, stride_gc)
    store_tile(gradient, total * weight, start_m, start_c)
    store_losses(partial_ptr, loss_ptr, losses, partials, loss_weight)


# -- launchers -------------------------------------------------------------------------------------------------------


def loss_weight(reduction: str, batch: int, pixels: int) -> float:
    """Return the factor of the sum of rho(D) in the loss of an image or, with a reduction, of the batch."""
    return 1 / (pixels**2 * batch) if reduction == "mean" else 1 / pixels**2


def plan_loss(plan: Plan, partials: Partials, loss: Array, weight: float) -> None:
    """Plan the launch that computes the losses, (B,) or (), from the partial sums where there is no gradient."""
    losses = math.prod(loss.shape)
    counts = losses, math.prod(partials.loss.shape) // losses
    plan.launch(loss_kernel, (losses,), partials.loss, loss, *counts, weight, **OPTIONS)


def plan_gradient(
    plan: Plan,
    student: Array,
    partials: Partials,
    scales: PlannedScales,
    relation: Relation,
    loss: Array,
    gradient: Array,
    weight: float,
) -> None:
    """Plan the launches that compute the losses, (B,) or (), and the gradient (B, N, C) of the losses of all images.

    ``partials.U`` and ``gradient`` may share memory. ``weight`` is ``loss_weight``.
    """
    batch, pixels, channels = student.shape
    losses = math.prod(loss.shape)
    h, alpha, moments = partials.h, None, None
    if h is not None:
        alpha, moments = scales.vectors[0], scales.moments
    assert partials.U is not None, "the tile kernel ran without a gradient"
    weighted = None
    if h is not None and alpha is not None and moments is not None:
        weighted = plan_weighted_moment(plan, student, h, alpha, moments)
    block_m, block_k, options = product_blocks(student.dtype, batch * pixels, multiprocessors(plan.device))
    plan.launch(
        gradient_kernel,
        (batch * triton.cdiv(pixels, block_m) * triton.cdiv(channels, BLOCK_CHANNELS),),
        student,
        partials.U,
        h,
        alpha,
        None if moments is None else moments.size,
        None if moments is None else moments.terms,
        weighted,
        partials.loss,
        loss,
        gradient,
        *student.strides,
        *partials.U_strides,
        *gradient.strides,
        0 if h is None else h.strides[0],
        pixels,
        channels,
        batch,
        partials.splits,
        losses,
        math.prod(partials.loss.shape) // losses,
        1 / pixels**2,
        weight,
        NORMALIZE=relation.normalize if relation.differentiates_norms else "none",
        TERMS=feature_terms(student.dtype),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_C=BLOCK_CHANNELS,
        **options,
    )
