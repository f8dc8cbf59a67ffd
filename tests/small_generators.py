"""Small generators, and what the tests of their files share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srpkd.models.checkpoints import CheckpointError, load_weights
from srpkd.models.networks import GeneratorSpec, define_generator

SMALL = GeneratorSpec("resnet_2blocks", ngf=2)
# that a file of weights was not read, and how a message says it
errors_of_the_system = pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (RuntimeError("can't allocate memory"), "it needs more memory than is free, or is damaged"),
    ],
)


def make(spec: GeneratorSpec = SMALL) -> nn.Module:
    """Return a generator whose buffers differ from those of a new one."""
    torch.manual_seed(0)
    net = define_generator(**asdict(spec))
    for buffer in net.buffers():
        buffer.add_(3)
    return net


def with_old_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights with the unused statistics of instance norms that old versions of torch saved."""
    state = net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            state[f"{name}.running_mean"] = torch.zeros(module.num_features)
            state[f"{name}.running_var"] = torch.ones(module.num_features)
    return state


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The weights are the same, in the same order."""
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def refusal(path: str | Path, function: Callable[..., Any] = load_weights, *arguments: Any) -> str:
    """Return the error message for a file; it must name the file."""
    with pytest.raises(CheckpointError) as caught:
        function(path, *arguments)
    message = str(caught.value)
    assert str(path) in message
    assert "weights_only" not in message  # torch's advice to disable the protection
    return message
