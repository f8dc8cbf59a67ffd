"""A network with layers to tap, and ways to copy a tapped one."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import torch
from torch import nn


def network(width: int) -> nn.Sequential:
    """Named modules: encoder (encoder.conv, encoder.norm, encoder.act, the last in place) and decoder."""
    encoder = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3, stride=2, padding=1), norm=nn.InstanceNorm2d(width), act=nn.ReLU(inplace=True)
        )
    )
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=nn.Conv2d(width, 3, 1)))


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) for each in module.modules())


def saved_and_loaded(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": saved_and_loaded}
