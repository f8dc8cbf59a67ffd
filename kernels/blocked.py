"""Backend ``blocked``: the one-pass algorithm in PyTorch, a strip of rows at a time. Any device, O(strip * N) memory.

K is symmetric, so a strip with rows I needs only the columns from I on: the part right of its diagonal block also
stands for the mirrored part below the diagonal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import formulas
from .formulas import Pixels, Relation, Scales, TileSums, accumulator, distance_value
from .strips import Alphas, gradient_terms, relate, strip_elements, strip_rows

LEAST_ROWS = 64  # of a strip of several images on a CPU: products with few rows are slow, see bench/NOTES.md


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,), and with ``need_grad`` its gradient (B, N, C_s)."""
    at_once = images_at_once(student, teacher)
    return formulas.loss_and_gradient(relation_tiles, student, teacher, relation, need_grad, images_at_once=at_once)


def images_at_once(student: Tensor, teacher: Tensor) -> int | None:
    """Return how many images to compute together: on a CPU, as many as fit into a strip; else None, all."""
    if student.device.type != "cpu":
        return None
    return max(1, strip_elements(student.device) // (LEAST_ROWS * student.shape[1]))


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``TileSums``."""
    batch, pixels, _ = student.shape
    dtype = accumulator(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    alphas = Alphas(scales.student, scales.teacher)
    loss = zero_losses(student, batch)
    U = torch.zeros_like(student) if need_grad else None
    h = student.new_zeros(batch, pixels) if need_grad and relation.differentiates_norms else None

    rows = strip_rows(batch, pixels, student.device)
    for start in range(0, pixels, rows):
        own = min(rows, pixels - start)  # columns of the diagonal block
        block, columns, rest = slice(start, start + own), slice(start, None), slice(start + own, None)
        gram_s = student[:, block] @ student[:, columns].mT
        gram_t = teacher[:, block] @ teacher[:, columns].mT
        strip = relate(gram_s, gram_t, alphas.at(block), alphas.at(columns), relation, on_diagonal=True)
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


def sampled_loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, columns: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,) over the sampled pairs, and its gradient (B, N, C_s).

    ``columns`` are those of ``sampling.draw_columns``, (B, S, m).
    """
    tiles, pairs = functools.partial(sampled_tiles, columns=columns), 2 * student.shape[1] * columns.shape[2]
    return formulas.loss_and_gradient(tiles, student, teacher, relation, need_grad, pairs=pairs)


def sampled_tiles(
    student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool, columns: Tensor
) -> TileSums:
    """Return ``TileSums`` over the sampled pairs, each as (i, j) and as (j, i)."""
    batch, pixels, _ = student.shape
    sets, per_set = columns.shape[1:]
    dtype, device = accumulator(student.dtype), student.device
    student, teacher = student.to(dtype).flatten(0, 1), teacher.to(dtype).flatten(0, 1)  # (B N, C)
    alphas = Alphas(*(None if alpha is None else alpha.flatten() for alpha in scales[:2]))
    loss = zero_losses(student, batch)
    U = torch.zeros_like(student) if need_grad else None
    h = student.new_zeros(batch * pixels) if need_grad and relation.differentiates_norms else None

    first = torch.arange(0, batch * pixels, pixels, device=device).view(-1, 1, 1)  # pixel of each image
    for start, rows, sets_with_rows in ((0, pixels // sets, sets), (pixels // sets * sets, 1, pixels % sets)):
        size = max(1, strip_elements(device) // (batch * rows * per_set))
        for chunk in disjoint_sets(sets_with_rows, pixels // per_set, size):
            of_sets = torch.arange(chunk.start, chunk.stop, device=device).unsqueeze(1)
            i = (first + start + of_sets + torch.arange(0, rows * sets, sets, device=device)).flatten(0, 1)
            j = (first + columns[:, chunk]).flatten(0, 1)
            q_i, q_j = student[i], student[j]  # (sets, rows, C_s), (sets, m, C_s)
            gram_s, gram_t = q_i @ q_j.mT, teacher[i] @ teacher[j].mT
            if relation.normalize == "cosine":  # a pixel's relation to itself: a tie, kept exact; NaN stays
                for gram in (gram_s, gram_t):
                    gram.mul_(i.unsqueeze(2) != j.unsqueeze(1))
            strip = relate(gram_s, gram_t, alphas.at(i), alphas.at(j), relation, on_diagonal=False)
            value = distance_value(strip.difference, relation)
            mirrored = strip.mirrored_difference
            value += value if mirrored is None else distance_value(mirrored, relation)
            loss += value.view(batch, -1).sum(1)
            if U is None:
                continue
            terms = gradient_terms(strip, alphas.at(i).student, alphas.at(j).student, relation)
            if h is not None and terms.h is not None and terms.mirrored_h is not None:
                h[i] += terms.h.sum(2)
                h[j] += terms.mirrored_h.sum(1)
            U[i] += terms.K @ q_j
            U[j] += terms.K.mT @ q_i
    shape = batch, pixels, -1
    return TileSums(loss.to(dtype), None if U is None else U.view(shape), None if h is None else h.view(batch, pixels))


def remote_tiles(rows: Pixels, columns: Pixels, relation: Relation, need_grad: bool) -> TileSums:
    """Return ``TileSums`` of the rows (1, N, C) over the columns (1, N', C) of another rank.

    The loss is in float64 on a CPU, since it is one of several.
    """
    dtype, device = accumulator(rows.student.dtype), rows.student.device
    student, teacher = columns.student.to(dtype), columns.teacher.to(dtype)
    row_alphas, column_alphas = Alphas(rows.alpha_s, rows.alpha_t), Alphas(columns.alpha_s, columns.alpha_t)
    loss = zero_losses(student, 1)
    U, h = [], []
    size = strip_rows(1, max(rows.student.shape[1], student.shape[1]), device)
    for start in range(0, rows.student.shape[1], size):
        block = slice(start, start + size)
        gram_s = rows.student[:, block].to(dtype) @ student.mT
        gram_t = rows.teacher[:, block].to(dtype) @ teacher.mT
        strip = relate(gram_s, gram_t, row_alphas.at(block), column_alphas, relation, on_diagonal=False)
        loss += distance_value(strip.difference, relation).sum((1, 2))
        if not need_grad:
            continue
        terms = gradient_terms(strip, row_alphas.at(block).student, column_alphas.student, relation)
        U.append(terms.K @ student)
        if terms.h is not None:
            h.append(terms.h.sum(2))
    return TileSums(loss, torch.cat(U, 1) if U else None, torch.cat(h, 1) if h else None)


def zero_losses(features: Tensor, images: int) -> Tensor:
    """Return zeros (B,) to which the losses of strips are added: in float64 on a CPU, else in the features' dtype."""
    return features.new_zeros(images, dtype=torch.float64 if features.device.type == "cpu" else None)


def disjoint_sets(sets: int, disjoint: int, size: int) -> Iterator[slice]:
    """Yield all sets in slices of up to ``size``, within groups of ``disjoint`` sets: no column is there twice."""
    for group in range(0, sets, disjoint):
        end = min(group + disjoint, sets)
        for start in range(group, end, size):
            yield slice(start, min(start + size, end))


def unavailable_reason(device: torch.device) -> str | None:
    """Return None: this backend runs on every device."""
    return None
