"""Size and cost of a network, counted without running it."""

import copy
from itertools import chain
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..arguments import check_choice
from ..taps import remove_hooks

TransposedCount = Literal["output", "input"]


def count_parameters(net: nn.Module) -> int:
    """Return the number of learnable values of a network."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(
    net: nn.Module, input_shape: tuple[int, ...] = (1, 3, 256, 256), transposed: TransposedCount = "output"
) -> int:
    """Count the multiply-accumulates of the convolutions and matrix products in one forward pass.

    The pass runs on a copy on the device "meta": it needs no time and no memory, and does not touch the network's
    hooks, buffers and mode.

    Args:
        input_shape: of the input, (B, C, H, W).
        transposed: how the kernel of a transposed convolution is counted. "output": once per output pixel, as in
            published numbers (at 256 x 256 and ngf 64: resnet_9blocks 56.80 G, unet_256 18.14 G). "input": once per
            input pixel, which is the number of operations that are executed.

    Raises:
        ValueError: an unknown `transposed`.
    """
    check_choice("transposed", transposed, get_args(TransposedCount))

    def convolution_flops(
        images: torch.Size, weight: torch.Size, *options: Any, out_shape: torch.Size, **keywords: Any
    ) -> int:
        is_transposed = options[4]  # after bias, stride, padding and dilation
        grid = images if is_transposed and transposed == "input" else out_shape
        return 2 * grid[0] * prod(grid[2:]) * prod(weight)

    # deepcopy takes what its memo already holds as the copy: no weight is duplicated
    tensors = chain(net.parameters(), net.buffers())
    on_meta = copy.deepcopy(net, {id(t): torch.empty_like(t, device="meta") for t in tensors}).eval()
    remove_hooks(on_meta)
    dtype = next((p.dtype for p in on_meta.parameters()), None)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: convolution_flops})
    with torch.no_grad(), counter:
        on_meta(torch.empty(input_shape, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2
