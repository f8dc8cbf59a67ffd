"""Generators and discriminators of CycleGAN and pix2pix, and what can be read off their weights.

The module tree, with it every state_dict key, and the forward pass are those of the public code,
https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix (models/networks.py): its checkpoints load here one to
one, and ours load there. The architectures are from Johnson et al. 2016 (ResNet), Ronneberger et al. 2015 and
Isola et al. 2017 (U-Net, PatchGAN) and Zhu et al. 2017 (CycleGAN).
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_number, check_whole

# With their own defaults these are the public code's: batch norm learns weights and tracks statistics,
# instance norm does neither, and so leaves the bias to the conv before it.
NORMS: dict[str, type[nn.Module]] = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}

INITS = {
    "normal": lambda weight, gain: nn.init.normal_(weight, 0.0, gain),
    "xavier": lambda weight, gain: nn.init.xavier_normal_(weight, gain),
    "kaiming": lambda weight, gain: nn.init.kaiming_normal_(weight, a=0, mode="fan_in"),
    "orthogonal": lambda weight, gain: nn.init.orthogonal_(weight, gain),
}


@dataclass(frozen=True)
class GeneratorSpec:
    """What a generator is made of: `define_generator(**asdict(spec))` builds it."""

    netG: str = "resnet_9blocks"
    input_nc: int = 3
    output_nc: int = 3
    ngf: int = 64
    norm: str = "instance"
    dropout: bool = False


def define_generator(
    netG: str = "resnet_9blocks",
    input_nc: int = 3,
    output_nc: int = 3,
    ngf: int = 64,
    norm: str = "instance",
    dropout: bool = False,
    *,
    init_type: str = "normal",
    init_gain: float = 0.02,
) -> nn.Module:
    """Build and initialise a generator, (B, input_nc, H, W) -> (B, output_nc, H, W) with values in [-1, 1].

    Args:
        netG: `resnet_<n>blocks` with n >= 1, or `unet_<size>` with a power of two size >= 16, which halves
            its input log2(size) times. H and W must be multiples of `size_multiple(net)`.
        input_nc, output_nc: channels of the images.
        ngf: channels of the first layer, any integer >= 1; every other width is a multiple of it.
        norm: "instance" or "batch".
        dropout: of 0.5, in every residual block or in the U-Net's middle levels, as in the public code.
        init_type, init_gain: see `init_weights`.

    Raises:
        TypeError: a width that is no integer.
        ValueError: an unknown netG, norm or init_type (the message names the nearest), or a width below 1.
    """
    _check_positive(input_nc=input_nc, output_nc=output_nc, ngf=ngf)
    netG = str(netG)  # what is no name is none of these
    shared = (input_nc, output_nc, ngf, _choose("norm", norm, NORMS), dropout)
    if match := re.fullmatch(r"resnet_([1-9]\d*)blocks", netG):
        net = ResnetGenerator(*shared, blocks=int(match[1]))
    elif (match := re.fullmatch(r"unet_([1-9]\d*)", netG)) and _is_unet_size(size := int(match[1])):
        net = UnetGenerator(*shared, num_downs=size.bit_length() - 1)
    else:
        expected = "'resnet_<n>blocks' with n >= 1, or 'unet_<size>' with a power of two size >= 16"
        names = ["resnet_9blocks", "resnet_6blocks", *(f"unet_{2**n}" for n in range(8, 3, -1))]
        raise _unknown("netG", netG, expected, names)
    return init_weights(net, init_type, init_gain)


def define_discriminator(
    netD: str = "basic",
    input_nc: int = 3,
    ndf: int = 64,
    n_layers: int = 3,
    norm: str = "instance",
    *,
    init_type: str = "normal",
    init_gain: float = 0.02,
) -> nn.Module:
    """Build and initialise a discriminator, (B, input_nc, H, W) -> (B, 1, H', W') with one logit per patch.

    Args:
        netD: "basic" (PatchGAN of three layers, which sees patches of 70 x 70), "n_layers" (PatchGAN of
            `n_layers` layers; the others do not read it), or "pixel" (1 x 1 convs, H' = H and W' = W).
        input_nc: channels of the image, or of both images where a pair is joined.
        ndf: channels of the first layer.
        norm: "instance" or "batch".
        init_type, init_gain: see `init_weights`.

    Raises:
        TypeError: a number that is no integer.
        ValueError: an unknown netD, norm or init_type (the message names the nearest), or a number below 1.
    """
    _check_positive(input_nc=input_nc, ndf=ndf, n_layers=n_layers)
    makers = {
        "basic": partial(PatchDiscriminator, n_layers=3),
        "n_layers": partial(PatchDiscriminator, n_layers=n_layers),
        "pixel": PixelDiscriminator,
    }
    net = _choose("netD", netD, makers)(input_nc, ndf, _choose("norm", norm, NORMS))
    return init_weights(net, init_type, init_gain)


def init_weights(net: nn.Module, init_type: str = "normal", init_gain: float = 0.02) -> nn.Module:
    """Initialise `net` in place and return it.

    Args:
        init_type: of conv and linear weights: "normal", "xavier", "kaiming" (reads no gain) or "orthogonal".
        init_gain: standard deviation of "normal", gain of the others. Batch norm weights are drawn from
            N(1, init_gain), and every bias is zero.

    Raises:
        TypeError: init_gain is no number.
        ValueError: an unknown init_type (the message names the nearest), or an init_gain below 0.
    """
    init = _choose("init_type", init_type, INITS)
    check_number("init_gain", init_gain, least=0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            init(module.weight, init_gain)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, init_gain)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return net


class ResnetGenerator(nn.Module):
    """Two halvings, `blocks` residual blocks at a quarter of the size, two doublings."""

    def __init__(
        self, input_nc: int, output_nc: int, ngf: int, norm: type[nn.Module], dropout: bool, *, blocks: int
    ) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        down = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, bias=bias)
        up = partial(nn.ConvTranspose2d, kernel_size=3, stride=2, padding=1, output_padding=1, bias=bias)

        def stage(conv: nn.Module) -> tuple[nn.Module, ...]:
            return conv, norm(conv.out_channels), nn.ReLU(inplace=True)

        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            *stage(nn.Conv2d(input_nc, ngf, 7, bias=bias)),
            *stage(down(ngf, 2 * ngf)),
            *stage(down(2 * ngf, 4 * ngf)),
            *(ResnetBlock(4 * ngf, norm, dropout) for _ in range(blocks)),
            *stage(up(4 * ngf, 2 * ngf)),
            *stage(up(2 * ngf, ngf)),
            nn.ReflectionPad2d(3),
            nn.Conv2d(ngf, output_nc, 7),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ResnetBlock(nn.Module):
    """x + conv_block(x), (B, C, H, W) -> (B, C, H, W), with no activation after the sum."""

    def __init__(self, channels: int, norm: type[nn.Module], dropout: bool) -> None:
        super().__init__()

        def conv() -> tuple[nn.Module, ...]:
            bias = norm is nn.InstanceNorm2d
            return nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels)

        drop = [nn.Dropout(0.5)] if dropout else []
        self.conv_block = nn.Sequential(*conv(), nn.ReLU(inplace=True), *drop, *conv())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class UnetGenerator(nn.Module):
    """`num_downs` halvings and as many doublings, each level joined to its mirror image by a skip."""

    def __init__(
        self, input_nc: int, output_nc: int, ngf: int, norm: type[nn.Module], dropout: bool, *, num_downs: int
    ) -> None:
        super().__init__()
        self.num_downs = num_downs
        widths = [ngf * min(2**level, 8) for level in range(num_downs)]
        block = None
        for level in range(num_downs - 1, 0, -1):
            middle = 4 <= level < num_downs - 1  # 8 ngf outside and inside, but not the innermost
            block = UnetBlock(widths[level - 1], widths[level], norm, dropout and middle, inside=block)
        outermost = nn.Sequential(
            nn.Conv2d(input_nc, ngf, 4, stride=2, padding=1, bias=norm is nn.InstanceNorm2d),
            block,
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * ngf, output_nc, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        # The public code's outermost level is a block too: its keys begin with model.model.
        self.model = nn.Sequential(OrderedDict(model=outermost))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UnetBlock(nn.Module):
    """A level of the U-Net and all inside it, (B, C, H, W) -> (B, 2 C, H, W): what came in, what came up."""

    def __init__(
        self, outer: int, inner: int, norm: type[nn.Module], dropout: bool, *, inside: nn.Module | None
    ) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        self.model = nn.Sequential(
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=bias),
            *([norm(inner), inside] if inside else []),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * inner if inside else inner, outer, 4, stride=2, padding=1, bias=bias),
            norm(outer),
            *([nn.Dropout(0.5)] if dropout else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        # As in the public code, the LeakyReLU worked in place and x is activated by now. Only a feature tap can
        # tell: to the output it makes no difference, as a ReLU follows.
        return torch.cat([x, out], 1)


class PatchDiscriminator(nn.Module):
    """PatchGAN: `n_layers` halvings, then two convs of stride 1."""

    def __init__(self, input_nc: int, ndf: int, norm: type[nn.Module], *, n_layers: int) -> None:
        super().__init__()
        widths = [ndf * min(2**layer, 8) for layer in range(n_layers + 1)]
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer in range(1, n_layers + 1):
            stride = 2 if layer < n_layers else 1
            bias = norm is nn.InstanceNorm2d
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=bias),
                norm(widths[layer]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PixelDiscriminator(nn.Module):
    """PatchGAN of 1 x 1 patches. As in the public code its last conv has a bias with instance norm only."""

    def __init__(self, input_nc: int, ndf: int, norm: type[nn.Module]) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        self.net = nn.Sequential(
            nn.Conv2d(input_nc, ndf, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norm(2 * ndf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def infer_generator(state_dict: Mapping[str, Tensor]) -> GeneratorSpec:
    """Read off keys and shapes which generator a state_dict, free of `module.` prefixes, belongs to.

    A U-Net's dropout leaves no trace in its weights and is given as False. Statistics with no weight beside
    them, which instance norms stored before torch 0.4, are not taken for a batch norm's.

    Raises:
        ValueError: these are not the weights of a generator, or not all of them.
    """

    def conv_shape(key: str) -> torch.Size:
        if key not in state_dict or state_dict[key].ndim != 4:
            raise ValueError(f"the weights of a generator, but incomplete: there is no convolution {key}")
        return state_dict[key].shape

    # Only a norm has a weight of one dimension, and of the two norms only batch norm has a weight.
    has_norm_weight = any(key.endswith(".weight") and w.ndim == 1 for key, w in state_dict.items())
    norm = "batch" if has_norm_weight else "instance"
    if "model.model.0.weight" in state_dict:
        ngf, input_nc, *_ = conv_shape("model.model.0.weight")
        output_nc = conv_shape("model.model.3.weight")[1]
        num_downs = sum(w.ndim == 4 for w in state_dict.values()) // 2  # two convs a level
        return GeneratorSpec(f"unet_{2**num_downs}", input_nc, output_nc, ngf, norm)
    if "model.10.conv_block.1.weight" in state_dict:
        ngf, input_nc, *_ = conv_shape("model.1.weight")
        blocks = len({key.split(".")[1] for key in state_dict if ".conv_block." in key})
        output_nc = conv_shape(f"model.{17 + blocks}.weight")[0]
        dropout = "model.10.conv_block.5.weight" not in state_dict  # it moves the second conv to 6
        return GeneratorSpec(f"resnet_{blocks}blocks", input_nc, output_nc, ngf, norm, dropout)
    hint = ""
    if {"model.0.weight", "net.0.weight"} & state_dict.keys():
        hint = "; these look like a discriminator's: give the generator's, such as latest_net_G.pth"
    raise ValueError(
        "not the weights of a generator: expected the keys of a ResNet (model.1.weight, "
        "model.10.conv_block.1.weight, ...) or of a U-Net (model.model.0.weight, ...), received "
        f"{', '.join(list(state_dict)[:4]) or 'none'}{', ...' if len(state_dict) > 4 else ''}{hint}"
    )


def default_tap(net: nn.Module) -> str:
    """Name of the module whose output is a generator's default relation layer: its encoder's end, activated.

    ResNet: `model.9`, (B, 4 ngf, H/4, W/4). U-Net: its encoder ends in a single pixel, with no relations,
    so it is the LeakyReLU behind the deepest level that is still 16 x 16 at the net's nominal size: stride 16
    in unet_256, 8 in unet_128 (2 in unet_16, where every level is smaller). Both lie before any dropout, no
    later activation overwrites them, and their name depends neither on ngf nor on the number of blocks.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    if isinstance(_generator(net), ResnetGenerator):
        return "model.9"
    level = max(net.num_downs - 4, 1)
    return "model.model.1" + ".model.3" * (level - 1) + ".model.0"


def size_multiple(net: nn.Module) -> int:
    """What height and width of a generator's input must be multiples of: ResNet 4, U-Net 2**num_downs.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    return 4 if isinstance(_generator(net), ResnetGenerator) else 2**net.num_downs


def image_channels(net: nn.Module) -> tuple[int, int]:
    """(input, output) channels of a generator.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    convs = [m for m in _generator(net).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return convs[0].in_channels, convs[-1].out_channels  # the outermost two, of a U-Net too


def normalise_by_image(net: nn.Module) -> nn.Module:
    """Make batch norms normalise every image by its own statistics, in place; gives `net`.

    It is what they do in training mode to a batch of one image, as pix2pix runs its generators, and here to each image
    of a batch of any size: instance norms with the batch norms' weights take their places. The running statistics go.
    """
    for parent in list(net.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                alone = nn.InstanceNorm2d(norm.num_features, norm.eps, affine=True, device="meta")
                alone.weight, alone.bias = norm.weight, norm.bias
                setattr(parent, name, alone.train(norm.training))
    return net


def _generator(net: nn.Module) -> nn.Module:
    if not isinstance(net, ResnetGenerator | UnetGenerator):
        raise TypeError(
            f"expected a generator made by define_generator (not wrapped), received {type(net).__name__}; "
            "for a network of your own give layer names and sizes explicitly"
        )
    return net


def _choose(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise _unknown(what, name, " or ".join(map(repr, table)), table)
    return table[name]


def _unknown(what: str, received: str, expected: str, names: Iterable[str]) -> ValueError:
    nearest = get_close_matches(str(received), list(names), n=1, cutoff=0.0)[0]
    return ValueError(f"{what}={received!r} is unknown: expected {expected}; the nearest is {nearest!r}")


def _is_unet_size(size: int) -> bool:
    return size >= 16 and size.bit_count() == 1  # four levels at least: the widths ngf, 2 ngf, 4 ngf, 8 ngf


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        check_whole(name, value, least=1)
