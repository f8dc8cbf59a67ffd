"""Counts of parameters and multiply-accumulates."""

import pytest
import torch
from torch import nn

from srpkd.models.complexity import count_macs, count_parameters
from srpkd.models.networks import define_generator


def test_count_parameters():
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Linear(7, 11, bias=False))
    assert count_parameters(net) == (3 * 5 * 4 + 5) + (5 + 5) + 77
    net[2] = net[0]
    assert count_parameters(net) == 65 + 10  # a shared weight counts once


@pytest.mark.parametrize(
    ("netG", "norm", "output", "input_"),
    [
        ("resnet_9blocks", "instance", 56.80, 49.55),
        ("unet_256", "batch", 18.14, 6.05),
    ],
)
def test_published_macs(netG, norm, output, input_):
    with torch.device("meta"):
        net = define_generator(netG, norm=norm)
    assert round(count_macs(net) / 1e9, 2) == output
    assert round(count_macs(net, transposed="input") / 1e9, 2) == input_


@pytest.mark.parametrize("antialias", ["down", "up", "both"])
def test_macs_of_anti_aliased_generators(antialias):
    """The difference from the plain ResNet: convolutions on a larger grid, and the filters."""

    def macs(antialias, transposed="output"):
        with torch.device("meta"):
            return count_macs(define_generator(antialias=antialias), transposed=transposed)

    down, up = antialias in ("down", "both"), antialias in ("up", "both")
    large, middle, small = 256**2, 128**2, 64**2  # pixels
    # before a Downsample, convolutions 64 -> 128 and 128 -> 256 run on the large and middle grid
    convolutions = 9 * (64 * 128 * (large - middle) + 128 * 256 * (middle - small))
    down_filters = 9 * (128 * middle + 256 * small)
    # an Upsample filters a padded image, with one pixel more at each edge
    up_filters = 16 * (256 * 130**2 + 128 * 258**2)
    expected = down * (convolutions + down_filters) + up * up_filters
    assert macs(antialias) - macs("none") == expected
    # convolutions after an Upsample are not transposed; the filters of an Upsample are
    transposed = 9 * (256 * 128 * (middle - small) + 128 * 64 * (large - middle))
    up_filters = 16 * (256 * 66**2 + 128 * 130**2)
    expected = down * (convolutions + down_filters) + up * (transposed + up_filters)
    assert macs(antialias, "input") - macs("none", "input") == expected


@pytest.mark.parametrize("transposed", ["output", "input"])
def test_macs_by_hand(transposed):
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # (B, 6, 5, 6) from 9 x 12
        nn.ConvTranspose2d(6, 8, (2, 3), stride=(2, 3), groups=2),  # (B, 8, 10, 18)
        nn.Conv2d(8, 1, 1),
        nn.Linear(18, 7),
    )
    grid = 10 * 18 if transposed == "output" else 5 * 6
    per_image = 5 * 6 * 6 * (4 // 2) * 9 + grid * 6 * (8 // 2) * 6 + 10 * 18 * 8 + 10 * 18 * 7
    assert count_macs(net, (2, 4, 9, 12), transposed) == 2 * per_image


def test_a_module_that_runs_twice_counts_twice():
    conv = nn.Conv2d(2, 2, 1)
    assert count_macs(nn.Sequential(conv, nn.ReLU(), conv), (1, 2, 3, 3)) == 2 * 9 * 4


def test_network_is_unchanged():
    net = define_generator("unet_16", ngf=2, norm="batch", dropout=True)
    net.model.model[1].eval()
    fired = []
    net.model.model[1].register_forward_hook(lambda *_: fired.append(1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) for module in net.modules()]
    count_macs(net, (1, 3, 16, 16))
    assert not fired
    assert [module.training for module in net.modules()] == modes
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(p.is_meta for p in net.parameters())


def test_batch_norm_of_a_single_value_is_counted():
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))  # cannot run in training mode
    assert count_macs(net, (1, 3, 2, 2)) == 48


def test_half_precision_counts_the_same():
    net = define_generator("resnet_1blocks", ngf=2)
    assert count_macs(net.bfloat16(), (1, 3, 16, 16)) == count_macs(net.float(), (1, 3, 16, 16))
