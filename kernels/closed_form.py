"""Backend ``closed_form``: the exact l2 distance in O(N C^2) instead of O(N^2 C).

For d^2 all sums over pairs factor through C x C matrices: sum_ij G_ij^2 x_i y_j is the Frobenius product of
Q^T diag(x) Q and Q^T diag(y) Q, and sum_ij G_s,ij G_t,ij x_i y_j that of Q_s^T diag(x) Q_t and Q_s^T diag(y) Q_t.
The loss is a small difference of such large numbers if the student is close to its teacher, hence float64 throughout.

On NVIDIA GPUs, kernels compute it in a few launches, except for float64 and for "row" with constant norms: those of
csrc/cuda if the extension is built, or else Triton's. They sum 16-bit terms in float32 and float64, and avoid the
cancellation if both networks have the same number of channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import formulas, native
from .formulas import Relation, Scales, TileSums, Total, at, identity, moment_of

DISTANCES = ("l2",)
UNSUPPORTED = ("rectify",)  # max(A, 0) does not factor
SCALE_DTYPE = torch.float64


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
    return max(1, formulas.PART_ELEMENTS // (student[0].numel() + teacher[0].numel()))


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
    parts = formulas.parts_of(student, teacher)

    @functools.lru_cache(maxsize=1)  # the second pass starts with the last part of the first
    def load(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = parts[index]
        q_s, q_t = at(part, student), at(part, teacher)
        scaled_s, scaled_t = _scaled(q_s, alpha_s, part), _scaled(q_t, alpha_t, part)
        # A_ij is the product of row i of the scaled features and row j of these: beta_j q_j
        columns = (scaled_s, scaled_t) if relation.symmetric else (q_s.double(), q_t.double())
        return scaled_s, scaled_t, *columns

    def moments(index: int) -> dict[str, Tensor]:
        scaled_s, scaled_t, columns_s, columns_t = load(index)
        found = {"ts": columns_t.mT @ columns_s}
        if scales.moment is None:
            found["s"] = moment_of(columns_s)
        if relation.symmetric:
            found["t"] = moment_of(scaled_t)
        elif need_grad:
            found |= {"mirrored_s": moment_of(scaled_s), "mirrored_ts": scaled_t.mT @ scaled_s}
        return found

    sums = moments(0)
    for index in range(1, len(parts)):
        for name, moment in moments(index).items():
            sums[name] += moment
    M = {name: total(moment) for name, moment in sums.items()}
    if scales.moment is not None:
        M["s"] = scales.moment

    diagonal = None
    if relation.normalize == "cosine":
        assert alpha_s is not None and alpha_t is not None
        # D_ii counts as 0, but these sums include it where only one of student and teacher has norm 0 at pixel i
        diagonal = (alpha_s > 0).double() - (alpha_t > 0).double()
    slope = 4 if relation.symmetric else 2  # P = 2 D of the pair (i, j), and of (j, i) if D is symmetric
    U = torch.empty_like(student, dtype=torch.float64)  # at first the sum over j of D_ij beta_s,j q_j
    h = U.new_empty(U.shape[:2]) if need_grad and relation.differentiates_norms else None
    losses = []
    for index in reversed(range(len(parts))) if need_grad or not relation.symmetric else ():
        scaled_s, scaled_t, columns_s, columns_t = load(index)
        part = parts[index]
        forward = at(part, U)
        _add_product(forward, scaled_s, M["s"], beta=0)
        energy_s = None if relation.symmetric else _dots(scaled_s, forward)  # sum_j A_s,ij^2
        _add_product(forward, scaled_t, M["ts"], factor=-1)
        if diagonal is not None:
            forward.addcmul_(at(part, diagonal).unsqueeze(-1), scaled_s, value=-1)
        along = _dots(scaled_s, forward)
        if energy_s is not None:
            assert alpha_t is not None
            energy_t = at(part, alpha_t) > 0  # rows have norm 1, or 0
            losses.append((2 * along - energy_s + energy_t).sum(1))
        if h is not None:
            torch.mul(along, slope, out=at(part, h))
        forward.mul_(slope if alpha_s is None else slope * at(part, alpha_s).unsqueeze(-1))
        if need_grad and not relation.symmetric:  # sum_j P_ji alpha_s,j q_j
            _add_product(forward, columns_s, M["mirrored_s"], factor=2)
            _add_product(forward, columns_t, M["mirrored_ts"], factor=-2)
    if relation.symmetric:
        loss = _sum_squares(M["s"]) - 2 * _sum_squares(M["ts"]) + _sum_squares(M["t"])
        if diagonal is not None:
            loss = loss - total(diagonal.square().sum(1))
    else:
        loss = total(torch.stack(losses).sum(0))
    loss = loss.clamp_min(0)  # a sum of squares up to rounding
    return TileSums(loss, U if need_grad else None, h)


def _scaled(features: Tensor, alpha: Tensor | None, pixels: slice) -> Tensor:
    """Return alpha_i q_i in float64 of some pixels' features (B, n, C), in their layout; alpha (B, N) is of all."""
    if alpha is None:
        return features.double()
    return features.to(torch.float64, copy=True).mul_(at(pixels, alpha).unsqueeze(-1))


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
