"""The losses of the recipes in docs/recipes, as the public code of each method computes them.

Each function is written from the formula in that code, materialises what it materialises, and takes the features of
student and teacher. The tests hold srpkd to these functions in float64, and ``python -m bench recipes`` measures them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """DINOv3's ``GramLoss`` with its default options: tokens (B, N, C_s), (B, N, C_t)."""
    similarities = []
    for tokens in (student, teacher):
        tokens = F.normalize(tokens, dim=-1)
        similarity = tokens @ tokens.transpose(-1, -2)
        similarity[similarity < 0] = 0
        similarities.append(similarity)
    return F.mse_loss(similarities[0], similarities[1])


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """SP of RepDistiller, Tung and Mori's loss: features (B, ...), one matrix B x B."""
    matrices = []
    for features in (student, teacher):
        flat = features.flatten(1)
        matrices.append(F.normalize(flat @ flat.T))
    return (matrices[1] - matrices[0]).square().sum() / len(student) ** 2


def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    """The pair-wise loss of structured knowledge distillation, after its pooling: maps (B, C, H, W)."""
    similarities = []
    for features in (student, teacher):
        norm = features.square().sum(1, keepdim=True).sqrt() + 1e-8
        features = (features / norm.detach()).flatten(2)
        similarities.append(torch.einsum("icm,icn->imn", features, features))
    pixels = student.shape[-1] * student.shape[-2]
    return ((similarities[1] - similarities[0]) ** 2 / pixels**2 / len(student)).sum()


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    """The cosine matrices of all pixels and their mean squared difference: maps (B, C, H, W)."""
    similarities = []
    for features in (student, teacher):
        features = F.normalize(features.flatten(2), dim=1)
        similarities.append(features.transpose(1, 2) @ features)
    return F.mse_loss(similarities[0], similarities[1])


def spatial_affinity(student: Tensor, teacher: Tensor) -> Tensor:
    """The spatial affinity (SA) of FAKD at one layer: maps (B, C, H, W)."""
    affinities = []
    for features in (student, teacher):
        features = features.flatten(2)
        features = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-7)
        affinities.append(features.transpose(1, 2).bmm(features))
    return F.l1_loss(affinities[0], affinities[1])


def neuron_selectivity_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """NST of RepDistiller with a polynomial kernel: maps (B, C_s, H, W), (B, C_t, H, W)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)

    student, teacher = (F.normalize(features.flatten(2), dim=2) for features in (student, teacher))
    return (
        kernel(teacher, teacher).mean().detach() + kernel(student, student).mean() - 2 * kernel(student, teacher).mean()
    )
