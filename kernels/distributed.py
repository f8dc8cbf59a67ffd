"""Relations between the pixels of all ranks of a process group: the same algebra, with sums taken over the group.

A rank owns the rows of its own pixels. For l2 all that it needs of the others are C x C matrices, whose bytes do not
depend on N. For l1 and huber the features travel around the ring of ranks, one rank's share at a time: a rank sends
and receives all of them once, holds two shares beside its own, and meets every column.
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
from .blocked import block_rows, scaled
from .formulas import Relation, Scales, TileSums, distance_grad, distance_value
from .op import relation_loss_backward_op

# What each distance is computed like, by the backends' names; "auto" is that, too.
BACKENDS = {"l1": ("auto", "blocked"), "l2": ("auto", "closed_form"), "huber": ("auto", "blocked")}


class Share(NamedTuple):
    """One rank's pixels: features (1, N_r, C_s), (1, N_r, C_t), and alpha (1, N_r), None where it is 1."""

    student: Tensor
    teacher: Tensor
    alpha_s: Tensor | None
    alpha_t: Tensor | None


@torch.compiler.disable  # torch.compile goes on around it: collectives with sizes of the ranks' own
def relation_loss(
    student: Tensor, teacher: Tensor, relation: Relation, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The mean of rho(D_ij) over all pairs of pixels of all ranks: (1,), the same on every rank.

    Args:
        student: this rank's features (1, N_r, C_s). N_r may differ from rank to rank, C_s and dtype may not.
        teacher: (1, N_r, C_t), without a gradient.
        group: the process group; the default one if None.

    Its gradient is that of the ranks' losses summed, as that of ``torch.distributed.nn``'s collectives is: where
    DistributedDataParallel then averages over the ranks, parameters get the gradient of this loss.

    Raises:
        ValueError: on every rank, where the ranks' channels or dtypes differ.
    """
    need_grad = student.requires_grad and torch.is_grad_enabled()
    return _RelationLoss.apply(student, teacher, relation, group, need_grad)


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, relation, group, need_grad):
        with torch.autocast(student.device.type, enabled=False):
            loss, gradient = value_and_gradient(student, teacher, relation, group, need_grad)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.ranks = student.dtype, dist.get_world_size(group)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return relation_loss_backward_op(gradient, ctx.ranks * grad_loss, ctx.dtype), None, None, None, None


def value_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, group: dist.ProcessGroup | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss (1,), and its gradient (1, N_r, C_s) with respect to this rank's features if asked for."""
    shares = pixels_of_ranks(student, teacher, group)
    pixels, total = sum(shares), partial(sum_over_ranks, group=group)
    dtype = formulas.accumulator(student.dtype)
    if relation.distance == "l2":
        scales = formulas.scales_of(student, teacher, relation, closed_form.SCALE_DTYPE, total, pixels)
        tiles = closed_form.tiles_over(total, student, teacher, scales, relation, need_grad)
    else:
        scales = formulas.scales_of(student, teacher, relation, dtype, total, pixels)
        tiles = ring_tiles(Share(student, teacher, *scales[:2]), scales, relation, need_grad, shares, group)
    loss = (tiles.loss / pixels**2).to(dtype)
    return loss, formulas.gradient_of(student, tiles, scales, relation, total, pixels) if need_grad else None


def pixels_of_ranks(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """How many pixels each rank has; raises on all ranks if their features do not fit together."""
    mine = (student.shape[1], student.shape[2], teacher.shape[2], str(student.dtype))
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    if len({features[1:] for features in everyone}) > 1:
        raise ValueError(
            "scope='global' needs features of the same channels and dtype on every rank; the ranks have (C_s, C_t, "
            f"dtype) {', '.join(str(features[1:]) for features in everyone)}"
        )
    return [features[0] for features in everyone]


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's part."""
    part = part.contiguous()
    dist.all_reduce(part, group=group)
    return part


def ring_tiles(
    own: Share, scales: Scales, relation: Relation, need_grad: bool, shares: list[int], group: dist.ProcessGroup | None
) -> TileSums:
    """``Tiles`` of this rank's rows and every rank's columns; the loss is that of all rows."""
    dtype = formulas.accumulator(own.student.dtype)
    loss = own.student.new_zeros(1, dtype=torch.float64 if own.student.device.type != "mps" else dtype)
    U = torch.zeros_like(own.student, dtype=dtype) if need_grad else None
    h = own.student.new_zeros(own.student.shape[:2], dtype=dtype) if need_grad and scales.student is not None else None
    tiles = TileSums(loss, U, h)
    for columns in around_the_ring(own, shares, group):
        add_columns(tiles, own, columns, relation)
    return TileSums(sum_over_ranks(loss, group), U, h)


def around_the_ring(own: Share, shares: list[int], group: dist.ProcessGroup | None) -> Iterator[Share]:
    """Every rank's share, this one's first; while one is worked on, the next is on its way."""
    ranks, rank = len(shares), dist.get_rank(group)
    following, preceding = ((rank + step) % ranks for step in (1, -1))
    if group is not None:
        following, preceding = (dist.get_global_rank(group, peer) for peer in (following, preceding))
    share = own
    for step in range(1, ranks + 1):
        if step == ranks:
            yield share
            return
        sent = [x.contiguous() for x in share if x is not None]
        coming = shares[rank - step]
        received = [x.new_empty((1, coming, *x.shape[2:])) for x in sent]
        transfers = [dist.P2POp(dist.isend, x, following, group) for x in sent]
        transfers += [dist.P2POp(dist.irecv, x, preceding, group) for x in received]
        # what lies in one piece is sent from where it is, the rest from `sent`: both stay until the transfers are done
        pending = dist.batch_isend_irecv(transfers)
        yield share
        for transfer in pending:
            transfer.wait()
        arrived = iter(received)
        share = Share(*(None if x is None else next(arrived) for x in share))


def add_columns(tiles: TileSums, rows: Share, columns: Share, relation: Relation) -> None:
    """Add the columns' part to the rows' loss (1,), U (1, N_r, C_s) and h (1, N_r), a strip of rows at a time."""
    dtype = formulas.accumulator(rows.student.dtype)
    student, teacher = columns.student.to(dtype), columns.teacher.to(dtype)
    count = rows.student.shape[1]
    strip = block_rows(1, max(count, student.shape[1]), student.device)
    for start in range(0, count, strip):
        block = slice(start, min(count, start + strip))
        gram_s = rows.student[:, block].to(dtype) @ student.mT
        gram_t = rows.teacher[:, block].to(dtype) @ teacher.mT
        if relation.normalize == "none":
            relations, difference = gram_s, gram_s - gram_t
        else:
            alpha_s, alpha_t = rows.alpha_s[:, block], rows.alpha_t[:, block]
            relations = scaled(gram_s, alpha_s, columns.alpha_s, relation)
            difference = relations - scaled(gram_t, alpha_t, columns.alpha_t, relation)
        if relation.normalize == "cosine" and columns is rows:
            difference.diagonal(start, 1, 2).mul_(0)  # a pixel's relation to itself: a tie, kept exact; NaN stays
        tiles.loss.add_(distance_value(difference, relation).sum())
        if tiles.U is None:
            continue
        slope = distance_grad(difference, relation)
        if tiles.h is not None:
            weight = 1 if relation.normalize == "row" else 2  # for cosine P_ji A_ji counts too, and is P_ij A_ij
            tiles.h[:, block].add_((relations * slope).sum(2), alpha=weight)
        if relation.normalize == "none":
            K = 2 * slope
        elif relation.normalize == "cosine":
            K = scaled(2 * slope, alpha_s, columns.alpha_s, relation)
        else:
            mirrored = gram_s * columns.alpha_s.unsqueeze(1) - gram_t * columns.alpha_t.unsqueeze(1)
            K = slope * alpha_s.unsqueeze(2) + distance_grad(mirrored, relation) * columns.alpha_s.unsqueeze(1)
        tiles.U[:, block] += K @ student
