"""A strip of rows of the relation matrices in PyTorch, as backend ``blocked`` and the ring of ranks compute it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import Relation, distance_grad

# On a CPU the elements should fit into the cache, on a GPU one launch should fill the device.
STRIP_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}


class Alphas(NamedTuple):
    """alpha (B, n) of the student's and the teacher's relation matrix at n pixels; None for ``normalize="none"``."""

    student: Tensor | None
    teacher: Tensor | None

    def at(self, pixels: slice | Tensor) -> Alphas:
        """Return the scales of these pixels: a slice of every image, or an index (B, n) of flat scales (B N,)."""
        at = (slice(None), pixels) if isinstance(pixels, slice) else pixels
        return Alphas(*(None if alpha is None else alpha[at] for alpha in self))


class Strip(NamedTuple):
    """A_ij and D_ij of rows i and columns j, (B, rows, columns) each.

    relations: the student's A_ij.
    difference: D_ij.
    mirrored_relations, mirrored_difference: A_ji and D_ji, None where A is symmetric.
    """

    relations: Tensor
    difference: Tensor
    mirrored_relations: Tensor | None
    mirrored_difference: Tensor | None


class GradientTerms(NamedTuple):
    """The elementwise part of the gradient of a strip, (B, rows, columns) each.

    K: K_ij = P_ij alpha_i beta_j + P_ji alpha_j beta_i.
    h: the summands of h of the rows, None unless ``Relation.differentiates_norms``.
    mirrored_h: the summands of h of the columns, None unless ``Relation.differentiates_norms``.
    """

    K: Tensor
    h: Tensor | None
    mirrored_h: Tensor | None


def strip_elements(device: torch.device) -> int:
    """Return how many elements of a strip's matrices are held at a time."""
    return STRIP_ELEMENTS.get(device.type, 2**22)


def strip_rows(batch: int, pixels: int, device: torch.device) -> int:
    """Return how many rows of (batch, rows, pixels) a strip has."""
    return max(16, min(pixels, strip_elements(device) // (batch * pixels)))


def relate(
    gram_s: Tensor,
    gram_t: Tensor,
    rows: Alphas,
    columns: Alphas,
    relation: Relation,
    on_diagonal: bool,
) -> Strip:
    """Return the relations of a strip and their differences. Overwrites the Gram matrices.

    Args:
        gram_s, gram_t: G_ij (B, rows, columns) of the student and of the teacher.
        rows, columns: the scales of the pixels i and of the pixels j.
        on_diagonal: whether the first rows and columns are the same pixels, so that the diagonal is i = j.
    """
    if relation.rectify:  # scales are not negative: A_ij has the sign of G_ij
        gram_s.relu_(), gram_t.relu_()
    relations = scaled(gram_s, rows.student, columns.student, relation)
    difference = relations - scaled(gram_t, rows.teacher, columns.teacher, relation)
    if relation.normalize == "cosine" and on_diagonal:
        difference.diagonal(0, 1, 2).mul_(0)  # a pixel's relation to itself: a tie, kept exact; NaN stays
    if relation.symmetric or columns.student is None or columns.teacher is None:
        return Strip(relations, difference, None, None)
    mirrored = gram_s.mul_(columns.student.unsqueeze(1))
    return Strip(relations, difference, mirrored, mirrored - gram_t.mul_(columns.teacher.unsqueeze(1)))


def gradient_terms(
    strip: Strip, alpha_rows: Tensor | None, alpha_columns: Tensor | None, relation: Relation
) -> GradientTerms:
    """Return the ``GradientTerms`` of a strip, whose relations are overwritten.

    Args:
        alpha_rows, alpha_columns: the student's scales (B, rows), (B, columns).
    """
    slope = relation_grad(strip.difference, strip.relations, relation)
    if alpha_rows is None or alpha_columns is None:
        return GradientTerms(2 * slope, None, None)
    if strip.mirrored_relations is None or strip.mirrored_difference is None:
        K = 2 * slope
        h = strip.relations.mul_(K) if relation.differentiates_norms else None
        return GradientTerms(K.mul_(alpha_rows.unsqueeze(2)).mul_(alpha_columns.unsqueeze(1)), h, h)
    mirrored_slope = relation_grad(strip.mirrored_difference, strip.mirrored_relations, relation)
    h = mirrored_h = None
    if relation.differentiates_norms:
        h, mirrored_h = strip.relations.mul_(slope), strip.mirrored_relations.mul_(mirrored_slope)
    K = slope.mul_(alpha_rows.unsqueeze(2)).addcmul_(mirrored_slope, alpha_columns.unsqueeze(1))
    return GradientTerms(K, h, mirrored_h)


def relation_grad(difference: Tensor, relations: Tensor, relation: Relation) -> Tensor:
    """Return P_ij, the derivative of rho(D_ij) with respect to the student's A_ij before it is rectified."""
    slope = distance_grad(difference, relation)
    return slope.masked_fill_(relations <= 0, 0) if relation.rectify else slope


def scaled(gram: Tensor, alpha_rows: Tensor | None, alpha_columns: Tensor | None, relation: Relation) -> Tensor:
    """Return A_ij of G_ij (B, rows, columns); ``gram`` itself for ``normalize="none"``."""
    if alpha_rows is None or alpha_columns is None:
        return gram
    relations = gram * alpha_rows.unsqueeze(2)
    return relations if relation.normalize == "row" else relations.mul_(alpha_columns.unsqueeze(1))
