"""Activations that are in place only without autograd."""

import copy

import pytest
import torch
from torch import nn

from srpkd.models.activations import LeakyReLU, ReLU
from srpkd.models.networks import define_discriminator, define_generator

KINDS = {ReLU: nn.ReLU(inplace=True), LeakyReLU: nn.LeakyReLU(0.2, inplace=True)}


def nodes(output: torch.Tensor) -> set[str]:
    """Names of the nodes of an autograd graph."""
    found, names = [output.grad_fn], set()
    while found:
        node = found.pop()
        if node is not None:
            names.add(node.name())
            found += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_only_without_autograd(kind):
    module = kind() if kind is ReLU else kind(0.2)
    x = torch.randn(50)
    expected = KINDS[kind](x.clone())
    before = x.clone()
    assert torch.equal(module(x), expected) and torch.equal(x, before)
    with torch.no_grad():
        found = module(x)
    assert torch.equal(found, expected) and found.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "network",
    [
        lambda: define_generator("resnet_2blocks", ngf=4),
        lambda: define_discriminator("basic", 3, 4),
        lambda: define_discriminator("pixel", 3, 4),
    ],
    ids=["generator", "basic", "pixel"],
)
def test_gradients_have_the_bits_of_activations_in_place(network):
    """And the backward pass copies no base of a view, as that of an in-place operation on a view does."""
    ours = network()
    public = copy.deepcopy(ours)
    for parent in public.modules():
        for name, module in parent.named_children():
            if type(module) in KINDS:
                setattr(parent, name, copy.deepcopy(KINDS[type(module)]))
    images = torch.rand(2, 3, 32, 32)
    for net in (ours, public):
        output = net(images)
        assert any("CopySlices" in name for name in nodes(output)) == (net is public)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for a, b in zip(ours.parameters(), public.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
