"""The providers that are measured side by side: every backend of srpkd's registry, and the peers.

A provider is a name, a reason why it cannot run a case, and a function that makes (student, teacher) -> loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from srpkd import relation_loss
from srpkd.kernels import BACKENDS, unavailable_reason
from srpkd.kernels.dispatch import backend_module

from . import peers
from .cases import Case, features

Loss = Callable[[Tensor, Tensor], Tensor]


class CannotRun(RuntimeError):
    """A provider found out, when it was run, that it has nothing to offer for this case; says why."""


class Provider(NamedTuple):
    """One way to compute the relation loss.

    Attributes:
        make: case -> (student, teacher) -> scalar loss.
        unavailable_reason: case -> why it cannot run there, None where it can.
        compiles: whether its first call compiles, for seconds, and for this shape alone.
        matrices: case -> how many N x N arrays of the features' dtype it holds at once at the least, as measured.
    """

    make: Callable[[Case], Loss]
    unavailable_reason: Callable[[Case], str | None] = lambda case: None
    compiles: bool = False
    matrices: Callable[[Case], int] = lambda case: 0

    def bytes_needed(self, case: Case) -> int:
        """The memory that it needs at the least, beside the inputs."""
        return self.matrices(case) * case.matrix_bytes


def _backend(name: str) -> Provider:
    def reason(case: Case) -> str | None:
        if (missing := unavailable_reason(name, torch.device(case.device))) is not None:
            return missing
        module = backend_module(name)
        if case.distance not in getattr(module, "DISTANCES", (case.distance,)):
            return f"it computes distance in {module.DISTANCES} only"
        if case.torch_dtype not in getattr(module, "DTYPES", (case.torch_dtype,)):
            return f"it does not compute in {case.dtype}"
        return None

    def make(case: Case) -> Loss:
        relation = case.relation
        return partial(
            relation_loss,
            normalize=relation.normalize,
            distance=relation.distance,
            delta=relation.delta,
            layout="nlc",
            backend=name,
        )

    if name == "reference":
        return Provider(make, reason, matrices=lambda case: 5 if case.need_grad else 3)
    return Provider(make, reason)


def _peer(function: Callable[..., Tensor], case: Case) -> Loss:
    return partial(function, relation=case.relation)


def _compiled(case: Case) -> Loss:
    return torch.compile(_peer(peers.eager, case), dynamic=False, fullgraph=True)


def _chunker_missing(case: Case) -> str | None:
    from torch._inductor import config

    if not hasattr(config, "auto_chunker"):
        return f"torch {torch.__version__} has no auto chunker"
    return None if case.need_grad else "it chunks joint graphs, of forward and backward, alone"


def _auto_chunked(case: Case) -> Loss:
    """torch.compile with inductor's auto chunker; raises where that finds nothing, lest compile be timed twice."""
    from torch._inductor import config, inductor_prims  # noqa: F401 (the chunker uses its operators and does not import it)
    from torch._inductor.fx_passes import auto_chunker

    def eager(student: Tensor, teacher: Tensor) -> Tensor:  # a function of its own: compile's graph is not taken for it
        return peers.eager(student, teacher, case.relation)

    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    chunked = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if chunked:
            return compiled(student, teacher)
        original = auto_chunker.chunk

        def watched(graph):
            try:
                graph = original(graph)
            except auto_chunker.CantChunk as error:
                chunked.append(f"it finds nothing to chunk: {error}")
                raise CannotRun(chunked[0]) from error  # lest it be run with the whole matrices, which may not fit
            chunked.append(None)
            return graph

        auto_chunker.chunk = watched
        try:
            # a graph from the cache would not pass through the chunker
            with config.patch({"auto_chunker.enable": True, "force_disable_caches": True}):
                result = compiled(student, teacher)
        except Exception:
            if chunked and chunked[0]:  # whatever the compiler made of the error
                raise CannotRun(chunked[0]) from None
            raise
        finally:
            auto_chunker.chunk = original
        if not chunked:
            raise CannotRun("it was not asked")
        return result

    return loss


def _keops_missing(case: Case) -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed: pip install pykeops"
    return "KeOps does not compute in bfloat16" if case.dtype == "bfloat16" else None


def _keops(case: Case) -> Loss:
    loss = _peer(peers.keops, case)
    tiny = replace(case, pixels=2, batch=1)
    evaluate(loss, *features(tiny), tiny)  # its formulas are compiled now, for any number of pixels
    return loss


def _eager_matrices(case: Case) -> int:
    return 6 if case.need_grad and case.normalize == "row" else 3


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(partial(_peer, peers.eager), matrices=_eager_matrices),
    "compile": Provider(_compiled, compiles=True, matrices=lambda case: 2),
    "auto_chunker": Provider(_auto_chunked, _chunker_missing, compiles=True),
    "chunked": Provider(partial(_peer, peers.chunked)),
    "keops": Provider(_keops, _keops_missing),
    **{name: _backend(name) for name in BACKENDS},
}
OURS = tuple(name for name in BACKENDS if name != "reference")


def evaluate(loss: Loss, student: Tensor, teacher: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient for the student's features if the case asks for it: what is timed.

    A float16 gradient is ``case.loss_scale`` times as large.
    """
    if not case.need_grad:
        with torch.no_grad():
            return loss(student, teacher), None
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    upstream = torch.full_like(value, case.loss_scale)
    return value.detach(), torch.autograd.grad(value, student, upstream)[0]
