"""Levels of decoded images (C, H, W): uint8 in 0..255 for 8-bit images, float64 in [0, 1] for deeper ones; palettes."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_levels(levels: Tensor) -> Tensor:
    """Return levels as float64 in [0, 1]."""
    return levels.double() if levels.is_floating_point() else levels.double() / 255


def levels_to_255(levels: Tensor) -> Tensor:
    """Return levels on a scale of 0 to 255, not rounded."""
    return levels * 255 if levels.is_floating_point() else levels


def byte_levels(levels: Tensor) -> Tensor:
    """Return levels as uint8; those of deeper images are rounded."""
    return (levels * 255).round().to(torch.uint8) if levels.is_floating_point() else levels


def nearest_colour(images: Tensor, palette: Tensor) -> Tensor:
    """Return the index of each pixel's nearest palette colour, (B, H, W) int64.

    images: (B, 3, H, W). palette: (K, 3), on the same scale.
    """
    images, palette = images.double(), palette.double()
    # the c that minimises |x - c|^2 maximises x . c - |c|^2 / 2
    scores = torch.einsum("kc,bchw->bkhw", palette, images) - palette.square().sum(1).view(-1, 1, 1) / 2
    return scores.argmax(1)
