"""Generators and discriminators of CycleGAN and pix2pix, and architecture inference from weights.

The module tree, and with it every state_dict key, and the forward pass are those of the public code,
https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix (models/networks.py): checkpoints are exchangeable in both
directions. The architectures are from Johnson et al. 2016 (ResNet), Ronneberger et al. 2015 and Isola et al. 2017
(U-Net, PatchGAN) and Zhu et al. 2017 (CycleGAN). With `antialias`, the ResNet is that of CUT and FastCUT (Park et al.
2020), https://github.com/taesungp/contrastive-unpaired-translation.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_number, check_whole
from .activations import LeakyReLU, ReLU
from .antialias import Antialias, Downsample, Upsample

Norm = Literal["instance", "batch", "none"]
InitType = Literal["normal", "xavier", "kaiming", "orthogonal"]
NetD = Literal["basic", "n_layers", "pixel"]

Network = TypeVar("Network", bound=nn.Module)

# Their default arguments are those of the public code: batch norm has weights and running statistics; instance norm has
# neither, and the convolution before it has a bias instead; without a norm, the convolution has no bias either.
NORMS: dict[Norm, type[nn.Module]] = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d, "none": nn.Identity}

INITS: dict[InitType, Callable[[Tensor, float], Tensor]] = {
    "normal": lambda weight, gain: nn.init.normal_(weight, 0.0, gain),
    "xavier": lambda weight, gain: nn.init.xavier_normal_(weight, gain),
    "kaiming": lambda weight, gain: nn.init.kaiming_normal_(weight, a=0, mode="fan_in"),
    "orthogonal": lambda weight, gain: nn.init.orthogonal_(weight, gain),
}


@dataclass(frozen=True)
class GeneratorSpec:
    """Architecture of a generator: `define_generator(**asdict(spec))` builds it."""

    netG: str = "resnet_9blocks"
    input_nc: int = 3
    output_nc: int = 3
    ngf: int = 64
    norm: Norm = "instance"
    dropout: bool = False
    antialias: Antialias = "none"


def define_generator(
    netG: str = "resnet_9blocks",
    input_nc: int = 3,
    output_nc: int = 3,
    ngf: int = 64,
    norm: Norm = "instance",
    dropout: bool = False,
    antialias: Antialias = "none",
    *,
    init_type: InitType = "normal",
    init_gain: float = 0.02,
) -> ResnetGenerator | UnetGenerator:
    """Build and initialise a generator, (B, input_nc, H, W) -> (B, output_nc, H, W) with values in [-1, 1].

    Args:
        netG: `"resnet_<n>blocks"` with n >= 1, or `"unet_<size>"` with a power of two size >= 16, which downsamples
            log2(size) times. H and W must be multiples of `size_multiple(net)`.
        input_nc, output_nc: channels of the images.
        ngf: channels of the first layer, any integer >= 1; every other width is a multiple of it.
        norm: "instance", "batch" or "none".
        dropout: use dropout of 0.5 in every residual block, or in the U-Net's middle levels, as in the public code.
        antialias: filter where a ResNet downsamples ("down"), where it upsamples ("up") or at "both", as CUT and
            FastCUT do, and not ("none"), as CycleGAN does.
        init_type, init_gain: see `init_weights`.

    Raises:
        TypeError: a width is not an integer.
        ValueError: an unknown netG, norm, antialias or init_type, or a width below 1; the message names the nearest
            choice. Or a U-Net with antialias.
    """
    _check_positive(input_nc=input_nc, output_nc=output_nc, ngf=ngf)
    check_choice("norm", norm, tuple(NORMS))
    check_choice("antialias", antialias, get_args(Antialias))
    netG = str(netG)  # values of other types are unknown names
    shared = (input_nc, output_nc, ngf, NORMS[norm], dropout)
    net: ResnetGenerator | UnetGenerator
    if match := re.fullmatch(r"resnet_([1-9]\d*)blocks", netG):
        net = ResnetGenerator(*shared, antialias, blocks=int(match[1]))
    elif (match := re.fullmatch(r"unet_([1-9]\d*)", netG)) and _is_unet_size(size := int(match[1])):
        if antialias != "none":
            raise ValueError(
                f"antialias={antialias!r} with netG={netG!r}: only a ResNet has anti-aliasing; use 'none', or netG "
                "'resnet_9blocks'"
            )
        net = UnetGenerator(*shared, num_downs=size.bit_length() - 1)
    else:
        names = ["resnet_9blocks", "resnet_6blocks", *(f"unet_{2**n}" for n in range(8, 3, -1))]
        (nearest,) = get_close_matches(netG, names, n=1, cutoff=0.0)
        raise ValueError(
            f"netG={netG!r} is unknown: expected 'resnet_<n>blocks' with n >= 1, or 'unet_<size>' with a power of two "
            f"size >= 16; the nearest is {nearest!r}"
        )
    return init_weights(net, init_type, init_gain)


def define_discriminator(
    netD: NetD = "basic",
    input_nc: int = 3,
    ndf: int = 64,
    n_layers: int = 3,
    norm: Norm = "instance",
    *,
    init_type: InitType = "normal",
    init_gain: float = 0.02,
) -> nn.Module:
    """Build and initialise a discriminator, (B, input_nc, H, W) -> (B, 1, H', W') with one logit per patch.

    Args:
        netD: "basic" (70 x 70 PatchGAN, of three layers), "n_layers" (PatchGAN of `n_layers` layers), or "pixel"
            (1 x 1 convolutions, H' = H and W' = W).
        input_nc: channels of the image; for a conditional discriminator, of both images of a pair together.
        ndf: channels of the first layer.
        n_layers: only for netD "n_layers".
        norm: "instance", "batch" or "none".
        init_type, init_gain: see `init_weights`.

    Raises:
        TypeError: a number is not an integer.
        ValueError: an unknown netD, norm or init_type, or a number below 1; the message names the nearest choice.
    """
    _check_positive(input_nc=input_nc, ndf=ndf, n_layers=n_layers)
    check_choice("netD", netD, get_args(NetD))
    check_choice("norm", norm, tuple(NORMS))
    net: nn.Module
    if netD == "pixel":
        net = PixelDiscriminator(input_nc, ndf, NORMS[norm])
    else:
        net = PatchDiscriminator(input_nc, ndf, NORMS[norm], n_layers=3 if netD == "basic" else n_layers)
    return init_weights(net, init_type, init_gain)


def init_weights(net: Network, init_type: InitType = "normal", init_gain: float = 0.02) -> Network:
    """Initialise `net` in place and return it.

    Args:
        init_type: distribution of convolution and linear weights: "normal", "xavier", "kaiming" (ignores the gain) or
            "orthogonal".
        init_gain: standard deviation of "normal", gain of the others. Batch norm weights are drawn from
            N(1, init_gain), and every bias is zero.

    Raises:
        TypeError: init_gain is not a number.
        ValueError: an unknown init_type, or an init_gain below 0.
    """
    check_choice("init_type", init_type, tuple(INITS))
    check_number("init_gain", init_gain, least=0)
    init = INITS[init_type]
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
    """ResNet: downsamples by 4, `blocks` residual blocks at H/4 x W/4, upsamples by 4."""

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int,
        norm: type[nn.Module],
        dropout: bool,
        antialias: Antialias,
        *,
        blocks: int,
    ) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=bias)

        def down(inner: int, outer: int) -> tuple[nn.Module, ...]:
            if antialias in ("down", "both"):
                return *stage(conv(inner, outer)), Downsample(outer)
            return stage(conv(inner, outer, stride=2))

        def up(inner: int, outer: int) -> tuple[nn.Module, ...]:
            if antialias in ("up", "both"):
                return Upsample(inner), *stage(conv(inner, outer))
            return stage(nn.ConvTranspose2d(inner, outer, 3, stride=2, padding=1, output_padding=1, bias=bias))

        def stage(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, ...]:
            return conv, norm(conv.out_channels), ReLU()

        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            *stage(nn.Conv2d(input_nc, ngf, 7, bias=bias)),
            *down(ngf, 2 * ngf),
            *down(2 * ngf, 4 * ngf),
            *(ResnetBlock(4 * ngf, norm, dropout) for _ in range(blocks)),
            *up(4 * ngf, 2 * ngf),
            *up(2 * ngf, ngf),
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
        self.conv_block = nn.Sequential(*conv(), ReLU(), *drop, *conv())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class UnetGenerator(nn.Module):
    """U-Net: downsamples `num_downs` times by 2 and upsamples as often, with a skip connection at each level."""

    def __init__(
        self, input_nc: int, output_nc: int, ngf: int, norm: type[nn.Module], dropout: bool, *, num_downs: int
    ) -> None:
        super().__init__()
        self.num_downs = num_downs
        widths = [ngf * min(2**level, 8) for level in range(num_downs)]
        block = UnetBlock(widths[-2], widths[-1], norm, False, inside=None)
        for level in range(num_downs - 2, 0, -1):
            middle = level >= 4  # 8 ngf channels outside and inside
            block = UnetBlock(widths[level - 1], widths[level], norm, dropout and middle, inside=block)
        outermost = nn.Sequential(
            nn.Conv2d(input_nc, ngf, 4, stride=2, padding=1, bias=norm is nn.InstanceNorm2d),
            block,
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * ngf, output_nc, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        # In the public code the outermost level is a block too: its keys begin with model.model.
        self.model = nn.Sequential(OrderedDict(model=outermost))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UnetBlock(nn.Module):
    """A level of the U-Net with all levels inside it, (B, C, H, W) -> (B, 2 C, H, W): the skip and the output."""

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
        # As in the public code, x was activated in place by the LeakyReLU. The output does not depend on it, because a
        # ReLU follows, but a feature tap on this level sees it.
        return torch.cat([x, out], 1)


class PatchDiscriminator(nn.Module):
    """PatchGAN: `n_layers` convolutions of stride 2, then two of stride 1."""

    def __init__(self, input_nc: int, ndf: int, norm: type[nn.Module], *, n_layers: int) -> None:
        super().__init__()
        widths = [ndf * min(2**layer, 8) for layer in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), LeakyReLU(0.2)]
        for layer in range(1, n_layers + 1):
            stride = 2 if layer < n_layers else 1
            bias = norm is nn.InstanceNorm2d
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=bias),
                norm(widths[layer]),
                LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PixelDiscriminator(nn.Module):
    """PatchGAN of 1 x 1 patches. As in the public code, its last convolution has a bias only with instance norm."""

    def __init__(self, input_nc: int, ndf: int, norm: type[nn.Module]) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        self.net = nn.Sequential(
            nn.Conv2d(input_nc, ndf, 1),
            LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norm(2 * ndf),
            LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# the key of a ResNet or U-Net that is a part of another module
_FIRST_KEY = r"(?<=\.)model\.(1[02]\.conv_block\.1|model\.0)\.weight$"


def infer_generator(state_dict: Mapping[str, Tensor]) -> GeneratorSpec:
    """Infer the architecture of a generator from the keys and shapes of its state_dict, without `module.` prefixes.

    A U-Net's dropout does not show in its weights and is returned as False. Running statistics without a weight, which
    instance norms stored before torch 0.4, do not count as batch norm. Weights without norms and without the biases of
    the convolutions before instance norms have the norm "none".

    Raises:
        ValueError: the state_dict is not that of a generator, or incomplete.
    """

    def conv_shape(key: str) -> torch.Size:
        if key not in state_dict or state_dict[key].ndim != 4:
            raise ValueError(f"the weights of a generator, but incomplete: the convolution {key} is missing")
        return state_dict[key].shape

    if found := [key for key in state_dict if re.search(r"\.weight_(orig|g)$|\.parametrizations\.", key)]:
        raise ValueError(
            f"weights with spectral or weight norm ({found[0]}, ...), which no generator here has: to make them plain "
            "weights, call torch.nn.utils.remove_spectral_norm, remove_weight_norm or "
            "parametrize.remove_parametrizations on each layer, and save the state_dict again"
        )
    norm = _infer_norm(state_dict)
    if "model.model.0.weight" in state_dict:
        ngf, input_nc, *_ = conv_shape("model.model.0.weight")
        output_nc = conv_shape("model.model.3.weight")[1]
        num_downs = sum(w.ndim == 4 for w in state_dict.values()) // 2  # two convolutions per level
        return GeneratorSpec(f"unet_{2**num_downs}", input_nc, output_nc, ngf, norm)
    blocks = {int(match[1]) for key in state_dict if (match := re.match(r"model\.(\d+)\.conv_block\.", key))}
    if blocks and (first := min(blocks)) in (10, 12):  # two Downsample layers come before the blocks, or none
        ngf, input_nc, *_ = conv_shape("model.1.weight")
        end = first + len(blocks)
        # with Upsample layers, the first one follows the blocks, and the last convolution is two layers later
        up = f"model.{end}.filt" in state_dict or f"model.{end + 9}.weight" in state_dict
        output_nc = conv_shape(f"model.{end + 9 if up else end + 7}.weight")[0]
        dropout = f"model.{first}.conv_block.5.weight" not in state_dict  # it moves the second convolution to 6
        kinds: dict[tuple[bool, bool], Antialias] = {
            (False, False): "none", (True, False): "down", (False, True): "up", (True, True): "both",
        }  # fmt: skip
        return GeneratorSpec(
            f"resnet_{len(blocks)}blocks", input_nc, output_nc, ngf, norm, dropout, kinds[first == 12, up]
        )
    hint = ""
    if {"model.0.weight", "net.0.weight"} & state_dict.keys():
        hint = "; these look like a discriminator's: give the generator's, such as latest_net_G.pth"
    elif "mlp_0.0.weight" in state_dict:
        hint = "; these look like CUT's feature network netF: give the generator's, such as latest_net_G.pth"
    elif prefixes := {key[: match.start()] for key in state_dict if (match := re.search(_FIRST_KEY, key))}:
        names = " and ".join(sorted(prefixes))
        hint = f"; the file has generators whose keys start with {names}: save one without this prefix"
    raise ValueError(
        "not the weights of a generator: expected the keys of a ResNet (model.1.weight, model.10.conv_block.1.weight "
        "or model.12.conv_block.1.weight, ...) or of a U-Net (model.model.0.weight, ...), received "
        f"{', '.join(list(state_dict)[:4]) or 'none'}{', ...' if len(state_dict) > 4 else ''}{hint}"
    )


def _infer_norm(state_dict: Mapping[str, Tensor]) -> Norm:
    # only norms have weights of one dimension, and only batch norm has weights
    if any(key.endswith(".weight") and w.ndim == 1 for key, w in state_dict.items()):
        return "batch"
    # every convolution before an instance norm has a bias; without norms only the last one, which has no norm, has one
    statistics = any(key.endswith(".running_mean") for key in state_dict)
    return "instance" if statistics or sum(key.endswith(".bias") for key in state_dict) > 1 else "none"


def default_tap(net: nn.Module) -> str:
    """Return the name of a generator's default layer for relation distillation: the activated end of its encoder.

    ResNet: `model.9`, (B, 4 ngf, H/4, W/4); with anti-aliased downsampling `model.11`, of the same shape. U-Net: its
    encoder ends in a single pixel, which has no relations; the layer is the LeakyReLU after the deepest level that is
    at least 16 x 16 at the net's nominal size: stride 16 in unet_256, 8 in unet_128 (2 in unet_16, where every level is
    smaller). All come before any dropout, no later in-place activation overwrites them, and their names depend neither
    on ngf nor on the number of blocks.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    generator = _check_generator(net)
    if isinstance(generator, ResnetGenerator):
        first = next(index for index, layer in enumerate(generator.model) if isinstance(layer, ResnetBlock))
        return f"model.{first - 1}"
    level = max(generator.num_downs - 4, 1)
    return "model.model.1" + ".model.3" * (level - 1) + ".model.0"


def size_multiple(net: nn.Module) -> int:
    """Return the number that divides the height and width of a generator's input: ResNet 4, U-Net 2**num_downs.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    generator = _check_generator(net)
    return 4 if isinstance(generator, ResnetGenerator) else 1 << generator.num_downs


def image_channels(net: nn.Module) -> tuple[int, int]:
    """Return the number of input and output channels of a generator.

    Raises:
        TypeError: `net` was not made by `define_generator`.
    """
    convs = [m for m in _check_generator(net).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return convs[0].in_channels, convs[-1].out_channels  # the outermost two, also of a U-Net


def normalize_per_image(net: Network) -> Network:
    """Make batch norms normalise each image by its own statistics; changes `net` in place and returns it.

    For a batch of one image, batch norms in training mode do this, which is how pix2pix runs its generators. Here it
    holds for each image of a batch of any size: instance norms that share the weights replace the batch norms. The
    running statistics are dropped.
    """
    for parent in list(net.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                per_image = nn.InstanceNorm2d(norm.num_features, norm.eps, affine=True, device="meta")
                per_image.weight, per_image.bias = norm.weight, norm.bias
                parent.register_module(name, per_image.train(norm.training))
    return net


def _check_generator(net: nn.Module) -> ResnetGenerator | UnetGenerator:
    if not isinstance(net, ResnetGenerator | UnetGenerator):
        raise TypeError(
            f"expected a generator made by define_generator (not wrapped), received {type(net).__name__}; "
            "for another network give layer names and sizes explicitly"
        )
    return net


def _is_unet_size(size: int) -> bool:
    return size >= 16 and size.bit_count() == 1  # at least four levels, of widths ngf, 2 ngf, 4 ngf, 8 ngf


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        check_whole(name, value, least=1)
