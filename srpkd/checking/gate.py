"""The correctness gate: whether a loss and its gradient agree with the definition in float64.

The definition is plain PyTorch, a strip of rows at a time: it shares no code with the backends that it checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Relation
from .cases import Case
from .kernels import KERNELS, Loss, evaluate, poisoned_memory

# Elements of the matrix of one strip: it fits into a CPU's cache, and occupies a whole GPU.
STRIP_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
MIN_ROWS = 128  # with fewer rows, writing the gradient of all pixels dominates the work of a strip


def relation_rows(features: Tensor, rows: slice, relation: Relation) -> Tensor:
    """Return the rows I of the relation matrix: (B, N, C) -> (B, I, N)."""
    if relation.normalize == "cosine":
        features = normalized(features, relation.detach_norms)
    matrix = features[:, rows] @ features.mT
    if relation.normalize == "row":
        matrix = normalized(matrix, relation.detach_norms)
    return matrix.relu() if relation.rectify else matrix


def normalized(vectors: Tensor, detach_norms: bool) -> Tensor:
    """Return vectors (..., C) divided by their norms, which may be constants to the gradient."""
    norms = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return vectors / (norms.detach() if detach_norms else norms)


def mean_distance(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """Return the mean of rho(student - teacher), a scalar."""
    if relation.distance == "l1":
        return F.l1_loss(student, teacher)
    if relation.distance == "l2":
        return F.mse_loss(student, teacher)
    return F.huber_loss(student, teacher, delta=relation.delta)


def strip_loss(student: Tensor, teacher: Tensor, rows: slice, relation: Relation) -> Tensor:
    """Return the mean over the pairs in the rows I: (B, N, C_s), (B, N, C_t) -> scalar."""
    return mean_distance(
        relation_rows(student, rows, relation), relation_rows(teacher, rows, relation).detach(), relation
    )


def strips(student: Tensor) -> Iterator[tuple[slice, float]]:
    """Yield strips of rows, each with its share of all rows."""
    batch, pixels, _ = student.shape
    size = max(MIN_ROWS, STRIP_ELEMENTS.get(student.device.type, 2**22) // (batch * pixels))
    for start in range(0, pixels, size):
        stop = min(start + size, pixels)
        yield slice(start, stop), (stop - start) / pixels


class Result(NamedTuple):
    """A scalar loss, and the gradient of the student's features (B, N, C_s), None in mode "forward"."""

    loss: Tensor
    gradient: Tensor | None


class Errors(NamedTuple):
    """Relative errors against float64; those of the gradient are None in mode "forward".

    Attributes:
        loss, gradient: ||actual - expected|| / ||expected||.
        pixel: largest error norm of one pixel's gradient, relative to the root mean square norm over all pixels. It
            detects a missing row, which hardly changes the error of the whole gradient.
    """

    loss: float
    gradient: float | None = None
    pixel: float | None = None


# Some pairs of random features are so close to a tie of l1 that rounding flips their sign, and eager PyTorch rounds the
# N x N matrices to 16 bits if the features have 16 bits.
LIMITS = {
    "float64": Errors(1e-9, 1e-6, 0.5),
    "float32": Errors(1e-4, 1e-2, 0.5),
    "tf32": Errors(5e-3, 5e-2, 0.5),
    "medium": Errors(2e-2, 1e-1, 0.5),  # float32 features that are rounded to bfloat16
    "bfloat16": Errors(2e-2, 1e-1, 0.5),
    "float16": Errors(5e-3, 5e-2, 0.5),
}


# Our kernels round no N x N matrix to 16 bits: only the gradient that they return has that precision.
KERNEL_LIMITS = LIMITS | {"bfloat16": Errors(1e-3, 1e-2, 0.5), "float16": Errors(1e-3, 1e-2, 0.5)}


def measure_errors(name: str, loss: Loss, case: Case, student: Tensor, teacher: Tensor, expected: Result) -> Errors:
    """Run a provider once and return its errors; a kernel of srpkd with ``poisoned_memory``."""
    # not for peers: torch.compile would compile again without it
    with poisoned_memory() if name in KERNELS else nullcontext():
        result = Result(*evaluate(loss, student, teacher, case))
    return relative_errors(result, expected, case.loss_scale)


def float64_result(student: Tensor, teacher: Tensor, case: Case) -> Result:
    """Compute loss and gradient in float64 by autograd, a strip of rows at a time."""
    student, teacher = student.double().requires_grad_(case.need_grad), teacher.double()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    gradient = torch.zeros_like(student) if case.need_grad else None
    for rows, share in strips(student):
        loss = share * strip_loss(student, teacher, rows, case.relation)
        if gradient is not None:
            gradient += torch.autograd.grad(loss, student)[0]
        total += loss.detach()
    return Result(total, gradient)


def relative_errors(actual: Result, expected: Result, loss_scale: float = 1.0) -> Errors:
    """Return the errors of a result, whose gradient is scaled; NaN or infinite if the result is not finite."""
    tiny = 1e-300  # keeps the error of a zero gradient finite

    def relative(value: Tensor, reference: Tensor) -> float:
        return ((value.double() - reference).norm() / reference.norm().clamp_min(tiny)).item()

    loss = relative(actual.loss, expected.loss)
    if expected.gradient is None:
        return Errors(loss)
    assert actual.gradient is not None
    gradient = actual.gradient.double() / loss_scale
    by_pixel = (gradient - expected.gradient).norm(dim=-1)
    root_mean_square = expected.gradient.norm(dim=-1).square().mean().sqrt().clamp_min(tiny)
    return Errors(loss, relative(gradient, expected.gradient), (by_pixel.max() / root_mean_square).item())


def failure_reason(found: Errors, case: Case, limits: dict[str, Errors] = LIMITS) -> str | None:
    """Return which error exceeds its limit, or None if the result is right."""
    for name, value, limit in zip(("loss", "gradient", "one pixel's gradient"), found, limits_of(case, limits)):
        if value is not None and limit is not None and not value <= limit:  # also true for NaN
            return f"the relative error of {name} against float64 is {value:.2g}, expected at most {limit:g}"
    return None


def share_of_limit(found: Errors, case: Case, limits: dict[str, Errors]) -> float:
    """Return the largest error in units of its limit: above 1 if the result is wrong."""
    return max(
        value / limit for value, limit in zip(found, limits_of(case, limits)) if value is not None and limit is not None
    )


def limits_of(case: Case, limits: dict[str, Errors]) -> Errors:
    """Return the limits of the errors of a case."""
    float32_kind = {"high": "tf32", "medium": "medium"}.get(case.precision, "float32")
    return limits[float32_kind if case.dtype == "float32" else case.dtype]
