"""Run a generator on images of any size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..arguments import check_type
from .networks import image_channels, size_multiple

SMALLEST = 8  # pixels a side: of less a ResNet's encoder makes a single pixel, which instance norm cannot take
MODES = {1: "L", 3: "RGB"}


@torch.no_grad()
def translate(net: nn.Module, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] of any size -> the generator's output (B, C', H, W) on the CPU.

    Raises:
        TypeError: these are no float images, or the network was not made by ``define_generator``.
        ValueError: they are of another shape, or empty.
    """
    channels = image_channels(net)[0]
    check_type("images", images, Tensor, f"a tensor (B, {channels}, H, W)")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}: expected floats in [-1, 1], such as images / 127.5 - 1")
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise ValueError(f"images have the shape {tuple(images.shape)}: this generator takes (B, {channels}, H, W)")
    height, width = images.shape[2:]
    padded = pad_images(images, size_multiple(net))
    return net(padded.to(next(net.parameters()).device))[:, :, :height, :width].cpu()


def pad_images(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W), reflected at their right and lower edges up to a multiple in both sizes."""
    rows, columns = (_reflected(length, max(SMALLEST, -length % multiple + length)) for length in images.shape[2:])
    return images[:, :, rows][:, :, :, columns]


def _reflected(length: int, wanted: int) -> Tensor:
    """Indices 0 .. length-1, and on by reflection, back and forth where that is not enough, up to `wanted`."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(wanted) % period
    return torch.minimum(position, period - position) if length > 1 else torch.zeros(wanted, dtype=torch.int64)


def pillow_modes(net: nn.Module) -> tuple[str, str]:
    """Pillow's modes of a generator's input and output."""
    channels = image_channels(net)
    if not set(channels) <= set(MODES):
        raise ValueError(f"this generator goes from {channels[0]} to {channels[1]} channels; image files have 1 or 3")
    return MODES[channels[0]], MODES[channels[1]]


def image_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image as (C, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
