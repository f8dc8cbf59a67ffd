"""Alternatives to srpkd: the relation loss in plain PyTorch, and common ways to reduce its memory.

All use two functions: the rows I of a relation matrix, and the mean distance of two such strips. Features are
(B, N, C); the loss is a scalar, the mean over the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpkd.kernels import Relation

# Elements of the matrix of one strip: it fits into a CPU's cache, and occupies a whole GPU.
STRIP_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
MIN_ROWS = 128  # with fewer rows, writing the gradient of all pixels dominates the work of a strip


def relation_rows(features: Tensor, rows: slice, relation: Relation) -> Tensor:
    """Return the rows I of the relation matrix: (B, N, C) -> (B, I, N)."""
    if relation.normalize == "cosine":
        features = F.normalize(features, dim=-1)
    gram = features[:, rows] @ features.mT
    return F.normalize(gram, dim=-1) if relation.normalize == "row" else gram


def mean_distance(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Return the mean of rho(student - teacher), a scalar."""
    if relation.distance == "l1":
        return F.l1_loss(student, teacher)
    if relation.distance == "l2":
        return F.mse_loss(student, teacher)
    return F.huber_loss(student, teacher, delta=relation.delta)


def strip_loss(student: Tensor, teacher: Tensor, rows: slice, relation: Relation) -> Tensor:
    """Return the mean over the pairs in the rows I: (B, N, C_s), (B, N, C_t) -> scalar."""
    return mean_distance(
        relation_rows(student, rows, relation), relation_rows(teacher, rows, relation).detach(), relation
    )


def strips(student: Tensor) -> Iterator[tuple[slice, float]]:
    """Yield strips of rows, each with its share of all rows."""
    batch, pixels, _ = student.shape
    size = max(MIN_ROWS, min(pixels, STRIP_ELEMENTS[student.device.type] // (batch * pixels)))
    for start in range(0, pixels, size):
        stop = min(start + size, pixels)
        yield slice(start, stop), (stop - start) / pixels


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
