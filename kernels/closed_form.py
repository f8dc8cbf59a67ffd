"""Backend ``closed_form``: the exact l2 distance in O(N C^2) instead of O(N^2 C).

For d^2 all sums over pairs factor through C x C matrices: sum_ij G_ij^2 x_i y_j is the Frobenius product of
Q^T diag(x) Q and Q^T diag(y) Q, and sum_ij G_s,ij G_t,ij x_i y_j that of Q_s^T diag(x) Q_t and Q_s^T diag(y) Q_t.
The loss is a small difference of such large numbers if the student is close to its teacher, hence float64 throughout.

On NVIDIA GPUs, kernels compute it in a few launches, except for float64 and for "row" with constant norms: those of
csrc/cuda if the extension is built, or else Triton's. They sum 16-bit terms in float32 and float64, and avoid the
cancellation if both networks have the same number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import formulas, native
from .formulas import Relation, Scales, TileSums, Total, identity

DISTANCES = ("l2",)
UNSUPPORTED = ("rectify",)  # max(A, 0) does not factor
SCALE_DTYPE = torch.float64
GROUP_ELEMENTS = 2**18  # of the features of the images that are computed together on a CPU: see bench/NOTES.md


def implementation(device: torch.device, dtype: torch.dtype, relation: Relation) -> str:
    """Return what computes the loss of such features: "native" or "triton" kernels, or "pytorch"."""
    constant_row_norms = relation.normalize == "row" and relation.detach_norms
    if device.type == "cuda" and dtype != torch.float64 and not constant_row_norms:
        if native.is_built(device):
            return "native"
        from . import triton  # here, since it takes time to import

        if triton.unavailable_reason(device) is None:
            return "triton"
    return "pytorch"


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,), and with ``need_grad`` its gradient (B, N, C_s)."""
    kernels = implementation(student.device, student.dtype, relation)
    if kernels == "native":
        return native.loss_and_gradient(student, teacher, relation, need_grad, method="closed_form")
    if kernels == "triton":
        from .triton import closed_form

        return closed_form.loss_and_gradient(student, teacher, relation, need_grad)
    at_once = images_at_once(student, teacher)
    return formulas.loss_and_gradient(
        relation_tiles, student, teacher, relation, need_grad, SCALE_DTYPE, images_at_once=at_once
    )


def images_at_once(student: Tensor, teacher: Tensor) -> int | None:
    """Return how many images to compute together: on a CPU, no more than its caches hold; else None, all."""
    if student.device.type != "cpu":
        return None
    return max(1, GROUP_ELEMENTS // (student[0].numel() + teacher[0].numel()))


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive for ``distance="l2"``: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N).

    All in float64. See ``TileSums``.
    """
    return tiles_over(identity, student, teacher, scales, relation, need_grad)


def tiles_over(
    total: Total, student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool
) -> TileSums:
    """Return ``relation_tiles`` of these pixels' rows; ``total`` sums over all pixels, and the loss is that of all."""
    student, teacher = student.double(), teacher.double()
    ones = student.new_ones(student.shape[:2])
    alpha_s, alpha_t = (ones if alpha is None else alpha for alpha in (scales.student, scales.teacher))
    row_s, row_t, row_st = alpha_s.square(), alpha_t.square(), alpha_s * alpha_t
    column_s, column_st = (row_s, row_st) if relation.symmetric else (ones, ones)

    # sum_j G_s,ij (beta_j^2) q_j and sum_j G_t,ij (beta_s,j beta_t,j) q_j
    moment = total(_moment(student, student, column_s)) if scales.moment is None else scales.moment
    by_column_s = student @ moment
    by_column_st = teacher @ total(_moment(teacher, student, column_st))
    forward = row_s.unsqueeze(-1) * by_column_s - row_st.unsqueeze(-1) * by_column_st
    energy_s = row_s * (student * by_column_s).sum(-1)
    energy_st = row_st * (student * by_column_st).sum(-1)
    if relation.symmetric:
        energy_t = total(_moment(teacher, teacher, row_t)).square().sum((1, 2))
    else:
        energy_t = total((alpha_t > 0).sum(1))  # rows have norm 1, or 0
    loss = total((energy_s - 2 * energy_st).sum(1)) + energy_t
    excess = None
    if relation.normalize == "cosine":
        # D_ii counts as 0, but these sums include it where only one of student and teacher has norm 0 at pixel i
        diagonal_s = row_s * student.square().sum(-1)
        excess = diagonal_s - row_t * teacher.square().sum(-1)
        loss = loss - total(excess.square().sum(1))
    loss = loss.clamp_min(0)  # a sum of squares up to rounding
    if not need_grad:
        return TileSums(loss, None, None)

    if relation.symmetric:
        U = 4 * forward
    else:
        by_row_s = student @ total(_moment(student, student, row_s))
        by_row_st = teacher @ total(_moment(teacher, student, row_st))
        U = 2 * (forward + by_row_s - by_row_st)
    h = 2 * (energy_s - energy_st) if relation.differentiates_norms else None
    if excess is not None:
        U = U - (4 * excess * row_s).unsqueeze(-1) * student
        h = None if h is None else 2 * (h - 2 * excess * diagonal_s)
    return TileSums(loss, U, h)


def _moment(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Return Q_l^T diag(weight) Q_r: (B, N, C_l), (B, N, C_r), (B, N) -> (B, C_l, C_r)."""
    return left.mT @ (weight.unsqueeze(-1) * right)


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the backend cannot run there, or None if it can."""
    if formulas.has_float64(device):
        return None
    return "it computes in float64, which this device lacks: use backend='blocked'"
