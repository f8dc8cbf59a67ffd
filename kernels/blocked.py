"""Backend ``blocked``: the one-pass algorithm in PyTorch, a strip of rows at a time. Any device, O(strip * N) memory.

K is symmetric, so a strip with rows I needs only the columns from I on: the part right of its diagonal block also
stands for the mirrored part below the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import Relation, Scales, TileSums, accumulator, distance_value
from .strips import Alphas, gradient_terms, relate, strip_rows


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``TileSums``."""
    batch, pixels, _ = student.shape
    dtype = accumulator(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    alphas = Alphas(scales.student, scales.teacher)
    loss = student.new_zeros(batch, dtype=torch.float64 if student.device.type == "cpu" else dtype)
    U = torch.zeros_like(student) if need_grad else None
    h = student.new_zeros(batch, pixels) if need_grad and relation.differentiates_norms else None

    rows = strip_rows(batch, pixels, student.device)
    for start in range(0, pixels, rows):
        own = min(rows, pixels - start)  # columns of the diagonal block
        block, columns, rest = slice(start, start + own), slice(start, None), slice(start + own, None)
        gram_s = student[:, block] @ student[:, columns].mT
        gram_t = teacher[:, block] @ teacher[:, columns].mT
        strip = relate(gram_s, gram_t, alphas.at(block), alphas.at(columns), relation, diagonal=0)
        value = distance_value(strip.difference, relation)
        if strip.mirrored_difference is None:
            loss += value[..., :own].sum((1, 2)) + 2 * value[..., own:].sum((1, 2))
        else:
            mirrored_value = distance_value(strip.mirrored_difference[..., own:], relation)
            loss += value.sum((1, 2)) + mirrored_value.sum((1, 2))
        if U is None:
            continue
        terms = gradient_terms(strip, alphas.at(block).student, alphas.at(columns).student, relation)
        if h is not None and terms.h is not None and terms.mirrored_h is not None:
            h[:, block] += terms.h.sum(2)
            h[:, rest] += terms.mirrored_h[..., own:].sum(1)
        U[:, block] += terms.K @ student[:, columns]
        U[:, rest] += terms.K[..., own:].mT @ student[:, block]
    return TileSums(loss.to(dtype), U, h)


def unavailable_reason(device: torch.device) -> str | None:
    """Return None: this backend runs on every device."""
    return None
