"""Relations between the pixels of all ranks of a process group: the same formulas, with sums taken over the group.

A rank owns the rows of its own pixels. For l2 the ranks exchange only C x C matrices, whose size does not depend on N.
For l1 and huber the features travel around the ring of ranks, one rank's pixels at a time: a rank sends and receives
each of them once and holds two at a time beside its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import closed_form, formulas
from .formulas import Relation, Scales, TileSums, distance_value
from .op import relation_loss_backward_op
from .strips import Alphas, gradient_terms, relate, strip_rows


def backend_choices(relation: Relation) -> tuple[str, str]:
    """Return the backends that can be named for a relation. The computation is that of the second one."""
    return "auto", "closed_form" if _has_closed_form(relation) else "blocked"


def _has_closed_form(relation: Relation) -> bool:
    return relation.distance in closed_form.DISTANCES and not relation.rectify


class Pixels(NamedTuple):
    """The pixels of one rank: features (1, N_r, C_s), (1, N_r, C_t), and alpha (1, N_r) of both, None for "none"."""

    student: Tensor
    teacher: Tensor
    alpha_s: Tensor | None
    alpha_t: Tensor | None

    @property
    def alphas(self) -> Alphas:
        return Alphas(self.alpha_s, self.alpha_t)


@torch.compiler.disable  # collectives whose sizes depend on the ranks cannot be traced
def relation_loss(
    student: Tensor, teacher: Tensor, relation: Relation, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the mean of rho(D_ij) over all pairs of pixels of all ranks: (1,), the same on every rank.

    The gradient is that of the sum of the ranks' losses, as for the collectives of ``torch.distributed.nn``:
    DistributedDataParallel, which averages over the ranks, then gives parameters the gradient of this loss.

    Args:
        student: this rank's features (1, N_r, C_s). N_r may differ from rank to rank, C_s and dtype may not.
        teacher: (1, N_r, C_t), without a gradient.
        group: the process group; the default group if None.

    Raises:
        ValueError: on every rank, if the ranks' channels or dtypes differ.
    """
    need_grad = student.requires_grad and torch.is_grad_enabled()
    return _RelationLoss.apply(student, teacher, relation, group, need_grad)


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, relation, group, need_grad):
        with torch.autocast(student.device.type, enabled=False):
            loss, gradient = ring_loss_and_gradient(student, teacher, relation, group, need_grad)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.ranks = student.dtype, dist.get_world_size(group)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return relation_loss_backward_op(gradient, ctx.ranks * grad_loss, ctx.dtype), None, None, None, None


def ring_loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, group: dist.ProcessGroup | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss (1,), and with ``need_grad`` its gradient (1, N_r, C_s) for this rank's features."""
    counts = pixels_of_ranks(student, teacher, group)
    pixels, total = sum(counts), partial(sum_over_ranks, group=group)
    dtype = formulas.accumulator(student.dtype)
    if _has_closed_form(relation):
        scales = formulas.scales_of(student, teacher, relation, closed_form.SCALE_DTYPE, total, pixels)
        tiles = closed_form.tiles_over(total, student, teacher, scales, relation, need_grad)
    else:
        scales = formulas.scales_of(student, teacher, relation, dtype, total, pixels)
        own = Pixels(student, teacher, scales.student, scales.teacher)
        tiles = ring_tiles(own, scales, relation, need_grad, counts, group)
    loss = (tiles.loss / pixels**2).to(dtype)
    return loss, formulas.gradient_of(student, tiles, scales, relation, total, pixels) if need_grad else None


def pixels_of_ranks(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Return the number of pixels of each rank; raise on all ranks if their channels or dtypes differ."""
    mine = (student.shape[1], student.shape[2], teacher.shape[2], str(student.dtype))
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    if len({features[1:] for features in everyone}) > 1:
        raise ValueError(
            "scope='global' expects features of the same channels and dtype on every rank; received (C_s, C_t, dtype) "
            + ", ".join(str(features[1:]) for features in everyone)
        )
    return [features[0] for features in everyone]


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's part."""
    part = part.contiguous()
    dist.all_reduce(part, group=group)
    return part


def ring_tiles(
    own: Pixels, scales: Scales, relation: Relation, need_grad: bool, counts: list[int], group: dist.ProcessGroup | None
) -> TileSums:
    """Return ``TileSums`` of this rank's rows and every rank's columns; the loss is that of all rows."""
    dtype = formulas.accumulator(own.student.dtype)
    loss = own.student.new_zeros(1, dtype=torch.float64 if own.student.device.type != "mps" else dtype)
    U = torch.zeros_like(own.student, dtype=dtype) if need_grad else None
    h = (
        own.student.new_zeros(own.student.shape[:2], dtype=dtype)
        if need_grad and relation.differentiates_norms
        else None
    )
    tiles = TileSums(loss, U, h)
    for columns in around_the_ring(own, counts, group):
        add_columns(tiles, own, columns, relation)
    return TileSums(sum_over_ranks(loss, group), U, h)


def around_the_ring(own: Pixels, counts: list[int], group: dist.ProcessGroup | None) -> Iterator[Pixels]:
    """Yield every rank's pixels, this rank's first; the next ones are received while the caller computes."""
    ranks, rank = len(counts), dist.get_rank(group)
    following, preceding = ((rank + step) % ranks for step in (1, -1))
    if group is not None:
        following, preceding = (dist.get_global_rank(group, peer) for peer in (following, preceding))
    pixels = own
    for step in range(1, ranks + 1):
        if step == ranks:
            yield pixels
            return
        sent = [x.contiguous() for x in pixels if x is not None]
        received = [x.new_empty((1, counts[rank - step], *x.shape[2:])) for x in sent]
        transfers = [dist.P2POp(dist.isend, x, following, group) for x in sent]
        transfers += [dist.P2POp(dist.irecv, x, preceding, group) for x in received]
        # `sent` and `pixels` must stay alive until the transfers are done: contiguous tensors are sent in place
        pending = dist.batch_isend_irecv(transfers)
        yield pixels
        for transfer in pending:
            transfer.wait()
        student, teacher, *alphas = received
        pixels = Pixels(student, teacher, *(alphas or (None, None)))


def add_columns(tiles: TileSums, rows: Pixels, columns: Pixels, relation: Relation) -> None:
    """Add the columns' part to the rows' loss (1,), U (1, N_r, C_s) and h (1, N_r), a strip of rows at a time."""
    dtype = formulas.accumulator(rows.student.dtype)
    student, teacher = columns.student.to(dtype), columns.teacher.to(dtype)
    count = rows.student.shape[1]
    size = strip_rows(1, max(count, student.shape[1]), student.device)
    for start in range(0, count, size):
        block = slice(start, min(count, start + size))
        gram_s = rows.student[:, block].to(dtype) @ student.mT
        gram_t = rows.teacher[:, block].to(dtype) @ teacher.mT
        alphas = rows.alphas.at(block)
        strip = relate(gram_s, gram_t, alphas, columns.alphas, relation, diagonal=start if columns is rows else None)
        tiles.loss.add_(distance_value(strip.difference, relation).sum())
        if tiles.U is None:
            continue
        terms = gradient_terms(strip, alphas.student, columns.alpha_s, relation)
        if tiles.h is not None and terms.h is not None:
            tiles.h[:, block] += terms.h.sum(2)
        tiles.U[:, block] += terms.K @ student
