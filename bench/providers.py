"""The implementations to compare: every backend in srpkd's registry, and the peers."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from srpkd.checking.cases import Case, features
from srpkd.checking.kernels import CUDA_KERNELS, KERNELS, CannotRun, Loss, Provider, evaluate
from srpkd.kernels import BACKENDS

from . import peers


def _peer(function: Callable[..., Tensor], case: Case) -> Loss:
    return partial(function, relation=case.relation)


def _compiled(case: Case) -> Loss:
    return torch.compile(_peer(peers.eager, case), dynamic=False, fullgraph=True)


def _chunker_missing(case: Case) -> str | None:
    from torch._inductor import config

    if not hasattr(config, "auto_chunker"):
        return f"torch {torch.__version__} has no auto chunker"
    return None if case.need_grad else "the auto chunker needs a joint graph of forward and backward"


def _auto_chunked(case: Case) -> Loss:
    """Compile with inductor's auto chunker; the loss raises CannotRun if there is nothing to chunk."""
    from torch._inductor import config, inductor_prims  # noqa: F401 (defines operators that the chunker uses)
    from torch._inductor.fx_passes import auto_chunker

    def eager(student: Tensor, teacher: Tensor) -> Tensor:  # not shared, or torch.compile would reuse another graph
        return peers.eager(student, teacher, case.relation)

    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    outcomes: list[str] = []  # of the chunker: "" on success, else the reason

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if outcomes:
            return compiled(student, teacher)
        chunk = auto_chunker.chunk

        def recorded_chunk(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
            try:
                graph = chunk(gm)
            except auto_chunker.CantChunk as error:
                outcomes.append(f"the auto chunker finds nothing to chunk: {error}")
                raise CannotRun(outcomes[0]) from error  # stops before the N x N matrices are allocated
            outcomes.append("")
            return graph

        # a cached graph would bypass the chunker
        options = {"auto_chunker.enable": True, "force_disable_caches": True}
        with mock.patch.object(auto_chunker, "chunk", recorded_chunk), config.patch(options):
            try:
                result = compiled(student, teacher)
            except Exception:
                if outcomes and outcomes[0]:  # the compiler may have wrapped the error
                    raise CannotRun(outcomes[0]) from None
                raise
        if not outcomes:
            raise CannotRun("torch.compile did not call the auto chunker")
        return result

    return loss


def _keops_missing(case: Case) -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed: pip install pykeops"
    return "KeOps does not support bfloat16" if case.dtype == "bfloat16" else None


def _keops(case: Case) -> Loss:
    loss = _peer(peers.keops, case)
    tiny = replace(case, pixels=2, batch=1)
    evaluate(loss, *features(tiny), tiny)  # compiles the formulas, for any number of pixels
    return loss


def _eager_matrices(case: Case) -> int:
    return 6 if case.need_grad and case.normalize == "row" else 3


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(partial(_peer, peers.eager), matrices=_eager_matrices),
    "compile": Provider(_compiled, compiles=True, matrices=lambda case: 2),
    "auto_chunker": Provider(_auto_chunked, _chunker_missing, compiles=True),
    "chunked": Provider(partial(_peer, peers.chunked)),
    "keops": Provider(_keops, _keops_missing),
    **KERNELS,
}
DEFAULT = [name for name in PROVIDERS if name not in CUDA_KERNELS]
OURS = tuple(name for name in BACKENDS if name != "reference")


def add_option(parser: argparse.ArgumentParser, default: Sequence[str], description: str) -> None:
    """Add the option --providers."""
    parser.add_argument(
        "--providers",
        choices=PROVIDERS,
        nargs="+",
        default=default,
        metavar="PROVIDER",
        help=f"from {', '.join(PROVIDERS)} (default: {description})",
    )


def prepare_call(name: str, case: Case) -> Callable[[], object]:
    """Return a call of a provider on the features of a case."""
    student, teacher = features(case)
    return partial(evaluate, PROVIDERS[name].make(case), student, teacher, case)
