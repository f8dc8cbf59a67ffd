"""The correctness gate: a provider whose loss or gradient is off against float64 gets no number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .peers import strip_loss, strips
from .providers import Loss, evaluate


class Result(NamedTuple):
    """A loss, a scalar, and its gradient for the student's features (B, N, C_s), None in mode "forward"."""

    loss: Tensor
    gradient: Tensor | None


class Errors(NamedTuple):
    """Relative errors against float64; None where no gradient was asked for.

    loss, gradient: ||actual - expected|| / ||expected||.
    pixel: the largest error of one pixel's gradient, relative to the root mean square of all pixels' gradients: a row
        that was forgotten does not show in the error of a large whole.
    """

    loss: float
    gradient: float | None = None
    pixel: float | None = None


# Features are random, so a few pairs lie so near a tie of l1 that rounding turns their sign; and eager PyTorch in 16
# bits rounds N x N matrices to 16 bits.
LIMITS = {
    "float64": Errors(1e-9, 1e-6, 0.5),
    "float32": Errors(1e-4, 1e-2, 0.5),
    "tf32": Errors(5e-3, 5e-2, 0.5),
    "bfloat16": Errors(2e-2, 1e-1, 0.5),
    "float16": Errors(5e-3, 5e-2, 0.5),
}


def judge(loss: Loss, case: Case, student: Tensor, teacher: Tensor, expected: Result) -> Errors:
    """Run a provider once and say how far it is off."""
    value, gradient = evaluate(loss, student, teacher, case)
    return errors(Result(value, None if gradient is None else gradient.double() / case.loss_scale), expected)


def truth(student: Tensor, teacher: Tensor, case: Case) -> Result:
    """Loss and gradient in float64, by autograd through the definition, strip by strip.

    Written on the peers' definition: it shares no code with the backends that it judges.
    """
    student, teacher = student.double().requires_grad_(case.need_grad), teacher.double()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    gradient = torch.zeros_like(student) if case.need_grad else None
    for rows, share in strips(student):
        loss = share * strip_loss(student, teacher, rows, case.relation)
        if case.need_grad:
            gradient += torch.autograd.grad(loss, student)[0]
        total += loss.detach()
    return Result(total, gradient)


def errors(actual: Result, expected: Result) -> Errors:
    """Relative errors; NaN or infinite where the result is not finite."""
    tiny = 1e-300  # a gradient that is 0 should be 0

    def relative(one: Tensor, other: Tensor) -> float:
        return ((one.double() - other).norm() / other.norm().clamp_min(tiny)).item()

    loss = relative(actual.loss, expected.loss)
    if expected.gradient is None:
        return Errors(loss)
    by_pixel = (actual.gradient.double() - expected.gradient).norm(dim=-1)
    usual = expected.gradient.norm(dim=-1).square().mean().sqrt().clamp_min(tiny)
    return Errors(loss, relative(actual.gradient, expected.gradient), (by_pixel.max() / usual).item())


def why_wrong(found: Errors, case: Case) -> str | None:
    """Why a result is not good enough to be timed, or None."""
    kind = {"high": "tf32", "medium": "bfloat16"}.get(case.precision, "float32")
    limits = LIMITS[kind if case.dtype == "float32" else case.dtype]
    for name, value, limit in zip(("loss", "gradient", "one pixel's gradient"), found, limits):
        if value is not None and not value <= limit:  # NaN is not
            return f"{name} is off by {value:.2g} against float64, {limit:g} is allowed"
    return None
