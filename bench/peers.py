"""Alternatives to srpkd: the relation loss in plain PyTorch, and common ways to reduce its memory.

All but KeOps use the definition in ``srpkd.checking.gate``. Features are (B, N, C); the loss is a scalar, the mean over
the batch.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpkd.checking.gate import strip_loss, strips
from srpkd.kernels import Relation


def eager(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Compute the relation loss from whole N x N matrices."""
    return strip_loss(student, teacher, slice(None), relation)


def chunked(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Compute the relation loss strip by strip, with checkpointing: backward recomputes each strip."""
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for rows, share in strips(student):
        total = total + share * checkpoint(strip_loss, student, teacher, rows, relation, use_reentrant=False)
    return total


def keops(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Compute the relation loss with KeOps, whose symbolic matrices are reduced without being stored."""
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # read when pykeops is imported
    from pykeops.torch import Vi, Vj

    def matrix(features: Tensor):
        if relation.normalize == "cosine":
            features = F.normalize(features, dim=-1)
        features = features.contiguous()
        gram = Vi(features) | Vj(features)
        if relation.normalize != "row":
            return gram
        return gram * Vi((gram * gram).sum(dim=1).clamp_min(1e-24).rsqrt())

    total = student.new_zeros(())
    for ours, theirs in zip(student, teacher):
        difference = matrix(ours) - matrix(theirs)
        if relation.distance == "l1":
            distance = difference.abs()
        elif relation.distance == "l2":
            distance = difference**2
        else:
            inside = difference.clamp(-relation.delta, relation.delta)
            distance = inside * (difference - 0.5 * inside)
        total = total + distance.sum(dim=1).sum()
    return total / (student.shape[0] * student.shape[1] ** 2)
