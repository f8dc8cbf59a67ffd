"""Backend ``blocked``: the one-pass algorithm in PyTorch, a strip of rows at a time. Any device, O(block * N) memory.

K is symmetric, so the strip of rows I needs only the columns from I on: its part right of the diagonal
block stands for the mirrored part below the diagonal too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import Relation, Scales, TileSums, accumulator, distance_grad, distance_value

# How many elements of one strip's matrices are held at a time: on a CPU they should stay in the cache,
# on a GPU one launch should fill the device.
STRIP_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}


def block_rows(batch: int, pixels: int, device: torch.device) -> int:
    """How many rows of (batch, rows, pixels) make a strip."""
    return max(16, min(pixels, STRIP_ELEMENTS.get(device.type, 2**22) // (batch * pixels)))


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``Tiles``."""
    batch, pixels, _ = student.shape
    dtype = accumulator(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = student.new_zeros(batch, dtype=torch.float64 if student.device.type == "cpu" else dtype)
    U = torch.zeros_like(student) if need_grad else None
    h = student.new_zeros(batch, pixels) if need_grad and relation.normalize != "none" else None

    rows = block_rows(batch, pixels, student.device)
    for start in range(0, pixels, rows):
        own = min(rows, pixels - start)  # how many of the strip's columns lie in its diagonal block
        block, strip, rest = slice(start, start + own), slice(start, None), slice(start + own, None)
        gram_s = student[:, block] @ student[:, strip].mT
        gram_t = teacher[:, block] @ teacher[:, strip].mT
        relations, relations_t = (
            gram if alpha is None else scaled(gram, alpha[:, block], alpha[:, strip], relation)
            for gram, alpha in ((gram_s, scales.student), (gram_t, scales.teacher))
        )
        difference = relations - relations_t
        if relation.normalize == "cosine":  # a pixel's relation to itself: a tie, kept exact; NaN stays
            difference.diagonal(dim1=1, dim2=2).mul_(0)
        value = distance_value(difference, relation)
        if relation.symmetric:
            loss += value[..., :own].sum((1, 2)) + 2 * value[..., own:].sum((1, 2))
        else:
            mirrored_relations = gram_s.mul_(scales.student[:, None, strip])
            mirrored = mirrored_relations - gram_t.mul_(scales.teacher[:, None, strip])
            loss += value.sum((1, 2)) + distance_value(mirrored[..., own:], relation).sum((1, 2))
        if not need_grad:
            continue

        slope = distance_grad(difference, relation)
        if relation.symmetric:
            K = 2 * slope
            if h is not None:
                relations *= K
                h[:, block] += relations.sum(2)
                h[:, rest] += relations[..., own:].sum(1)
                K *= scales.student[:, block, None]
                K *= scales.student[:, None, strip]
        else:
            mirrored_slope = distance_grad(mirrored, relation)
            h[:, block] += relations.mul_(slope).sum(2)
            h[:, rest] += mirrored_relations.mul_(mirrored_slope)[..., own:].sum(1)
            K = slope.mul_(scales.student[:, block, None])
            K.addcmul_(mirrored_slope, scales.student[:, None, strip])
        U[:, block] += K @ student[:, strip]
        U[:, rest] += K[..., own:].mT @ student[:, block]
    return TileSums(loss.to(dtype), U, h)


def scaled(gram: Tensor, alpha_rows: Tensor, alpha_columns: Tensor, relation: Relation) -> Tensor:
    """A_ij from G_ij (B, rows, columns)."""
    relations = gram * alpha_rows.unsqueeze(-1)
    return relations if relation.normalize == "row" else relations.mul_(alpha_columns.unsqueeze(-2))


def unavailable_reason(device: torch.device) -> str | None:
    """None: it runs everywhere."""
    return None
