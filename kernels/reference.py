"""Backend ``reference``: the definition, materialised. Plain PyTorch that autograd differentiates.

It holds several N x N arrays per image and is here to be read, and to check the others against: it
shares no gradient code with them, and alone can be differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import Relation, accumulator, distance_value


def relation_matrix(features: Tensor, relation: Relation) -> Tensor:
    """The relation matrix A (B, N, N) of features (B, N, C), in float64 for float64 and in float32 otherwise."""
    features = features.to(accumulator(features.dtype))
    gram = features @ features.mT
    if relation.normalize == "none":
        return gram
    rows = gram if relation.normalize == "row" else features
    # divided by a power of two, their squares neither overflow nor underflow
    size = rows.detach().abs().amax((-2, -1)).clamp_min(torch.finfo(rows.dtype).tiny).log2().floor().exp2()[:, None]
    square = (rows / size.unsqueeze(-1)).square().sum(-1)
    alive = square.sqrt() * size > relation.eps
    # the inner where keeps the infinite slope of 1/sqrt at 0 out of the backward pass, where 0 * inf is NaN
    alpha = torch.where(alive, torch.where(alive, square, 1).rsqrt() / size, 0)
    relations = gram * alpha.unsqueeze(-1)
    return relations if relation.normalize == "row" else relations * alpha.unsqueeze(-2)


def relation_loss(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """The mean of rho(A_student - A_teacher) over all pairs: (B, N, C_s), (B, N, C_t) -> (B,)."""
    with torch.autocast(student.device.type, enabled=False):
        difference = relation_matrix(student, relation) - relation_matrix(teacher, relation)
        if relation.normalize == "cosine":
            # a pixel's relation to itself is 1 whatever the features: a tie, kept exact
            difference = difference * ~torch.eye(difference.shape[-1], dtype=torch.bool, device=difference.device)
        return distance_value(difference, relation).mean((-2, -1))


def unavailable_reason(device: torch.device) -> str | None:
    """None: it runs everywhere."""
    return None
