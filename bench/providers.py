"""The implementations to compare: every backend in srpkd's registry, and the peers."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from srpkd.checking.cases import Case, features
from srpkd.checking.kernels import CUDA_KERNELS, KERNELS, Loss, Provider, evaluate
from srpkd.kernels import BACKENDS

from . import cases, peers


def _peer(function: Callable[..., Tensor], case: Case) -> Loss:
    return partial(function, relation=case.relation)


def _compiled(case: Case) -> Loss:
    return torch.compile(_peer(peers.eager, case), dynamic=False, fullgraph=True)


def _keops_missing(case: Case) -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed: pip install pykeops"
    return "KeOps does not support bfloat16" if case.dtype == "bfloat16" else None


def _keops(case: Case) -> Loss:
    loss = _peer(peers.keops, case)
    tiny = replace(case, pixels=2, batch=1)
    evaluate(loss, *features(tiny), tiny)  # compiles the formulas, for any number of pixels
    return loss


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(partial(_peer, peers.eager)),
    "compile": Provider(_compiled),
    "chunked": Provider(partial(_peer, peers.chunked)),
    "keops": Provider(_keops, _keops_missing),
    **KERNELS,
}
DEFAULT = [name for name in PROVIDERS if name not in CUDA_KERNELS]
# minimum number of N x N arrays in the features' dtype that exist at once, as measured; the others need none
MATRICES: dict[str, Callable[[Case], int]] = {
    "eager": lambda case: 6 if case.need_grad and case.normalize == "row" else 3,
    "compile": lambda case: 2,
    "reference": lambda case: 5 if case.need_grad else 3,
}
OURS = tuple(name for name in BACKENDS if name != "reference")


def bytes_needed(name: str, case: Case) -> int:
    """Return the minimum memory of a provider in addition to the inputs."""
    return MATRICES[name](case) * cases.matrix_bytes(case) if name in MATRICES else 0


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


def prepare_call(name: str, case: Case) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Return a call of a provider on the features of a case."""
    student, teacher = features(case)
    return partial(evaluate, PROVIDERS[name].make(case), student, teacher, case)
