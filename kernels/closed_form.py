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
GROUP_ELEMENTS = 2**19  # of the features of the images that are computed together on a CPU: see bench/NOTES.md


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
    alpha_s, alpha_t = scales.student, scales.teacher
    scaled_s, scaled_t = _scaled(student, alpha_s), _scaled(teacher, alpha_t)
    # A_ij is the product of row i of the scaled features and row j of these: beta_j q_j
    columns_s, columns_t = (scaled_s, scaled_t) if relation.symmetric else (student.double(), teacher.double())

    moment_s = total(columns_s.mT @ columns_s) if scales.moment is None else scales.moment
    moment_ts = total(columns_t.mT @ columns_s)
    forward = torch.empty_like(scaled_s)  # sum_j D_ij beta_s,j q_j
    _add_product(forward, scaled_s, moment_s, beta=0)
    if alpha_t is None or relation.symmetric:
        _add_product(forward, scaled_t, moment_ts, factor=-1)
        moment_t = total(scaled_t.mT @ scaled_t)
        loss = _sum_squares(moment_s) - 2 * _sum_squares(moment_ts) + _sum_squares(moment_t)
    else:
        energy_s = _dots(scaled_s, forward)  # sum_j A_s,ij^2
        _add_product(forward, scaled_t, moment_ts, factor=-1)
        energy_t = (alpha_t > 0).sum(1)  # rows have norm 1, or 0
        loss = total((2 * _dots(scaled_s, forward) - energy_s).sum(1) + energy_t)
    if relation.normalize == "cosine":
        assert alpha_s is not None and alpha_t is not None
        # D_ii counts as 0, but these sums include it where only one of student and teacher has norm 0 at pixel i
        diagonal = (alpha_s > 0).double() - (alpha_t > 0).double()
        loss = loss - total(diagonal.square().sum(1))
        forward.addcmul_(diagonal.unsqueeze(-1), scaled_s, value=-1)
    loss = loss.clamp_min(0)  # a sum of squares up to rounding
    if not need_grad:
        return TileSums(loss, None, None)

    slope = 4 if relation.symmetric else 2  # P = 2 D of the pair (i, j), and of (j, i) if D is symmetric
    h = slope * _dots(scaled_s, forward) if relation.differentiates_norms else None
    U = forward.mul_(slope if alpha_s is None else slope * alpha_s.unsqueeze(-1))
    if not relation.symmetric:  # sum_j P_ji alpha_s,j q_j
        _add_product(U, columns_s, total(scaled_s.mT @ scaled_s), factor=2)
        _add_product(U, columns_t, total(scaled_t.mT @ scaled_s), factor=-2)
    return TileSums(loss, U, h)


def _scaled(features: Tensor, alpha: Tensor | None) -> Tensor:
    """Return alpha_i q_i in float64, in the layout of the features (B, N, C)."""
    return features.double() if alpha is None else features.to(torch.float64, copy=True).mul_(alpha.unsqueeze(-1))


def _add_product(result: Tensor, features: Tensor, matrix: Tensor, beta: float = 1, factor: float = 1) -> None:
    """Overwrite a result (B, N, C) with beta times itself plus factor Q M."""
    # a product in another layout than the result's takes as long again to add
    if result.stride(-1) > result.stride(-2):
        result.mT.baddbmm_(matrix.mT, features.mT, beta=beta, alpha=factor)
    else:
        result.baddbmm_(features, matrix, beta=beta, alpha=factor)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of the pixels (B, N) of two tensors (B, N, C)."""
    return (left * right).sum(-1)


def _sum_squares(matrices: Tensor) -> Tensor:
    """Return the squared Frobenius norms (B,) of matrices (B, C, C')."""
    return matrices.square().sum((1, 2))


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the backend cannot run there, or None if it can."""
    if formulas.has_float64(device):
        return None
    return "it computes in float64, which this device lacks: use backend='blocked'"
