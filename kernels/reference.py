"""Backend ``reference``: the definition with N x N arrays, in plain PyTorch that autograd differentiates.

It materialises several N x N arrays per image. Use it to read the definition and to check the other backends: it shares
no gradient code with them. It is the only backend that supports double backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import Relation, accumulator, distance_value, without_autocast


def relation_matrix(features: Tensor, relation: Relation) -> Tensor:
    """Return the relation matrix A (B, N, N) of features (B, N, C): float64 for float64 features, else float32."""
    features = features.to(accumulator(features.dtype))
    gram = features @ features.mT
    if relation.normalize == "none":
        return gram.relu() if relation.rectify else gram
    rows = gram if relation.normalize == "row" else features
    # after division by a power of two the squares neither overflow nor underflow
    size = rows.detach().abs().amax((-2, -1)).clamp_min(torch.finfo(rows.dtype).tiny).log2().floor().exp2()[:, None]
    square = (rows / size.unsqueeze(-1)).square().sum(-1)
    alive = square.sqrt() * size > relation.eps
    # the inner where keeps the infinite slope of 1/sqrt at 0 out of the backward pass, where 0 * inf is NaN
    alpha = torch.where(alive, torch.where(alive, square, 1).rsqrt() / size, 0)
    if relation.detach_norms:
        alpha = alpha.detach()
    relations = gram * alpha.unsqueeze(-1)
    if relation.normalize == "cosine":
        relations = relations * alpha.unsqueeze(-2)
    return relations.relu() if relation.rectify else relations


def relation_loss(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Return the mean of rho(A_student - A_teacher) over all pairs: (B, N, C_s), (B, N, C_t) -> (B,)."""
    with without_autocast(student.device):
        difference = relation_matrix(student, relation) - relation_matrix(teacher, relation)
        if relation.normalize == "cosine":
            # a pixel's relation to itself is always 1: a tie, kept exact
            difference = difference * ~torch.eye(difference.shape[-1], dtype=torch.bool, device=difference.device)
        return distance_value(difference, relation).mean((-2, -1))


def unavailable_reason(device: torch.device) -> str | None:
    """Return None: this backend runs on every device."""
    return None
