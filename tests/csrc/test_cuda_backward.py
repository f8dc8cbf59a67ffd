"""The kernel of backward, on an emulated GPU: the gradient times the upstream gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from emulated_kernels import EmulatedGpu
from torch import Tensor

RESULTS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def gpu(emulated_gpu: Callable[..., EmulatedGpu]) -> EmulatedGpu:
    return emulated_gpu("sm_80")


def multiply(gpu: EmulatedGpu, gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, launches: int = 1) -> Tensor:
    """Return the product. launches: 0 if PyTorch multiplies."""
    result = torch.ops.srpkd.relation_loss_backward(gradient, grad_loss, dtype)
    assert len(gpu.launches) == launches
    assert result.dtype == dtype and result.shape == gradient.shape
    return result


@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 300, 8), (5, 1, 3)], ids=str)
def test_product_is_rounded_once(
    gpu: EmulatedGpu, shape: tuple[int, ...], stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Bit-equal to the product in float32 rounded to the dtype of the result, for any number of elements."""
    gradient = torch.randn(shape).to(stored)
    images = shape[0]
    expanded = torch.tensor(0.3).expand(images)
    for grad_loss in (torch.tensor(0.7), torch.rand(images), torch.rand(images, 2)[:, 1], expanded):
        expected = (gradient.float() * grad_loss.view(-1, 1, 1)).to(dtype)
        assert torch.equal(multiply(gpu, gradient, grad_loss, dtype), expected)


def test_loss_scaling_of_float16(gpu: EmulatedGpu) -> None:
    """A float32 gradient that float16 does not represent, times the scale; overflow is infinite, NaN stays NaN."""
    gradient = torch.tensor([[[1e-9, -3e-8, 1.0, math.nan, math.inf, 0.0]]])
    actual = multiply(gpu, gradient, torch.tensor(2.0**17), torch.float16)
    expected = (gradient * 2.0**17).half()
    assert actual[0, 0, 0] > 0 and actual[0, 0, 2] == math.inf
    assert torch.equal(actual.nan_to_num(5), expected.nan_to_num(5)) and actual[0, 0, 3].isnan()


def test_images_that_are_not_outermost_in_memory(gpu: EmulatedGpu) -> None:
    """Each element takes the factor of its image: the kernel only finds it if the images follow each other."""
    gradient = torch.randn(5, 8, 3).permute(2, 0, 1)
    for grad_loss, launches in ((torch.tensor(0.7), 1), (torch.rand(3), 0)):
        actual = multiply(gpu, gradient, grad_loss, torch.float32, launches)
        assert torch.equal(actual, gradient * grad_loss.view(-1, 1, 1)) and actual.stride() == gradient.stride()


def test_what_pytorch_multiplies(gpu: EmulatedGpu) -> None:
    """Gradients in memory that the kernel would read or write in another order, misaligned ones, and other dtypes."""
    flat, grad_loss = torch.randn(3 * 5 * 8 + 1), torch.rand(3)
    gradient = flat[:-1].view(3, 5, 8)
    views = gradient[..., ::2], gradient[:, :1], gradient[:1].expand(3, 5, 8), flat[1:].view(3, 5, 8)
    for given, factor in itertools.product(views, (grad_loss, torch.tensor(0.7))):
        actual = multiply(gpu, given, factor, torch.float32, launches=0)
        assert torch.equal(actual, given * factor.view(-1, 1, 1))
    for given, factor in ((gradient.double(), grad_loss), (gradient, grad_loss.double()), (gradient.half(), grad_loss)):
        actual = multiply(gpu, given, factor, torch.float32, launches=0)
        torch.testing.assert_close(actual, (given.double() * factor.view(-1, 1, 1)).float())
    actual = multiply(gpu, gradient, grad_loss, torch.float64, launches=0)
    torch.testing.assert_close(actual, gradient.double() * grad_loss.view(-1, 1, 1), check_dtype=False)
    assert multiply(gpu, gradient[:0], grad_loss[:0], torch.float32, launches=0).numel() == 0
    actual = multiply(gpu, gradient, grad_loss[None], torch.float32, launches=0)  # of two dimensions
    assert torch.equal(actual, gradient * grad_loss.view(-1, 1, 1))
    with pytest.raises(RuntimeError, match="must match the size"):
        multiply(gpu, gradient, grad_loss[:2], torch.float32)
