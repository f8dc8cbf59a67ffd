"""What the tests of emulated CUDA kernels share: features, and how a library receives them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def extent(tensor: Tensor) -> int:
    """Return the number of elements that a tensor spans in memory."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1


def draw(
    dtype: torch.dtype,
    batch: int,
    pixels: int,
    channels: tuple[int, int],
    layout: str = "nlc",
    values: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Return random features (B, N, C) of student and teacher in a layout, with values of another dtype.

    Products of bfloat16 values are exact in float32, so that the kernels' Gram matrices are exact except for the sum.
    """
    pair = ((torch.randn(batch, pixels, count) + 0.5).to(values).to(dtype) for count in channels)
    student, teacher = (x.mT.contiguous().mT if layout == "nchw" else x for x in pair)
    return student, teacher
