"""The tile kernel of backend ``triton``: loss, U and h of a row block in one pass over the columns."""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import Relation, Scales
from .configurations import TERMS, Configuration, autotune, configuration, number_format, run_milliseconds
from .primitives import INTERPRET, features_product, jit, load_tile, multiprocessors, product, store_tile, tl, triton


class Partials(NamedTuple):
    """The partial sums that the programs of the tile kernel write, to be summed in a fixed order.

    loss: (B, programs). U: (splits, B, N, C_s) and h: (splits, B, N), None under the conditions of ``TileSums``.
    """

    loss: Tensor
    U: Tensor | None
    h: Tensor | None


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
def distance_grad(difference, delta, DISTANCE: tl.constexpr):
    """Return rho'(D), elementwise; 0 at a tie of the l1 distance."""
    if DISTANCE == "l1":
        # 1.0 with the sign bit of D takes fewer instructions than two comparisons
        one = ((difference.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
        return tl.where(difference == 0, 0.0, one)
    elif DISTANCE == "l2":
        return 2 * difference
    else:
        return tl.minimum(tl.maximum(difference, -delta), delta)


@jit
def gram_block(
    rows,
    columns,
    ptr,
    start_m,
    start_n,
    stride_n,
    stride_c,
    pixels,
    CHANNELS: tl.constexpr,
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
    if CHANNELS > BLOCK_C:
        for start_c in range(0, CHANNELS, BLOCK_C):
            left = load_tile(ptr, start_m, start_c, stride_n, stride_c, pixels, CHANNELS, BLOCK_M, BLOCK_C)
            right = load_tile(ptr, start_c, start_n, stride_c, stride_n, CHANNELS, pixels, BLOCK_C, BLOCK_N)
            gram = features_product(left, right, gram, TERMS)
    else:
        gram = features_product(rows, columns, gram, TERMS)
    return gram


@jit
def relation_kernel(
    student_ptr,
    teacher_ptr,
    alpha_s_ptr,
    alpha_t_ptr,
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
    splits,
    split_columns,
    delta,
    CHANNELS_S: tl.constexpr,
    CHANNELS_T: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute the ``Partials``: loss (B * splits * row blocks), U (splits, B, N, C_s) and h (splits, B, N).

    A program computes BLOCK_M rows over ``split_columns`` columns; see the docstring of the package. If the channels do
    not fit into BLOCK_S or BLOCK_T, the program loops over them. Each program then computes BLOCK_S channels of U
    (grid axis 1). The channel counts are constexpr: a training uses few pairs of them, and masks that are known at
    compile time need fewer registers. TERMS is the number of bfloat16 terms of a float32, see primitives.py.
    """
    LOOP_S: tl.constexpr = CHANNELS_S > BLOCK_S
    LOOP_T: tl.constexpr = CHANNELS_T > BLOCK_T
    program = tl.program_id(0)
    row_blocks = tl.cdiv(pixels, BLOCK_M)
    start_m = program % row_blocks * BLOCK_M
    split = program // row_blocks % splits
    image = (program // row_blocks // splits).to(tl.int64)
    start_u = tl.program_id(1) * BLOCK_S
    student_ptr += image * stride_sb
    teacher_ptr += image * stride_tb
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if NORMALIZE != "none":
        alpha_s_ptr += image * pixels
        alpha_t_ptr += image * pixels
        alpha_sm = tl.load(alpha_s_ptr + offs_m, mask=offs_m < pixels, other=0.0)[:, None]
        alpha_tm = tl.load(alpha_t_ptr + offs_m, mask=offs_m < pixels, other=0.0)[:, None]
    student_m = None
    teacher_m = None
    if not LOOP_S:
        student_m = load_tile(student_ptr, start_m, 0, stride_sn, stride_sc, pixels, CHANNELS_S, BLOCK_M, BLOCK_S)
    if not LOOP_T:
        teacher_m = load_tile(teacher_ptr, start_m, 0, stride_tn, stride_tc, pixels, CHANNELS_T, BLOCK_M, BLOCK_T)

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
            student_n = load_tile(student_ptr, 0, start_n, stride_sc, stride_sn, CHANNELS_S, pixels, BLOCK_S, BLOCK_N)
        gram_s = gram_block(
            student_m,
            student_n,
            student_ptr,
            start_m,
            start_n,
            stride_sn,
            stride_sc,
            pixels,
            CHANNELS_S,
            TERMS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_S,
        )
        if not LOOP_T:
            teacher_n = load_tile(teacher_ptr, 0, start_n, stride_tc, stride_tn, CHANNELS_T, pixels, BLOCK_T, BLOCK_N)
        gram_t = gram_block(
            teacher_m,
            teacher_n,
            teacher_ptr,
            start_m,
            start_n,
            stride_tn,
            stride_tc,
            pixels,
            CHANNELS_T,
            TERMS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_T,
        )

        offs_n = start_n + tl.arange(0, BLOCK_N)
        mirrors = (start_n >= start_m + BLOCK_M).to(tl.float32)  # 0 on the diagonal block, which is its own mirror
        if NORMALIZE == "none":
            difference = gram_s - gram_t
        else:
            alpha_sn = tl.load(alpha_s_ptr + offs_n, mask=offs_n < pixels, other=0.0)[None, :]
            alpha_tn = tl.load(alpha_t_ptr + offs_n, mask=offs_n < pixels, other=0.0)[None, :]
            if NORMALIZE == "cosine":
                difference = gram_s * (alpha_sm * alpha_sn) - gram_t * (alpha_tm * alpha_tn)
                # a pixel's relation to itself is a tie: make it exactly 0; NaN stays
                difference = tl.where(offs_m[:, None] == offs_n[None, :], 0.0 * difference, difference)
            else:
                difference = gram_s * alpha_sm - gram_t * alpha_tm
                mirrored = gram_s * alpha_sn - gram_t * alpha_tn
        value = tl.sum(distance_value(difference, delta, DISTANCE), 1)
        if NEED_GRAD:
            loss += value
        elif NORMALIZE == "row":
            loss += value + mirrors * tl.sum(distance_value(mirrored, delta, DISTANCE), 1)
        else:
            loss += value + mirrors * value

        if NEED_GRAD:
            K = distance_grad(difference, delta, DISTANCE)
            if NORMALIZE == "row":
                h += tl.sum(K * gram_s, 1)
                K = K * alpha_sm + distance_grad(mirrored, delta, DISTANCE) * alpha_sn
            elif NORMALIZE == "cosine":  # the other factor of K, 2 alpha_i, follows after the loop over columns
                K *= alpha_sn
                h += tl.sum(K * gram_s, 1)
            if LOOP_S:
                student_n = load_tile(
                    student_ptr, start_u, start_n, stride_sc, stride_sn, CHANNELS_S, pixels, BLOCK_S, BLOCK_N
                )
            # one bfloat16 term represents a sign exactly
            U = product(K, tl.trans(student_n), U, 1 if NORMALIZE == "none" and DISTANCE == "l1" else TERMS, TERMS)

    if start_u == 0:
        tl.store(loss_ptr + program, tl.sum(loss))
    if NEED_GRAD:
        if NORMALIZE == "none":
            U *= 2
        if NORMALIZE == "cosine":
            U *= 2 * alpha_sm
            h *= 2
        if NORMALIZE != "none" and start_u == 0:
            h *= tl.reshape(alpha_sm, [BLOCK_M])
            h_ptr += split.to(tl.int64) * stride_hs + image * pixels
            tl.store(h_ptr + offs_m, h, mask=offs_m < pixels)
        U_ptr += split.to(tl.int64) * stride_us + image * stride_ub
        store_tile(U_ptr, U, start_m, start_u, stride_un, stride_uc, pixels, CHANNELS_S, BLOCK_M, BLOCK_S)


# -- launchers -------------------------------------------------------------------------------------------------------


# Bytes that the parts of U beyond the first may take: only small images need split columns.
WORKSPACE = 12 << 20


@functools.lru_cache(maxsize=1024)
def column_splits(batch: int, pixels: int, channels: int, need_grad: bool, block: int, slots: int) -> tuple[int, int]:
    """Return the number of programs that share the columns of a row block, and the columns of each.

    The choice is the smallest number with the shortest estimated time on ``slots`` programs that run at a time.
    """
    blocks = triton.cdiv(pixels, block)
    most = min(blocks, 1 + WORKSPACE // (4 * batch * pixels * channels)) if need_grad else blocks

    def duration(splits: int) -> int:
        programs = batch * blocks * (splits if need_grad else (splits + 1) / 2)  # half of them are below the diagonal
        return math.ceil(programs / slots) * (triton.cdiv(blocks, splits) + 1)  # 1: the work outside the loop

    split_blocks = triton.cdiv(blocks, min(range(1, most + 1), key=duration))
    return triton.cdiv(blocks, split_blocks), split_blocks * block


def constants(
    relation: Relation, need_grad: bool, channels: tuple[int, int], numbers: str, chosen: Configuration
) -> dict:
    """Return the constexpr arguments of the kernel."""
    return {
        "CHANNELS_S": channels[0],
        "CHANNELS_T": channels[1],
        "NORMALIZE": relation.normalize,
        "DISTANCE": relation.distance,
        "NEED_GRAD": need_grad,
        "TERMS": TERMS[numbers],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_S": chosen.block_s,
        "BLOCK_T": chosen.block_t,
    }


def compile_options(chosen: Configuration) -> dict:
    """Return the compile options of the kernel. Fused multiply-adds are off: D_ij of equal features must be 0."""
    return {"num_warps": chosen.warps, "num_stages": chosen.stages, "enable_fp_fusion": False}


def launch(
    student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool, chosen: Configuration
) -> Partials:
    """Run the tile kernel on features (B, N, C_s), (B, N, C_t) and float32 scales (B, N); return its partial sums."""
    batch, pixels, channels = student.shape
    chunks = triton.cdiv(channels, chosen.block_s) if need_grad else 1
    slots = max(1, multiprocessors(student.device) // chunks)
    splits, split_columns = column_splits(batch, pixels, channels, need_grad, chosen.block_m, slots)
    loss = student.new_empty((batch, splits * triton.cdiv(pixels, chosen.block_m)), dtype=torch.float32)
    U = h = None
    if need_grad and splits == 1:
        U = torch.empty_like(student, dtype=torch.float32).unsqueeze(0)  # with the strides of the gradient
    elif need_grad:
        U = student.new_empty((splits, *student.shape), dtype=torch.float32)
    if need_grad and relation.normalize != "none":
        h = student.new_empty((splits, batch, pixels), dtype=torch.float32)
    relation_kernel[(loss.numel(), chunks)](
        student,
        teacher,
        scales.student,
        scales.teacher,
        loss,
        U,
        h,
        *student.stride(),
        *teacher.stride(),
        *((0, 0, 0, 0) if U is None else U.stride()),
        0 if h is None else h.stride(0),
        pixels,
        splits,
        split_columns,
        relation.delta,
        **constants(relation, need_grad, (channels, teacher.shape[2]), number_format(student.dtype), chosen),
        **compile_options(chosen),
    )
    return Partials(loss, U, h)


def relation_partials(
    student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool
) -> Partials:
    """Run ``launch`` with the configuration for this device and these features."""
    device, numbers = student.device, number_format(student.dtype)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    chosen = configuration(capability, numbers, student.shape[2], teacher.shape[2])
    arguments = (student, teacher, scales, relation, need_grad)
    # no autotuning while a CUDA graph is captured: measuring would break the capture
    if os.environ.get("SRPKD_AUTOTUNE") == "1" and not INTERPRET and not torch.cuda.is_current_stream_capturing():
        case = [torch.cuda.get_device_name(device), numbers, relation.normalize, relation.distance, need_grad]
        case += [triton.next_power_of_2(size) for size in student.shape[:2]] + [chosen.block_s, chosen.block_t]

        def measure(candidate: Configuration) -> float:
            return run_milliseconds(lambda: launch(*arguments, candidate))

        chosen = autotune("-".join(map(str, case)), relation_kernel.cache_key, chosen, measure)
    return launch(*arguments, chosen)
