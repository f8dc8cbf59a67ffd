"""Pixels, channels and images of very different magnitudes: those of one must not set the accuracy of the others.

The error of a whole gradient does not show this, because the pixels with the smallest norms have the largest gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import cases, dtypes, features, value_and_gradient
from torch import Tensor

from srpkd.kernels import Relation

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize(("backend", "relation"), cases())
# of the relative errors of each loss, and of the gradient of each pixel, channel or image
LIMITS = {
    torch.float64: (1e-11, 1e-9),
    torch.float32: (1e-5, 2e-4),
    torch.bfloat16: (1e-5, 5e-2),
    torch.float16: (1e-5, 1e-2),
}


def check(
    backend: str,
    relation: Relation,
    device: torch.device,
    exponents: Callable[[Tensor], Tensor],
    dims: tuple[int, ...],
) -> None:
    """Compare with float64, the gradients along ``dims`` of (B, N, C) together.

    exponents: makes those of the powers of two from features.
    """

    def scaled(x: Tensor) -> Tensor:
        return x * 2.0 ** exponents(x).to(x.dtype)

    apart = None if relation.normalize == "none" else relation  # without normalisation, D has very different sizes
    for dtype in dtypes(backend, device):
        student, teacher = features(apart, dtype=dtype, device=device, change=scaled)
        exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
        largest = exact[1].abs().max().log2().ceil().item()
        upstream = 2.0 ** (15 - largest) if dtype == torch.float16 else 1.0  # float16 has few exponents
        loss, gradient = value_and_gradient(student, teacher, relation, backend, upstream)
        errors = (gradient.double() / upstream - exact[1]).norm(dim=dims) / exact[1].norm(dim=dims)
        limits = LIMITS[dtype]
        assert ((loss - exact[0]).abs() <= limits[0] * exact[0]).all(), f"{dtype}: {loss} instead of {exact[0]}"
        assert (errors <= limits[1]).all(), f"{dtype}: errors of the gradient {errors}"


@every_case
def test_a_pixel_of_small_norm(backend: str, relation: Relation, device: torch.device) -> None:
    """Its alpha is 2^17 times that of the others."""

    def exponents(x: Tensor) -> Tensor:
        result = torch.zeros(x.shape[1], 1)
        result[3] = -17
        return result

    check(backend, relation, device, exponents, (2,))


@every_case
def test_channels_of_any_magnitude(backend: str, relation: Relation, device: torch.device) -> None:
    check(backend, relation, device, lambda x: torch.linspace(-6, 0, x.shape[2]).round(), (0, 1))


@every_case
def test_images_of_any_magnitude(backend: str, relation: Relation, device: torch.device) -> None:
    def exponents(x: Tensor) -> Tensor:
        most = 4 if x.dtype == torch.float16 else 12  # the gradient may grow with the third power
        return torch.tensor([-most, most])[:, None, None]

    check(backend, relation, device, exponents, (1, 2))
