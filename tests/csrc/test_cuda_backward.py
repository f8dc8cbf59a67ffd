"""The kernel of backward, emulated on the CPU: the gradient times the upstream gradient."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from emulated_kernels import pointer
from torch import Tensor

RESULTS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    result = compile_emulation("backward.cpp")
    result.backward.restype = ctypes.c_char_p
    return result


def multiply(library: ctypes.CDLL, gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product, with guard elements around the result that must stay as they are."""
    guarded = torch.full((gradient.numel() + 32,), 77.0, dtype=dtype)
    first = -guarded.data_ptr() % 16 // guarded.element_size() + 16 // guarded.element_size()
    result = guarded[first : first + gradient.numel()]
    single = grad_loss.numel() == 1
    message = library.backward(
        pointer(gradient), gradient.dtype == torch.bfloat16, RESULTS.index(dtype), pointer(result),
        pointer(grad_loss), ctypes.c_int64(gradient.numel()),
        ctypes.c_int64(gradient.numel() if single else gradient.stride(0)),
        ctypes.c_int64(0 if single else grad_loss.stride(0)),
    )  # fmt: skip
    assert message == b"", message.decode()
    assert (guarded[:first] == 77).all() and (guarded[first + gradient.numel() :] == 77).all()
    return result.view_as(gradient)


@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 300, 8), (5, 1, 3)], ids=str)
def test_product_is_rounded_once(
    library: ctypes.CDLL, shape: tuple[int, ...], stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Bit-equal to the product in float32 rounded to the dtype of the result, for any number of elements."""
    gradient = torch.randn(shape).to(stored)
    images = shape[0]
    expanded = torch.tensor(0.3).expand(images)
    for grad_loss in (torch.tensor(0.7), torch.rand(images), torch.rand(images, 2)[:, 1], expanded):
        expected = (gradient.float() * grad_loss.view(-1, 1, 1)).to(dtype)
        assert torch.equal(multiply(library, gradient, grad_loss, dtype), expected)


def test_loss_scaling_of_float16(library: ctypes.CDLL) -> None:
    """A float32 gradient that float16 does not represent, times the scale; overflow is infinite, NaN stays NaN."""
    gradient = torch.tensor([[[1e-9, -3e-8, 1.0, math.nan, math.inf, 0.0]]])
    actual = multiply(library, gradient, torch.tensor(2.0**17), torch.float16)
    expected = (gradient * 2.0**17).half()
    assert actual[0, 0, 0] > 0 and actual[0, 0, 2] == math.inf
    assert torch.equal(actual.nan_to_num(5), expected.nan_to_num(5)) and actual[0, 0, 3].isnan()
