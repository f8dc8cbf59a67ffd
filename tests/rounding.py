"""The errors that the formats of a computation predict, to which the errors of the kernels are compared.

The error of eager PyTorch in one run is a bad yardstick: the loss of a few hundred pixels may be right to the last bit
by luck, on a GPU eager multiplies in another format, and a gradient whose exact value is 0 has no relative error.
``predicted_errors`` simulates a kernel in float64 instead, with independent relative errors where a kernel rounds. Each
is uniform within a unit roundoff u, which is 1/2 ulp of 1: float32 2^-24, TF32 2^-11, bfloat16 2^-8, float16 2^-11.

- The products round float32 features to the format of the matmul precision; features of 16 bits are exact. A float32
  sum of C products adds about sqrt(C) 2^-24. Both change the features in the Gram matrices, not those in the scales.
- Tensor cores truncate a sum after every 8 products or more, which makes all sums too small by up to C / 8 units alike
  (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021).
- The scales have errors of a few float32 units.
- K_ij is rounded to the format of the features or of the products, for the product U = K Q. Equal K_ij have equal
  errors, which add up: with row and l1, those of a pixel of small norm are nearly alpha_i or -alpha_i.
- Where the student's A_ij changes its sign, rectify makes P_ij appear or disappear.
- The float32 sums over N pixels, U and h, have errors of about sqrt(N) 2^-24 of their values.
- The gradient is rounded to the features' dtype.

The signs of l1 that flip near ties follow from the errors of the Gram matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from helpers import value_and_gradient
from torch import Tensor

from srpkd.kernels import Relation, Scales, TileSums
from srpkd.kernels.formulas import distance_value, gradient_of, matmul_precision, scales_of
from srpkd.kernels.strips import relation_grad

UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PRODUCT_UNITS = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of float32 features on a GPU
SCALE_UNITS = 4
DRAWS = 4


class Errors(NamedTuple):
    """Norms of the errors of the losses (B,), and of the gradient of their sum (B, N, C)."""

    loss: float
    gradient: float


def assert_rounding(
    loss: Tensor,
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    upstream: float = 1.0,
) -> None:
    """Losses (B,) and gradient (B, N, C) are within 3 times the errors that rounding predicts.

    upstream: the factor of the gradient.
    """
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    found = error_norms((loss, exact[1] if gradient is None else gradient.double() / upstream), exact)
    predicted = predicted_errors(student, teacher, relation)
    for name, value, limit in zip(Errors._fields, found, predicted):
        assert value <= 3 * limit, f"the error of the {name} is {value:.3g}, rounding predicts {limit:.3g}"


def predicted_errors(student: Tensor, teacher: Tensor, relation: Relation, precision: str | None = None) -> Errors:
    """Return the errors that rounding predicts for features (B, N, C): the largest of a few draws.

    precision: of float32 products; by default torch's matmul precision, which CPUs ignore.
    """
    dtype, on_gpu = student.dtype, student.device.type == "cuda"
    precision = precision or (matmul_precision() if on_gpu else "highest")
    product = PRODUCT_UNITS[precision] if dtype == torch.float32 else 0.0
    single = UNITS[dtype] if dtype == torch.float64 else UNITS[torch.float32]
    student, teacher = student.double(), teacher.double()
    exact = value_and_gradient(student, teacher, relation, "reference")
    generator = torch.Generator(student.device).manual_seed(0)

    def rounded(x: Tensor, unit: float) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x * (1 + unit * (2 * noise - 1))

    def rounded_alike(x: Tensor, unit: float) -> Tensor:
        scale = 1 + torch.rand((), generator=generator, device=x.device, dtype=x.dtype)
        mantissa, exponent = torch.frexp(x * scale)  # in [0.5, 1)
        return torch.ldexp((mantissa / unit).round() * unit, exponent) / scale

    def gram(x: Tensor) -> Tensor:
        truncated = single * x.shape[2] / 8 * torch.rand((), generator=generator, device=x.device).item() * on_gpu
        x = rounded(x, max(product, single * math.sqrt(x.shape[2])))
        return x @ x.mT * (1 - truncated)

    def simulated() -> Errors:
        scales = Scales(*(None if x is None else rounded(x, SCALE_UNITS * single) for x in exact_scales))
        ones = torch.ones_like(student[..., 0])
        alphas = [ones if alpha is None else alpha for alpha in scales[:2]]
        betas = alphas if relation.symmetric else [ones, ones]
        grams = gram(student), gram(teacher)
        A = [alpha[:, :, None] * G * beta[:, None] for G, alpha, beta in zip(grams, alphas, betas)]
        if relation.rectify:
            A = [a.relu() for a in A]
        D = A[0] - A[1]
        if relation.normalize == "cosine":
            D.diagonal(dim1=1, dim2=2).zero_()
        P = relation_grad(D, A[0], relation)
        K = alphas[0][:, :, None] * P * betas[0][:, None]
        K = rounded_alike(K + K.mT, max(UNITS[dtype], product))
        h = (P * A[0]).sum(2) * (2 if relation.symmetric else 1)
        pixels = student.shape[1]
        sums = single * (max(math.sqrt(pixels), pixels / 8) if on_gpu else math.sqrt(pixels))
        tiles = TileSums(
            rounded(distance_value(D, relation).mean((1, 2)), SCALE_UNITS * single),
            rounded(K @ rounded(student, product), sums),
            rounded(h, sums) if relation.differentiates_norms else None,
        )
        gradient = rounded(gradient_of(student, tiles, scales, relation), UNITS[dtype])
        return error_norms((tiles.loss, gradient), exact)

    exact_scales = scales_of(student, teacher, relation, torch.float64)
    draws = [simulated() for _ in range(DRAWS)]
    return Errors(*(max(values) for values in zip(*draws)))


def error_norms(actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Errors:
    """Return the norms of the errors of losses and gradient."""
    assert all(tensor.isfinite().all() for tensor in actual), "not finite"
    return Errors(*((one.detach().double() - other).norm().item() for one, other in zip(actual, exact)))
