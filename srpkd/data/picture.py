"""Decoded images of any depth: 8-bit images are Pillow's, deeper ones are tensors.

All functions accept both. The 8-bit path is that of the public code, bit for bit. The *levels* of an image are its
pixels as a tensor (C, H, W): uint8 for an 8-bit image, float64 in [0, 1] for a deeper one.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# 8 bits per channel: Pillow's "RGB" or "L". More than 8 bits: (C, H, W) float64 in [0, 1], with C = 3 or 1.
Picture: TypeAlias = Image.Image | Tensor
PILLOW_MODES = {1: "L", 3: "RGB"}  # by the number of channels

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow
_MODES = {Image.Resampling.NEAREST: "nearest-exact", Image.Resampling.BICUBIC: "bicubic"}  # torch's names


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return (width, height)."""
    return (picture.shape[2], picture.shape[1]) if isinstance(picture, Tensor) else picture.size


def crop_columns(picture: Picture, left: int, right: int) -> Picture:
    """Return the pixels of a picture in columns left to right - 1."""
    if isinstance(picture, Tensor):
        return picture[:, :, left:right]
    return picture.crop((left, 0, right, picture.height))


def resize_picture(
    picture: Picture, width: int, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Picture:
    """Scale a picture, with antialiasing; `resample` is NEAREST or BICUBIC."""
    if isinstance(picture, Tensor):
        mode = _MODES[resample]
        scaled = F.interpolate(picture[None], (height, width), mode=mode, antialias=mode == "bicubic")[0]
        return scaled.clamp(0, 1)  # like Pillow, cut the overshoot of the bicubic filter
    return picture.resize((width, height), resample)


def with_channels(picture: Picture, channels: int) -> Picture:
    """Return a picture with 1 channel (luma) or 3 channels."""
    if not isinstance(picture, Tensor):
        return picture.convert(PILLOW_MODES[channels])
    if len(picture) == channels:
        return picture
    if channels == 3:
        return picture.expand(3, -1, -1)
    return torch.einsum("c,chw->hw", picture.new_tensor(_LUMA), picture)[None]


def picture_to_levels(picture: Picture) -> Tensor:
    """Return the levels of a picture, (C, H, W)."""
    if isinstance(picture, Tensor):
        return picture
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def image_to_tensor(picture: Picture) -> Tensor:
    """Convert an image to (C, H, W) float32 in [-1, 1]."""
    if isinstance(picture, Tensor):
        return (picture * 2 - 1).float()
    return picture_to_levels(picture).float() / 127.5 - 1


def tensor_to_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1], of any shape, to uint8: rounded, and clipped to the range."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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
