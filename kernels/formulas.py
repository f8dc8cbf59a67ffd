"""The algebra around the tiles, shared by every backend: scales before, correction after.

Notation (one image): features Q in R^{N x C}, G = Q Q^T, relation A_ij = G_ij alpha_i beta_j with

    normalize   alpha_i            beta_j
    "row"       1 / ||G_i,:||_2    1
    "cosine"    1 / ||q_i||        1 / ||q_j||
    "none"      1                  1

so one vector of N scales says everything about a normalisation. The loss of an image is
(1/N^2) sum_ij rho(D_ij), D = A_student - A_teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NORMALIZATIONS = ("row", "cosine", "none")
DISTANCES = ("l1", "l2", "huber")
Normalize = Literal["row", "cosine", "none"]
Distance = Literal["l1", "l2", "huber"]
DEFAULT_NORMALIZE: Normalize = "cosine"
DEFAULT_DISTANCE: Distance = "l2"


@dataclass(frozen=True)
class Relation:
    """Which relation matrix, and which distance between two of them.

    Attributes:
        normalize: ``"row"``, ``"cosine"`` or ``"none"``: what A_ij is, see the module docstring.
        distance: ``"l1"`` abs(d), ``"l2"`` d^2, ``"huber"`` d^2/2 inside delta and delta*(abs(d) - delta/2) outside.
        delta: where Huber's distance turns linear; the other distances ignore it.
        eps: a pixel whose norm (cosine) or row norm (row) is at most eps has relation 0 to everything.
    """

    normalize: str = "row"
    distance: str = "l1"
    delta: float = 1.0
    eps: float = 1e-12

    @property
    def symmetric(self) -> bool:
        """Whether A (and so D and rho'(D)) is symmetric."""
        return self.normalize != "row"


class Scales(NamedTuple):
    """alpha of both relation matrices (B, N), None where it is 1; and the student's M = Q^T Q (B, C, C)."""

    student: Tensor | None
    teacher: Tensor | None
    moment: Tensor | None


class TileSums(NamedTuple):
    """What the primitive ``relation_tiles`` gives back.

    loss: (B,) sums of rho(D_ij) over all pairs.
    U: (B, N, C) sums over j of K_ij q_j, K_ij = P_ij alpha_i beta_j + P_ji alpha_j beta_i, P = rho'(D).
    h: (B, N) sums over j of P_ij A_ij, for cosine those of P_ji A_ji too.
    U and h are None when no gradient was asked for; h is also None for ``normalize="none"``.
    """

    loss: Tensor
    U: Tensor | None
    h: Tensor | None


# What a sum over this process's pixels becomes: itself, or the sum over all ranks (distributed.py).
Total = Callable[[Tensor], Tensor]


def identity(total: Tensor) -> Tensor:
    """The ``Total`` where there are no pixels but this process's."""
    return total


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a gradient is kept in until backward scales it.

    float32 for float16: the gradient of a mean over N^2 pairs would underflow before loss scaling could save it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def matmul_precision() -> str:
    """The precision that torch is set to multiply float32 in: "highest", "high" (TF32) or "medium" (bfloat16)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set backend by backend, through torch's newer interface
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def distance_value(difference: Tensor, relation: Relation) -> Tensor:
    """rho(D), elementwise."""
    if relation.distance == "l1":
        return difference.abs()
    if relation.distance == "l2":
        return difference.square()
    size, delta = difference.abs(), relation.delta
    return torch.where(size <= delta, 0.5 * difference.square(), delta * (size - 0.5 * delta))


def distance_grad(difference: Tensor, relation: Relation) -> Tensor:
    """rho'(D), elementwise; 0 at a tie of the l1 distance, as in torch."""
    if relation.distance == "l1":
        return difference.sign()
    if relation.distance == "l2":
        return 2 * difference
    return difference.clamp(-relation.delta, relation.delta)


def power_of_two_scale(moment: Tensor) -> Tensor:
    """The power of two next below the root of M's largest element (B, 1, 1): about sqrt(N) times a feature's size.

    Divided by its square, a product with M has the size of features: in float32 those of 1e18 would overflow, and the
    scales of 1e-18 underflow.
    """
    largest = moment.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(moment.dtype).tiny)
    return (largest.log2() / 2).floor().exp2().view(-1, 1, 1)


def inverse(norm: Tensor, relation: Relation) -> Tensor:
    """alpha: 0 for a dead pixel, and NaN rather than that where the norm is none, or too large for its dtype."""
    return torch.where(norm <= relation.eps, 0, norm.reciprocal() + 0 * norm)


def row_scales(
    features: Tensor, relation: Relation, total: Total = identity, pixels: int | None = None
) -> tuple[Tensor, Tensor]:
    """alpha (B, N) for ``"row"``, and M = Q^T Q (B, C, C), of features (B, N, C) in their own dtype.

    The row norm needs no N x N array: ||G_i,:||^2 = q_i^T M q_i. With the mean m of the features that is
    q_i^T M' q_i + N (m . q_i)^2, M' being the moment of q - m. Neither term is negative: where all pixels but some have
    a large mean in common, those keep digits that would cancel in q_i^T M q_i.
    """
    count = pixels or features.shape[1]
    mean = total(features.sum(1, keepdim=True)) / count
    centred = features - mean
    moment = total(centred.mT @ centred)
    whole = torch.baddbmm(moment, mean.mT, mean, alpha=count)
    size = power_of_two_scale(whole)
    # the product in the layout of the features: to read one of the two across its strides takes as long as it does
    by_channel = features.stride(-1) > features.stride(-2)
    moment = moment / size.square()
    product = (moment @ features.mT).mT if by_channel else features @ moment
    along = (features @ (mean.mT / size)).squeeze(-1)
    square = product.mul_(features).sum(-1).add_(along.square_(), alpha=count)
    # rounding can leave a square just below 0
    return inverse(square.clamp_min_(0).sqrt_() * size.squeeze(-1), relation), whole


def scales_of(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    dtype: torch.dtype,
    total: Total = identity,
    pixels: int | None = None,
) -> Scales:
    """The scales of both relation matrices from raw features (B, N, C_s), (B, N, C_t), in ``dtype``.

    ``pixels`` is N where it is not that of the features given.
    """
    if relation.normalize == "none":
        return Scales(None, None, None)
    # TF32 and bfloat16 are too coarse for scales: float64 where float32 would be multiplied in them
    coarse = matmul_precision() != "highest" and student.device.type != "mps"
    exact = torch.float64 if coarse else dtype

    def scale_and_moment(features: Tensor) -> tuple[Tensor, Tensor | None]:
        features = features.to(exact)
        if relation.normalize == "row":
            return row_scales(features, relation, total, pixels)
        return inverse(features.square().sum(-1).sqrt(), relation), None

    alpha_s, moment = scale_and_moment(student)
    alpha_t, _ = scale_and_moment(teacher)
    return Scales(*(None if scale is None else scale.to(dtype) for scale in (alpha_s, alpha_t, moment)))


def gradient_of(
    student: Tensor,
    tiles: TileSums,
    scales: Scales,
    relation: Relation,
    total: Total = identity,
    pixels: int | None = None,
) -> Tensor:
    """dL/dQ (B, N, C) of the mean over all pairs, from U and h, in student's strides and ``gradient_dtype``.

    U is used up: where it can be, it becomes the gradient.

    N^2 dL/dQ is U plus what the scales' own dependence on Q adds; with w_i = h_i alpha_i^2:

        none      U_i
        cosine    U_i - w_i q_i
        row       U_i - w_i M q_i - M_w q_i,  M = Q^T Q,  M_w = Q^T diag(w) Q

    A dead pixel has alpha = 0, hence w = 0: no gradient runs through its own normalisation.
    ``pixels`` is N where it is not that of the features given.
    """
    scale = 1 / (pixels or student.shape[1]) ** 2
    result = tiles.U
    if relation.normalize == "none":
        result.mul_(scale)
    else:
        features = student.to(result.dtype)
        if relation.normalize == "cosine":
            result.sub_((tiles.h * scales.student.square()).unsqueeze(-1) * features).mul_(scale)
        else:  # w_i times, and M divided by, the square of M's size
            size = power_of_two_scale(scales.moment)
            weighted = (tiles.h * (scales.student * size.squeeze(-1)).square()).unsqueeze(-1) * features
            moment, weighted_moment = (x / size.square() for x in (scales.moment, total(weighted.mT @ features)))
            result.mT.baddbmm_(moment.to(result.dtype), weighted.mT, beta=scale, alpha=-scale)
            result.mT.baddbmm_(weighted_moment, features.mT, alpha=-scale)
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype))
    if gradient.dtype == result.dtype and gradient.stride() == result.stride():
        return result
    return gradient.copy_(result)
