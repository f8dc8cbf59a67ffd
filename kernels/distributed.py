"""Relations between the pixels of all ranks of a process group: the same formulas, with sums taken over the group.

A rank owns the rows of its own pixels. For l2 without rectify, the ranks exchange only C x C matrices, whose size does
not depend on N. Otherwise, and where there are few pixels, the features travel around the ring of ranks, one rank's
pixels at a time: a rank sends and receives each of them once and holds two at a time beside its own. With ``"row"``
they do so once more for the row norms and once more for the gradient, or the ranks exchange C x C matrices where these
are smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import closed_form, dispatch, formulas
from .formulas import Pixels, Ranks, Relation, Scales, TileSums
from .op import differentiable_loss

Result = TypeVar("Result")
# From this number of pixels per channel (C_s + C_t) on, the matrices of closed_form are no larger than the features.
# Not the measured rule of ``auto`` in one process: it must be the same on all ranks, whatever their processors.
CLOSED_FORM_FROM = 4


def backend_choices(relation: Relation, device: torch.device) -> tuple[str, ...]:
    """Return the backends that can be named."""
    closed = ("closed_form",) if _has_closed_form(relation) else ()
    return ("auto", *closed, *dispatch.partial_backends(device))


def check_backend(backend: str, relation: Relation, device: torch.device) -> None:
    """Raise a ValueError or BackendUnavailable if this rank cannot take part with the named backend."""
    dispatch.check_choice(
        f"with scope='global', several ranks, distance={relation.distance!r} and rectify={relation.rectify}, backend",
        backend,
        backend_choices(relation, device),
    )
    if backend != "closed_form":
        dispatch.partial_backend(backend, device)


@torch.compiler.disable
def check_on_ranks(group: dist.ProcessGroup | None, check: Callable[..., Result], *arguments: object) -> Result:
    """Return ``check(*arguments)``. If it raises, the other ranks raise the error in their ``relation_loss``.

    They would wait forever otherwise. Without an error nothing is exchanged.
    """
    try:
        return check(*arguments)
    except (TypeError, ValueError, dispatch.BackendUnavailable) as error:
        _exchange(0, error, group)
        raise


def _exchange(pixels: int, mine: object, group: dist.ProcessGroup | None) -> tuple[list[int], list[Any]]:
    """Return every rank's pixels, and every rank's ``mine`` if they are not all the same settings, else an empty list.

    Each rank calls it once for each loss, with its settings or with an error. Objects are slow to exchange, so ranks
    compare a hash first.
    """
    digest = -1  # an error
    if not isinstance(mine, Exception):
        digest = int.from_bytes(hashlib.blake2b(repr(mine).encode(), digest_size=7).digest())
    numbers = torch.tensor([pixels, digest], device=_device_of_collectives(group))
    of_ranks = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, numbers, group)
    counts, digests = torch.stack(of_ranks).T.tolist()
    if set(digests) == {digest} != {-1}:
        return counts, []
    everyone: list[Any] = [None] * len(counts)
    dist.all_gather_object(everyone, mine, group)
    return counts, everyone


def _device_of_collectives(group: dist.ProcessGroup | None) -> str:
    """Return a device of which the group can exchange tensors, the CPU if possible: NCCL has none for the CPU."""
    devices = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]


def _has_closed_form(relation: Relation) -> bool:
    return relation.distance in closed_form.DISTANCES and not relation.rectify


@torch.compiler.disable  # collectives whose sizes depend on the ranks cannot be traced
def relation_loss(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the mean of rho(D_ij) over all pairs of pixels of all ranks: (1,), the same on every rank.

    The gradient is that of the sum of the ranks' losses, as for the collectives of ``torch.distributed.nn``:
    DistributedDataParallel, which averages over the ranks, then gives parameters the gradient of this loss.

    Args:
        student: this rank's features (1, N_r, C_s). N_r may differ from rank to rank, C_s and dtype may not.
        teacher: (1, N_r, C_t), without a gradient.
        group: the process group; the default group if None.
        backend: a name that ``check_backend`` accepts.

    Raises:
        ValueError: on every rank, if the ranks differ in channels, dtype, device or options.
        TypeError, ValueError, BackendUnavailable: the error of another rank's ``check_on_ranks``.
    """
    need_grad = student.requires_grad and torch.is_grad_enabled()

    def compute() -> tuple[Tensor, Tensor | None]:
        """Return the loss, and with ``need_grad`` its gradient (1, N_r, C_s) for this rank's features."""
        counts = pixels_of_ranks(student, teacher, relation, need_grad, backend, group)
        pixels, dtype = sum(counts), formulas.accumulator(student.dtype)
        ranks = Ranks(partial(sum_over_ranks, group=group), partial(around_the_ring, counts, group), pixels)
        enough = pixels >= CLOSED_FORM_FROM * (student.shape[2] + teacher.shape[2])
        if backend == "closed_form" or (backend == "auto" and enough and _has_closed_form(relation)):
            scales = formulas.scales_of(student, teacher, relation, closed_form.SCALE_DTYPE, ranks)
            tiles = closed_form.tiles_over(ranks.total, student, teacher, scales, relation, need_grad)
        else:
            scales = formulas.scales_of(student, teacher, relation, dtype, ranks)
            tiles = ring_tiles(student, teacher, scales, relation, need_grad, ranks, backend)
        loss = (tiles.loss / pixels**2).to(dtype)
        return loss, formulas.gradient_of(student, tiles, scales, relation, ranks) if need_grad else None

    with formulas.without_autocast(student.device):
        return differentiable_loss(student, compute, dist.get_world_size(group)) if need_grad else compute()[0]


def pixels_of_ranks(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    need_grad: bool,
    backend: str,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """Return the number of pixels of each rank.

    Raises:
        ValueError: on all ranks, if they differ in anything else. Their collectives would not match, or would sum
            parts of different losses.
        TypeError, ValueError, BackendUnavailable: the error of another rank's ``check_on_ranks``.
    """
    mine = {
        "C_s": student.shape[2],
        "C_t": teacher.shape[2],
        "dtype": student.dtype,
        "device": student.device.type,
        **asdict(relation),
        "student.requires_grad": need_grad,
    }
    if _has_closed_form(relation):  # with other backends, each rank may have its own
        mine["backend"] = backend
    counts, settings = _exchange(student.shape[1], mine, group)
    for rank, theirs in enumerate(settings):
        if isinstance(theirs, Exception):
            raise type(theirs)(f"on rank {rank}: {theirs}")
    # backend is missing where the relation, which then differs too, has no closed form
    comparable = [name for name in mine if all(name in theirs for theirs in settings)]
    different = [name for name in comparable if any(theirs[name] != mine[name] for theirs in settings)]
    if different:
        received = (", ".join(f"{name}={theirs[name]!r}" for name in different) for theirs in settings)
        raise ValueError(
            "scope='global' expects features of the same channels, dtype and device type, and the same options, on "
            "every rank; "
            f"received {'; '.join(f'on rank {rank} {text}' for rank, text in enumerate(received))}"
        )
    return counts


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's part."""
    part = part.contiguous()
    dist.all_reduce(part, group=group)
    return part


def ring_tiles(
    student: Tensor,
    teacher: Tensor,
    scales: Scales,
    relation: Relation,
    need_grad: bool,
    ranks: Ranks,
    backend: str,
) -> TileSums:
    """Return ``TileSums`` of this rank's rows and every rank's columns; the loss is that of all rows."""
    module = dispatch.backend_module(dispatch.partial_backend(backend, student.device))
    own = Pixels(student, teacher, scales.student, scales.teacher)
    ring = ranks.each(*(x for x in own if x is not None))
    next(ring)  # the own pixels, while the first remote ones are received
    loss, U, h = module.relation_tiles(student, teacher, scales, relation, need_grad)
    for student_columns, teacher_columns, *alphas in ring:
        columns = Pixels(student_columns, teacher_columns, *(alphas or (None, None)))
        part = module.remote_tiles(own, columns, relation, need_grad)
        loss = loss + part.loss
        if U is not None:
            U += part.U
        if h is not None:
            h += part.h
    return TileSums(ranks.total(loss), U, h)


def around_the_ring(counts: list[int], group: dist.ProcessGroup | None, *own: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield every rank's tensors (1, N_r, ...), this rank's first; the next are received while the caller computes.

    ``counts`` are the pixels N_r of the ranks.
    """
    ranks, rank = len(counts), dist.get_rank(group)
    following, preceding = ((rank + step) % ranks for step in (1, -1))
    if group is not None:
        following, preceding = (dist.get_global_rank(group, peer) for peer in (following, preceding))
    tensors = own
    for step in range(1, ranks + 1):
        if step == ranks:
            yield tensors
            return
        sent = [x.contiguous() for x in tensors]
        received = [x.new_empty((1, counts[rank - step], *x.shape[2:])) for x in sent]
        transfers = [dist.P2POp(dist.isend, x, following, group) for x in sent]
        transfers += [dist.P2POp(dist.irecv, x, preceding, group) for x in received]
        # `sent` and `tensors` must stay alive until the transfers are done: contiguous tensors are sent in place
        pending = dist.batch_isend_irecv(transfers)
        yield tensors
        for transfer in pending:
            transfer.wait()
        tensors = tuple(received)
