"""The backends, and the CUDA kernels of ``native``, as functions of two tensors for a case."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import relation_loss
from ..kernels import BACKENDS, unavailable_reason
from ..kernels.dispatch import backend_module, supported_dtypes, unsupported_flag
from .cases import Case

Loss = Callable[[Tensor, Tensor], Tensor]


class CannotRun(RuntimeError):
    """A provider detects only when it runs that it does not apply to a case; the message is the reason."""


class Provider(NamedTuple):
    """An implementation of the relation loss.

    Attributes:
        make: case -> function (student, teacher) -> scalar loss.
        unavailable_reason: case -> the reason why the provider cannot run, or None.
    """

    make: Callable[[Case], Loss]
    unavailable_reason: Callable[[Case], str | None] = lambda case: None


def _backend(name: str) -> Provider:
    def reason(case: Case) -> str | None:
        if (missing := unavailable_reason(name, torch.device(case.device))) is not None:
            return missing
        module = backend_module(name)
        if case.distance not in getattr(module, "DISTANCES", (case.distance,)):
            return f"{name} supports the distances {', '.join(module.DISTANCES)}, received {case.distance}"
        if case.torch_dtype not in supported_dtypes(name, torch.device(case.device)):
            return f"{name} does not support {case.dtype} on {case.device}"
        flag = unsupported_flag(name, case.relation)
        return None if flag is None else f"{name} does not support {flag}=True"

    def make(case: Case) -> Loss:
        return partial(relation_loss, **asdict(case.relation), layout="nlc", backend=name)

    return Provider(make, reason)


# csrc/ reads them at every call of ``native`` on a GPU, and all but the first also of ``closed_form``
KERNEL_VARIABLE, OVERLAP_VARIABLE, TOGETHER_VARIABLE = "SRPKD_CUDA_KERNEL", "SRPKD_CUDA_OVERLAP", "SRPKD_CUDA_TOGETHER"


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, and restore it at the end."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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
            try:
                with environment(KERNEL_VARIABLE, kernel):
                    return loss(student, teacher)
            except (RuntimeError, ValueError) as error:
                if KERNEL_VARIABLE in str(error):  # the kernel declares that it does not cover this case
                    raise CannotRun(" ".join(str(error).split())) from error
                raise

        return selected

    return Provider(make, reason)


CUDA_KERNELS = {"native-sm80": _cuda_kernel("sm80", (8, 9, 10, 11, 12)), "native-sm90": _cuda_kernel("sm90", (9,))}
KERNELS: dict[str, Provider] = {name: _backend(name) for name in BACKENDS} | CUDA_KERNELS


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill the memory of ``torch.empty`` and similar functions with NaN, in Python and in C++.

    An element that a kernel omits could otherwise have the right value, which an earlier result left in that memory.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*deterministic", UserWarning)  # of operators in the formulas
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filled


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
