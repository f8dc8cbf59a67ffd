"""The implementations to compare: every backend in srpkd's registry, and the peers."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from srpkd import relation_loss
from srpkd.kernels import BACKENDS, unavailable_reason
from srpkd.kernels.dispatch import backend_module, supported_dtypes

from . import peers
from .cases import Case, features

Loss = Callable[[Tensor, Tensor], Tensor]


class CannotRun(RuntimeError):
    """A provider detects only when it runs that it does not apply to a case; the message is the reason."""


class Provider(NamedTuple):
    """An implementation of the relation loss.

    Attributes:
        make: case -> function (student, teacher) -> scalar loss.
        unavailable_reason: case -> the reason why the provider cannot run, or None.
        compiles: whether the first call compiles for the shape of the case, which takes seconds.
        matrices: case -> minimum number of N x N arrays in the features' dtype that exist at once, as measured.
    """

    make: Callable[[Case], Loss]
    unavailable_reason: Callable[[Case], str | None] = lambda case: None
    compiles: bool = False
    matrices: Callable[[Case], int] = lambda case: 0

    def bytes_needed(self, case: Case) -> int:
        """Return the minimum memory in addition to the inputs."""
        return self.matrices(case) * case.matrix_bytes


def _backend(name: str) -> Provider:
    def reason(case: Case) -> str | None:
        if (missing := unavailable_reason(name, torch.device(case.device))) is not None:
            return missing
        module = backend_module(name)
        if case.distance not in getattr(module, "DISTANCES", (case.distance,)):
            return f"{name} supports the distances {', '.join(module.DISTANCES)}, received {case.distance}"
        if case.torch_dtype not in supported_dtypes(name, torch.device(case.device)):
            return f"{name} does not support {case.dtype} on {case.device}"
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


KERNEL_VARIABLE = "SRPKD_CUDA_KERNEL"  # csrc/ reads it at every call of ``native`` on a GPU


def _cuda_kernel(kernel: str, capabilities: tuple[int, ...]) -> Provider:
    """Return ``native`` with a CUDA kernel that is selected by name, on GPUs of these major compute capabilities."""
    native = _backend("native")

    def reason(case: Case) -> str | None:
        if case.device == "cpu":
            return f"{kernel} is a CUDA kernel"
        if (missing := native.unavailable_reason(case)) is not None:
            return missing
        found = torch.cuda.get_device_capability(case.device)
        return (
            None if found[0] in capabilities else f"{kernel} does not run on compute capability {found[0]}.{found[1]}"
        )

    def make(case: Case) -> Loss:
        loss = native.make(case)

        def selected(student: Tensor, teacher: Tensor) -> Tensor:
            before = os.environ.get(KERNEL_VARIABLE)
            os.environ[KERNEL_VARIABLE] = kernel
            try:
                return loss(student, teacher)
            except (RuntimeError, ValueError) as error:
                if KERNEL_VARIABLE in str(error):  # the kernel declares that it does not cover this case
                    raise CannotRun(" ".join(str(error).split())) from error
                raise
            finally:
                if before is None:
                    del os.environ[KERNEL_VARIABLE]
                else:
                    os.environ[KERNEL_VARIABLE] = before

        return selected

    return Provider(make, reason)


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
        original = auto_chunker.chunk

        def recorded_chunk(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
            try:
                graph = original(gm)
            except auto_chunker.CantChunk as error:
                outcomes.append(f"the auto chunker finds nothing to chunk: {error}")
                raise CannotRun(outcomes[0]) from error  # stops before the N x N matrices are allocated
            outcomes.append("")
            return graph

        auto_chunker.chunk = recorded_chunk
        try:
            # a cached graph would bypass the chunker
            with config.patch({"auto_chunker.enable": True, "force_disable_caches": True}):
                result = compiled(student, teacher)
        except Exception:
            if outcomes and outcomes[0]:  # the compiler may have wrapped the error
                raise CannotRun(outcomes[0]) from None
            raise
        finally:
            auto_chunker.chunk = original
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


CUDA_KERNELS = {"native-sm80": _cuda_kernel("sm80", (8, 9, 10, 12)), "native-sm90": _cuda_kernel("sm90", (9,))}
PROVIDERS: dict[str, Provider] = {
    "eager": Provider(partial(_peer, peers.eager), matrices=_eager_matrices),
    "compile": Provider(_compiled, compiles=True, matrices=lambda case: 2),
    "auto_chunker": Provider(_auto_chunked, _chunker_missing, compiles=True),
    "chunked": Provider(partial(_peer, peers.chunked)),
    "keops": Provider(_keops, _keops_missing),
    **{name: _backend(name) for name in BACKENDS},
    **CUDA_KERNELS,
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


def evaluate(loss: Loss, student: Tensor, teacher: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    """Compute the loss and, if the case needs it, the gradient of the student's features: the timed work.

    A float16 gradient is scaled by ``case.loss_scale``.
    """
    if not case.need_grad:
        with torch.no_grad():
            return loss(student, teacher), None
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    upstream = torch.full_like(value, case.loss_scale)
    return value.detach(), torch.autograd.grad(value, student, upstream)[0]


def prepare_call(name: str, case: Case) -> Callable[[], object]:
    """Return a call of a provider on the features of a case."""
    student, teacher = features(case)
    return partial(evaluate, PROVIDERS[name].make(case), student, teacher, case)
