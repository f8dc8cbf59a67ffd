"""The formulas around the tiles, shared by every backend: scales before, gradient correction after.

Notation (one image): features Q in R^{N x C}, G = Q Q^T, relation A_ij = G_ij alpha_i beta_j with

    normalize   alpha_i            beta_j
    "row"       1 / ||G_i,:||_2    1
    "cosine"    1 / ||q_i||        1 / ||q_j||
    "none"      1                  1

so one vector of N scales defines a normalisation. The loss of an image is
(1/N^2) sum_ij rho(D_ij), D = A_student - A_teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Normalize = Literal["row", "cosine", "none"]
Distance = Literal["l1", "l2", "huber"]
NORMALIZATIONS: tuple[Normalize, ...] = get_args(Normalize)
DISTANCES: tuple[Distance, ...] = get_args(Distance)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The defaults of SRPLoss, RelationDistiller, distill() and the trainer: chosen by the study, docs/study.md.
DEFAULT_NORMALIZE: Normalize = "cosine"
DEFAULT_DISTANCE: Distance = "l2"


@dataclass(frozen=True)
class Relation:
    """A relation matrix, and the distance between two of them.

    Attributes:
        normalize: ``"row"``, ``"cosine"`` or ``"none"``: the definition of A_ij, see the module docstring.
        distance: ``"l1"`` abs(d), ``"l2"`` d^2, ``"huber"`` d^2/2 inside delta and delta*(abs(d) - delta/2) outside.
        delta: where the Huber distance becomes linear; the other distances ignore it.
        eps: a pixel whose norm (cosine) or row norm (row) is at most eps has relation 0 to all pixels.
        rectify: negative entries of both relation matrices count as 0: max(A_ij, 0) replaces A_ij.
        detach_norms: the norms (cosine) or row norms (row) are constants to the gradient.
    """

    normalize: Normalize = DEFAULT_NORMALIZE
    distance: Distance = DEFAULT_DISTANCE
    delta: float = 1.0
    eps: float = 1e-12
    rectify: bool = False
    detach_norms: bool = False

    @property
    def arguments(self) -> tuple[str, str, float, float, bool, bool]:
        """The options in the order in which the operators take them."""
        return self.normalize, self.distance, self.delta, self.eps, self.rectify, self.detach_norms

    @property
    def symmetric(self) -> bool:
        """Whether A, and with it D and rho'(D), is symmetric."""
        return self.normalize != "row"

    @property
    def differentiates_norms(self) -> bool:
        """Whether the gradient has terms from the norms, for which the tiles sum h."""
        return self.normalize != "none" and not self.detach_norms


class Scales(NamedTuple):
    """alpha of both relation matrices (B, N), None for ``"none"``; the student's M = Q^T Q (B, C, C) for ``"row"``.

    M is None where there are no more pixels than channels: then ``gradient_of`` takes the smaller G instead.
    """

    student: Tensor | None
    teacher: Tensor | None
    moment: Tensor | None


class Pixels(NamedTuple):
    """Some pixels: features (B, n, C_s), (B, n, C_t), and alpha (B, n) of both relation matrices, None for "none"."""

    student: Tensor
    teacher: Tensor
    alpha_s: Tensor | None
    alpha_t: Tensor | None


class TileSums(NamedTuple):
    """The result of the primitive ``relation_tiles``.

    loss: (B,) sums of rho(D_ij) over all pairs.
    U: (B, N, C) sums over j of K_ij q_j, K_ij = P_ij alpha_i beta_j + P_ji alpha_j beta_i, P = rho'(D).
    h: (B, N) sums over j of P_ij A_ij, and for cosine also of P_ji A_ji.
    U and h are None without ``need_grad``; h is also None unless ``Relation.differentiates_norms``.

    With ``Relation.rectify``, P_ij = 0 where the student's A_ij <= 0.
    """

    loss: Tensor
    U: Tensor | None
    h: Tensor | None


# Turns a sum over this process's pixels into the sum over all pixels: identity, or a sum over ranks (distributed.py).
Total = Callable[[Tensor], Tensor]


def identity(total: Tensor) -> Tensor:
    """The ``Total`` of a single process."""
    return total


def alone(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The ``Ranks.each`` of a single process."""
    yield tensors


class Ranks(NamedTuple):
    """How the formulas reach the pixels of all ranks. By default, this process has all of them.

    total: turns a sum over this process's pixels into the sum over all pixels.
    each: yields the given tensors (B, n, ...) of every rank, this process's first.
    pixels: N, if it is not that of the given features.
    """

    total: Total = identity
    each: Callable[..., Iterator[tuple[Tensor, ...]]] = alone
    pixels: int | None = None

    def count(self, features: Tensor) -> int:
        """Return N, given this process's features (B, n, C)."""
        return self.pixels or features.shape[1]


ALONE = Ranks()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that stores a gradient until backward scales it.

    float32 for float16: the gradient of a mean over N^2 pairs would underflow before the loss scale is applied.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64. Apple's GPUs, Intel's Arc and some other accelerators do not."""
    return device.type in ("cpu", "cuda", "meta") or (device.type != "mps" and _multiplies_float64(device))


@functools.cache
def _multiplies_float64(device: torch.device) -> bool:
    try:
        ones = torch.ones(2, 2, dtype=torch.float64, device=device)
        return (ones @ ones).sum().item() == 8
    except (RuntimeError, TypeError):
        return False


def matmul_precision(on_cpu: bool = False) -> str:
    """Return torch's float32 matmul precision on NVIDIA GPUs or CPUs: "highest", "high" (TF32) or "medium" (bfloat16).

    Settings for a device, of ``torch.backends``, count more than ``torch.set_float32_matmul_precision``, as in torch.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # some devices have another setting
        precision = "other"
    if precision == "highest":
        return precision
    of_device = (torch.backends.mkldnn if on_cpu else torch.backends.cuda).matmul.fp32_precision
    if of_device == "tf32":
        return "medium" if precision == "medium" else "high"
    return "medium" if of_device == "bf16" else "highest"


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, which would round the products of the formulas to 16 bits."""
    kind = device.type
    # not torch.amp.is_autocast_available, which torch.compile of PyTorch 2.11 cannot trace
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def distance_value(difference: Tensor, relation: Relation) -> Tensor:
    """Return rho(D), elementwise."""
    if relation.distance == "l1":
        return difference.abs()
    if relation.distance == "l2":
        return difference.square()
    size, delta = difference.abs(), relation.delta
    return torch.where(size <= delta, 0.5 * difference.square(), delta * (size - 0.5 * delta))


def distance_grad(difference: Tensor, relation: Relation) -> Tensor:
    """Return rho'(D), elementwise; 0 at a tie of the l1 distance, as in torch."""
    if relation.distance == "l1":
        return difference.sign()
    if relation.distance == "l2":
        return 2 * difference
    return difference.clamp(-relation.delta, relation.delta)


def power_of_two_scale(moment: Tensor) -> Tensor:
    """Return the largest power of two below the root of M's largest element (B, 1, 1): about sqrt(N) |feature|.

    Divided by its square, products with M have the magnitude of the features. Without it, features of 1e18 overflow
    in float32 and features of 1e-18 underflow.
    """
    largest = moment.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(moment.dtype).tiny)
    return (largest.log2() / 2).floor().exp2().view(-1, 1, 1)


MOMENT_BLOCK = 64  # channels of a block of moment_of
PART_ELEMENTS = 2**19  # of features in float64 that a CPU computes together: see bench/NOTES.md
ALL = slice(None)  # the only part of an image that is not divided


def parts_of(*features: Tensor) -> list[slice]:
    """Return the pixels of features (B, N, C) that are computed together: on a CPU, as many as its caches hold."""
    pixels = features[0].shape[1]
    size = max(MOMENT_BLOCK, PART_ELEMENTS // max(1, sum(len(x) * x.shape[2] for x in features)))
    if features[0].device.type != "cpu" or pixels <= size:
        return [ALL]
    return [slice(begin, begin + size) for begin in range(0, pixels, size)]


def at(part: slice, x: Tensor) -> Tensor:
    """Return x (B, N, ...) at some of its pixels; x itself if these are all."""
    return x if part is ALL else x[:, part]


def moment_of(features: Tensor) -> Tensor:
    """Return M = Q^T Q (B, C, C) of features (B, N, C)."""
    _, pixels, channels = features.shape
    if features.device.type != "cpu" or min(pixels, channels) < 2 * MOMENT_BLOCK:
        return features.mT @ features
    # M is symmetric: the blocks on and above its diagonal take 0.6 to 0.8 of the time
    moment = features.new_empty(len(features), channels, channels)
    for begin in range(0, channels, MOMENT_BLOCK):
        rows, right = slice(begin, begin + MOMENT_BLOCK), slice(begin + MOMENT_BLOCK, None)
        torch.bmm(features[..., rows].mT, features[..., begin:], out=moment[:, rows, begin:])
        moment[:, right, rows] = moment[:, rows, right].mT
    return moment


def inverse(norm: Tensor, relation: Relation) -> Tensor:
    """Return alpha = 1 / norm: 0 for a zero-norm pixel, NaN if the norm is NaN or overflows."""
    return torch.where(norm <= relation.eps, 0, norm.reciprocal() + 0 * norm)


def row_scales(
    features: Tensor, relation: Relation, dtype: torch.dtype, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor | None]:
    """Return alpha (B, N) for ``"row"`` and M = Q^T Q (B, C, C) of features (B, N, C), in ``dtype``.

    The row norm needs no N x N array: ||G_i,:||^2 = q_i^T M q_i. With the mean m of the features this equals
    q_i^T M' q_i + N (m . q_i)^2, where M' is the moment of q - m. Both terms are non-negative, so pixels that do not
    share a large common mean keep the digits that would cancel in q_i^T M q_i.

    With no more pixels than channels, G is no larger than M: the norms are those of its rows, and M is None.
    """
    count, total = ranks.count(features), ranks.total
    if count <= features.shape[2]:
        features, size = _of_magnitude_one(features.to(dtype), ranks)
        square = features.new_zeros(features.shape[:2])
        for (columns,) in ranks.each(features):
            square += (features @ columns.mT).square().sum(-1)
        return inverse(square.sqrt() * size.view(-1, 1).square(), relation), None
    parts = [at(part, features) for part in parts_of(features)]
    if len(parts) == 1:
        parts = [features := features.to(dtype)]  # once
    mean = total(features.sum(1, keepdim=True, dtype=dtype)) / count
    moment = total(functools.reduce(Tensor.add_, (moment_of(part.to(dtype) - mean) for part in parts)))
    whole = torch.baddbmm(moment, mean.mT, mean, alpha=count)
    size = power_of_two_scale(whole)
    # the product has the layout of the features: reading across strides costs as much as the product itself
    by_channel = features.stride(-1) > features.stride(-2)
    moment, mean = moment / size.square(), mean.mT / size

    def squares(part: Tensor) -> Tensor:
        q = part.to(dtype)
        product = (moment @ q.mT).mT if by_channel else q @ moment
        return product.mul_(q).sum(-1).add_((q @ mean).squeeze(-1).square_(), alpha=count)

    # rounding can make a square slightly negative
    square = torch.cat([squares(part) for part in parts], 1).clamp_min_(0)
    return inverse(square.sqrt_() * size.squeeze(-1), relation), whole


def _of_magnitude_one(features: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return features (B, N, C) divided by a power of two (B, 1, 1), which is returned too.

    It is about the largest element: the sums over G_ij neither overflow nor underflow.
    """
    largest = ranks.total(features.abs().amax((1, 2), keepdim=True)).clamp_min(torch.finfo(features.dtype).tiny)
    size = largest.log2().floor().exp2()
    return features / size, size


def scales_of(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Scales:
    """Return the scales of both relation matrices of raw features (B, N, C_s), (B, N, C_t), in ``dtype``."""
    if relation.normalize == "none":
        return Scales(None, None, None)
    # TF32 and bfloat16 products are too coarse for scales: use float64 where torch would use them for float32
    coarse = matmul_precision(student.device.type == "cpu") != "highest" and has_float64(student.device)
    exact = torch.float64 if coarse else dtype

    def scale_and_moment(features: Tensor) -> tuple[Tensor, Tensor | None]:
        if relation.normalize == "row":
            return row_scales(features, relation, exact, ranks)
        parts = parts_of(features)
        square = torch.cat([at(part, features).to(exact).square().sum(-1) for part in parts], 1)
        return inverse(square.sqrt_(), relation), None

    alpha_s, moment = scale_and_moment(student)
    alpha_t, _ = scale_and_moment(teacher)
    return Scales(*(None if scale is None else scale.to(dtype) for scale in (alpha_s, alpha_t, moment)))


def gradient_of(
    student: Tensor,
    tiles: TileSums,
    scales: Scales,
    relation: Relation,
    ranks: Ranks = ALONE,
    pairs: int | None = None,
) -> Tensor:
    """Return dL/dQ (B, N, C) of the mean over all pairs, with the student's strides, in ``gradient_dtype``.

    Overwrites ``tiles.U``, and returns it where dtype and strides fit.

    With the number of pairs n, by default N^2, n dL/dQ is U plus the terms from the scales' dependence on Q; with
    w_i = h_i alpha_i^2:

        none      U_i
        cosine    U_i - w_i q_i
        row       U_i - w_i M q_i - M_w q_i,  M = Q^T Q,  M_w = Q^T diag(w) Q
                  = U_i - sum_j (w_i + w_j) G_ij q_j

    and just U_i if the norms are constants (``Relation.detach_norms``).
    A zero-norm pixel has alpha = 0, hence w = 0: no gradient flows through its normalisation.
    """
    scale = 1 / (pairs or ranks.count(student) ** 2)
    result, h, alpha, moment = tiles.U, tiles.h, scales.student, scales.moment
    assert result is not None, "tiles without a gradient"
    if alpha is None or h is None:
        result.mul_(scale)
    else:
        features = student.to(result.dtype)
        if relation.normalize == "cosine":
            result.sub_((h * alpha.square()).unsqueeze(-1) * features).mul_(scale)
        elif moment is None:  # w_i is multiplied by the square of the features' scale, G divided by it
            scaled, size = _of_magnitude_one(features, ranks)
            w = (h * (alpha * size.squeeze(-1)).square()).unsqueeze(-1)
            for columns, column_w in ranks.each(scaled, w):
                result.baddbmm_((scaled @ columns.mT).mul_(w + column_w.mT), columns * size, alpha=-1)
            result.mul_(scale)
        else:  # w_i is multiplied by the square of M's scale, M divided by it
            size = power_of_two_scale(moment)
            weighted = (h * (alpha * size.squeeze(-1)).square()).unsqueeze(-1) * features
            moment, weighted_moment = (x / size.square() for x in (moment, ranks.total(weighted.mT @ features)))
            result.mT.baddbmm_(moment.to(result.dtype), weighted.mT, beta=scale, alpha=-scale)
            result.mT.baddbmm_(weighted_moment, features.mT, alpha=-scale)
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype))
    if gradient.dtype == result.dtype and gradient.stride() == result.stride():
        return result
    return gradient.copy_(result)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Return losses (B,) for ``reduction`` "none", otherwise their "mean" or "sum" ()."""
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def loss_and_gradient(
    relation_tiles: Callable[..., TileSums],
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    need_grad: bool,
    scale_dtype: torch.dtype | None = None,
    pairs: int | None = None,
    images_at_once: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,), and with ``need_grad`` its gradient (B, N, C_s).

    Args:
        relation_tiles: the primitive of a backend.
        student, teacher: raw features (B, N, C_s), (B, N, C_t).
        scale_dtype: the dtype of the scales, if it is not the accumulator's.
        pairs: the number of pairs that the primitive sums over, if it is not N^2.
        images_at_once: how many images to compute together, at most; None: all.
    """
    if images_at_once is not None and images_at_once < len(student):
        results = [
            loss_and_gradient(relation_tiles, *group, relation, need_grad, scale_dtype, pairs)
            for group in zip(student.split(images_at_once), teacher.split(images_at_once))
        ]
        losses, gradients = zip(*results)
        if not need_grad:
            return torch.cat(losses), None
        gradient = torch.empty_like(student, dtype=gradients[0].dtype)  # with the strides of the student's features
        return torch.cat(losses), torch.cat(gradients, out=gradient)
    dtype = accumulator(student.dtype)
    scales = scales_of(student, teacher, relation, scale_dtype or dtype)
    tiles = relation_tiles(student, teacher, scales, relation, need_grad)
    loss = (tiles.loss / (pairs or student.shape[1] ** 2)).to(dtype)
    return loss, gradient_of(student, tiles, scales, relation, pairs=pairs) if need_grad else None
