"""Anti-aliased downsampling and upsampling of CUT's and FastCUT's generators (Zhang 2019).

Keys, padding and filters are those of the public code, https://github.com/taesungp/contrastive-unpaired-translation
(models/networks.py). A filter is a buffer and not learned; a file's filter replaces the one that is built here.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Antialias = Literal["none", "down", "up", "both"]


class Downsample(nn.Module):
    """Blur by a 3 x 3 binomial filter, then keep every second pixel: (B, C, H, W) -> (B, C, H/2, W/2), rounded up."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", _filters(channels, [1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class Upsample(nn.Module):
    """Interpolate by a 4 x 4 binomial filter, whose weights sum to 4: (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", 4 * _filters(channels, [1.0, 3.0, 3.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv_transpose2d(padded, self.filt, stride=2, padding=2, groups=x.shape[1])[:, :, 1:-1, 1:-1]


def _filters(channels: int, coefficients: list[float]) -> Tensor:
    """Return one separable filter per channel, (C, 1, K, K), whose weights sum to 1: exact powers of two apart."""
    row = torch.tensor(coefficients)
    filt = torch.outer(row, row)
    return (filt / filt.sum()).repeat(channels, 1, 1, 1)
