"""Options of networks so small that a training step takes milliseconds, and images for them."""

import torch
from torch import Tensor

SIZE = 16  # side of an image in pixels
SMALL = {
    "dataroot": ":synthetic:",
    "netG": "resnet_1blocks",
    "norm": "instance",
    "no_dropout": True,
    "netD": "n_layers",
    "n_layers_D": 1,
    "synthetic_size": SIZE,
    "batch_size": 2,
    "device": "cpu",
}


def images() -> dict[str, Tensor]:
    """Return a batch of random images."""
    return {side: torch.rand(2, 3, SIZE, SIZE) * 2 - 1 for side in "AB"}
