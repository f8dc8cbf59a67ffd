"""Architectures, their keys and forward passes, and what is inferred from weights."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from cut_layout import ANTIALIAS, DOWN, UP
from small_generators import with_old_statistics
from torch import nn

from srpkd.models.networks import (
    GeneratorSpec,
    default_tap,
    define_discriminator,
    define_generator,
    image_channels,
    infer_generator,
    init_weights,
    normalize_per_image,
    size_multiple,
)


def on_meta(make=define_generator, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def count(net):
    return sum(p.numel() for p in net.parameters())


# The published sizes, and every key by name


@pytest.mark.parametrize(
    ("netG", "norm", "keys", "parameters"),
    [
        ("resnet_9blocks", "instance", 48, 11_378_179),
        ("resnet_6blocks", "instance", 36, 7_837_699),
        ("unet_256", "batch", 82, 54_413_955),
        ("unet_128", "batch", 70, 41_828_995),
    ],
)
def test_generators_have_the_published_size(netG, norm, keys, parameters):
    net = on_meta(netG=netG, norm=norm)
    assert (len(net.state_dict()), count(net)) == (keys, parameters)


@pytest.mark.parametrize(
    ("netG", "antialias", "keys", "parameters"),
    [
        # as in CUT and FastCUT: the transposed convolutions become convolutions of the same size
        ("resnet_9blocks", "both", 52, 11_378_179),
        ("resnet_6blocks", "both", 40, 7_837_699),
        ("resnet_9blocks", "down", 50, 11_378_179),
        ("resnet_9blocks", "up", 50, 11_378_179),
    ],
)
def test_anti_aliased_generators_have_the_published_size(netG, antialias, keys, parameters):
    net = on_meta(netG=netG, antialias=antialias)
    assert (len(net.state_dict()), count(net)) == (keys, parameters)


def leaves(norm, *, bias=True):
    return ["weight", "bias"] if bias and norm == "instance" else ["weight"]


def norm_leaves(norm):
    tracked = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    return tracked if norm == "batch" else []


def resnet_keys(blocks, norm, dropout, antialias="none"):
    """The keys of the public code, written from its layout."""
    second = 6 if dropout else 5
    down_filters, down, first = DOWN[antialias in ("down", "both")]
    up_filters, up, last = UP[antialias in ("up", "both")]
    end = first + blocks
    convs = [f"model.{i}" for i in (1, *down)]
    for block in range(first, end):
        convs += [f"model.{block}.conv_block.1", f"model.{block}.conv_block.{second}"]
    convs += [f"model.{end + i}" for i in up]
    filters = {f"model.{i}.filt" for i in (*down_filters, *(end + i for i in up_filters))}
    keys = {f"{conv}.{leaf}" for conv in convs for leaf in leaves(norm)}
    for conv in convs:  # each norm directly follows its convolution
        head, _, index = conv.rpartition(".")
        keys |= {f"{head}.{int(index) + 1}.{leaf}" for leaf in norm_leaves(norm)}
    return keys | filters | {f"model.{end + last}.weight", f"model.{end + last}.bias"}


def unet_keys(num_downs, norm):
    keys = {f"model.model.0.{leaf}" for leaf in leaves(norm)} | {"model.model.3.weight", "model.model.3.bias"}
    block = "model.model.1.model"
    for level in range(1, num_downs):
        innermost = level == num_downs - 1
        down, up = 1, 3 if innermost else 5
        keys |= {f"{block}.{conv}.{leaf}" for conv in (down, up) for leaf in leaves(norm)}
        norms = [up + 1] if innermost else [down + 1, up + 1]
        keys |= {f"{block}.{index}.{leaf}" for index in norms for leaf in norm_leaves(norm)}
        block += ".3.model"
    return keys


@pytest.mark.parametrize("antialias", ANTIALIAS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("blocks", [1, 6, 9, 12])
@pytest.mark.core(40)
def test_resnet_keys_are_those_of_the_public_code(blocks, norm, dropout, antialias):
    net = on_meta(netG=f"resnet_{blocks}blocks", norm=norm, dropout=dropout, ngf=2, antialias=antialias)
    assert set(net.state_dict()) == resnet_keys(blocks, norm, dropout, antialias)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("num_downs", [4, 5, 7, 8, 9])
def test_unet_keys_are_those_of_the_public_code(num_downs, norm, dropout):
    net = on_meta(netG=f"unet_{2**num_downs}", norm=norm, dropout=dropout, ngf=2)
    assert set(net.state_dict()) == unet_keys(num_downs, norm)


def test_resnet_layout():
    net = on_meta(ngf=2)
    kinds = [type(module).__name__ for module in net.model]
    assert len(kinds) == 28 and kinds[10:19] == ["ResnetBlock"] * 9
    assert kinds[9] == "ReLU" and kinds[26:] == ["Conv2d", "Tanh"]
    assert [type(m).__name__ for m in net.model[10].conv_block] == (
        ["ReflectionPad2d", "Conv2d", "InstanceNorm2d", "ReLU", "ReflectionPad2d", "Conv2d", "InstanceNorm2d"]
    )


def test_unet_has_dropout_only_in_the_middle_levels():
    def dropped(netG):
        net = on_meta(netG=netG, ngf=1, dropout=True)
        return [name.count(".3") for name, m in net.named_modules() if isinstance(m, nn.Dropout)]

    # levels 4, 5, 6 of 0 ... 7; the name of level k's submodule has k - 1 times ".3"
    assert sorted(dropped("unet_256")) == [3, 4, 5]
    assert sorted(dropped("unet_128")) == [3, 4]
    assert dropped("unet_32") == []


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({"netD": "basic"}, {"0": (4, 3, 4, 4), "2": (8, 4, 4, 4), "5": (16, 8, 4, 4), "8": (32, 16, 4, 4)}),
        ({"netD": "n_layers", "n_layers": 1}, {"0": (4, 3, 4, 4), "2": (8, 4, 4, 4), "5": (1, 8, 4, 4)}),
        ({"netD": "n_layers", "n_layers": 5}, {"11": (32, 32, 4, 4), "14": (32, 32, 4, 4), "17": (1, 32, 4, 4)}),
        ({"netD": "basic", "n_layers": 5}, {"11": (1, 32, 4, 4)}),
    ],
)
def test_patch_discriminators_have_the_keys_of_the_public_code(kwargs, shapes):
    state = define_discriminator(ndf=4, **kwargs).state_dict()
    for index, shape in shapes.items():
        assert state[f"model.{index}.weight"].shape == shape


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_discriminator_biases(norm):
    convs = {"instance": [0, 2, 5, 8, 11], "batch": [0, 3, 6, 9, 11]}[norm]
    state = define_discriminator("basic", ndf=2, norm=norm).state_dict()
    biased = [int(k.split(".")[1]) for k in state if k.endswith(".bias")]
    assert biased == convs  # with batch norm: those of the norms, of the first and of the last convolution
    pixel = define_discriminator("pixel", ndf=2, norm=norm).state_dict()
    assert [k for k in pixel if k.endswith("bias")] == (
        ["net.0.bias", "net.2.bias", "net.5.bias"] if norm == "instance" else ["net.0.bias", "net.3.bias"]
    )


def test_basic_discriminator_has_the_published_size():
    assert count(on_meta(define_discriminator)) == 2_764_737
    assert count(on_meta(define_discriminator, "basic", 6, norm="batch")) == 2_768_705


@pytest.mark.parametrize("ngf", [1, 9])
@pytest.mark.parametrize("netG", ["resnet_3blocks", "unet_16", "unet_32", "unet_64"])
def test_generator_keeps_the_size_and_trains(netG, ngf):
    net = define_generator(netG, 1, 2, ngf, dropout=True)
    size = 64
    out = net(torch.randn(1, 1, size, 2 * size))
    assert out.shape == (1, 2, size, 2 * size) and out.abs().max() <= 1
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("netD", "n_layers", "size"), [("basic", 3, 30), ("n_layers", 3, 30), ("n_layers", 1, 126), ("pixel", 3, 256)]
)
def test_discriminator_shapes(netD, n_layers, size):
    net = on_meta(define_discriminator, netD, 6, n_layers=n_layers, norm="batch")
    assert net(torch.empty(2, 6, 256, 256, device="meta")).shape == (2, 1, size, size)


def test_receptive_field_of_the_basic_discriminator():
    net = define_discriminator("basic", ndf=1)
    for i, module in enumerate(net.model):
        if isinstance(module, nn.InstanceNorm2d):
            net.model[i] = nn.Identity()  # the gradient of a norm covers the whole image
        elif isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    net(x)[0, 0, 15, 15].backward()
    seen = x.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


# Initialisation


@torch.no_grad()
def test_init_normal_is_that_of_the_paper():
    torch.manual_seed(0)
    net = define_generator("resnet_1blocks", ngf=32, norm="batch")
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 5000:
            assert abs(module.weight.mean()) < 2e-3, name
            assert module.weight.std() == pytest.approx(0.02, rel=0.1), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean() == pytest.approx(1, abs=0.02), name
            assert module.weight.std() == pytest.approx(0.02, rel=0.6), name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), name


@torch.no_grad()
def test_init_types_and_gain():
    def conv(init_type, gain):
        torch.manual_seed(0)
        net = define_discriminator("pixel", ndf=64, init_type=init_type, init_gain=gain)
        return net.net[2].weight.flatten(1)  # (128, 64)

    assert conv("normal", 0.5).std() == pytest.approx(0.5, rel=0.05)
    assert conv("xavier", 3.0).std() == pytest.approx(3 * (2 / (64 + 128)) ** 0.5, rel=0.05)
    assert conv("kaiming", 3.0).std() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    w = conv("orthogonal", 3.0)
    torch.testing.assert_close(w.T @ w, 9 * torch.eye(64), atol=1e-4, rtol=0)


def test_init_weights_returns_the_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(3, affine=True))
    net[0].bias.data.fill_(5)
    assert init_weights(net) is net and not net[0].bias.any()


# Inference of the architecture from the weights

SPECS = [
    GeneratorSpec(netG, input_nc, output_nc, ngf, norm, dropout)
    for netG in ("resnet_1blocks", "resnet_6blocks", "resnet_11blocks", "unet_16", "unet_32", "unet_128", "unet_256")
    for input_nc, output_nc, ngf in ((3, 3, 2), (1, 4, 3))
    for norm in ("instance", "batch", "none")
    for dropout in (False, True)
]
ANTI_ALIASED = [
    GeneratorSpec(f"resnet_{blocks}blocks", 1, 4, 3, norm, dropout, antialias)
    for blocks in (1, 2, 3, 9)
    for norm in ("instance", "batch", "none")
    for dropout in (False, True)
    for antialias in ("down", "up", "both")
]


@pytest.mark.parametrize("spec", [*SPECS, *ANTI_ALIASED], ids=str)
@pytest.mark.core(70)
def test_infer_generator(spec):
    state = on_meta(**asdict(spec)).state_dict()
    visible = not spec.netG.startswith("unet")  # a U-Net's dropout does not show in the keys
    assert infer_generator(state) == replace(spec, dropout=spec.dropout and visible)


@pytest.mark.parametrize("spec", [s for s in SPECS + ANTI_ALIASED if s.norm == "instance" and s.ngf > 1], ids=str)
def test_infer_generator_ignores_statistics_of_old_instance_norms(spec):
    net = on_meta(**asdict(spec))
    state = with_old_statistics(net)
    assert infer_generator(state).norm == "instance"
    assert infer_generator(state) == infer_generator(net.state_dict())


def test_infer_generator_rejects_other_weights():
    with pytest.raises(ValueError, match=r"not the weights of a generator.*model\.0\.weight.*discriminator"):
        infer_generator(define_discriminator(ndf=1).state_dict())
    with pytest.raises(ValueError, match="discriminator"):
        infer_generator(define_discriminator("pixel", ndf=1).state_dict())
    with pytest.raises(ValueError, match=r"look like CUT's feature network netF"):
        infer_generator({"mlp_0.0.weight": torch.zeros(2, 2), "mlp_0.0.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"expected the keys of a ResNet .* received fc\.weight$"):
        infer_generator({"fc.weight": torch.zeros(2, 2)})
    state = on_meta(netG="resnet_1blocks", ngf=1).state_dict()
    parts = {f"{name}.{key}": value for name in ("G_B", "G_A") for key, value in state.items()}
    with pytest.raises(ValueError, match=r"generators whose keys start with G_A\. and G_B\.: save one without"):
        infer_generator(parts)
    state = on_meta(netG="unet_32", ngf=1).state_dict()
    with pytest.raises(ValueError, match=r"generators whose keys start with netG\.: save one without"):
        infer_generator({f"netG.{key}": value for key, value in state.items()})
    with pytest.raises(ValueError, match="received none"):
        infer_generator({})


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm],
)
def test_spectral_and_weight_norm_are_named(wrap):
    net = define_generator("resnet_1blocks", ngf=1)
    for layer in list(net.modules()):
        if isinstance(layer, nn.Conv2d):
            wrap(layer)
    with pytest.raises(ValueError, match=r"weights with spectral or weight norm \(model\.1\..*, which no generator"):
        infer_generator(net.state_dict())


@pytest.mark.parametrize(
    ("netG", "antialias", "key"),
    [
        ("resnet_2blocks", "none", "model.19.weight"),
        ("resnet_2blocks", "both", "model.23.weight"),
        ("unet_32", "none", "model.model.3.weight"),
    ],
)
def test_infer_generator_names_missing_weights(netG, antialias, key):
    state = on_meta(netG=netG, ngf=1, antialias=antialias).state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"incomplete: the convolution {re.escape(key)} is missing"):
        infer_generator(state)


# The default relation layer


@pytest.mark.parametrize(
    ("netG", "size", "shape"),
    [
        ("resnet_9blocks", 64, (8, 16, 16)),
        ("resnet_2blocks", 256, (8, 64, 64)),
        ("unet_512", 512, (16, 16, 16)),
        ("unet_256", 256, (16, 16, 16)),
        ("unet_128", 128, (8, 16, 16)),
        ("unet_64", 64, (4, 16, 16)),
        ("unet_32", 32, (2, 16, 16)),
        ("unet_16", 16, (2, 8, 8)),
    ],
)
def test_default_tap_is_not_overwritten_in_place(netG, size, shape):
    net = define_generator(netG, ngf=2, dropout=True)
    seen = []
    net.get_submodule(default_tap(net)).register_forward_hook(lambda _m, _i, out: seen.extend([out, out.clone()]))
    net(torch.randn(1, 3, size, size))
    assert seen[0].shape == (1, *shape)
    assert torch.equal(*seen)


@pytest.mark.parametrize("antialias", ["down", "up", "both"])
def test_default_tap_of_anti_aliased_generators(antialias):
    net, seen = define_generator("resnet_2blocks", ngf=2, dropout=True, antialias=antialias), []
    net.get_submodule(default_tap(net)).register_forward_hook(lambda _m, _i, out: seen.extend([out, out.clone()]))
    inputs = []
    first = next(m for m in net.model if type(m).__name__ == "ResnetBlock")
    first.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    net(torch.randn(1, 3, 64, 32))
    assert seen[0] is inputs[0] and seen[0].shape == (1, 8, 16, 8)
    assert torch.equal(*seen) and seen[0].min() >= 0


def test_default_tap_does_not_depend_on_width_and_depth():
    assert {default_tap(on_meta(netG=f"resnet_{n}blocks", ngf=g)) for n in (1, 9) for g in (1, 8)} == {"model.9"}
    assert default_tap(on_meta(netG="unet_256", ngf=1)) == default_tap(on_meta(netG="unet_256", ngf=8, norm="batch"))


@pytest.mark.parametrize("netG", ["resnet_1blocks", "unet_16"])
def test_normalize_per_image_is_training_mode_for_each_image(netG):
    net = define_generator(netG, ngf=2, norm="batch", init_gain=0.2)
    images = torch.rand(3, 3, 32, 48) * torch.tensor([0.1, 1, 3]).view(3, 1, 1, 1)
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in images])
        together = net(images)
        names, weights = [name for name, _ in net.named_modules()], dict(net.named_parameters())
        assert normalize_per_image(net.eval()) is net
        found = net(images)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert (together - alone).abs().max() > 0.01
    assert [name for name, _ in net.named_modules()] == names and not any(m.training for m in net.modules())
    assert all(parameter is weights[name] for name, parameter in net.named_parameters())
    assert net.state_dict().keys() == weights.keys()  # no running statistics


def test_normalize_per_image_keeps_instance_norms():
    net = define_generator("resnet_1blocks", ngf=2)
    before = list(net.modules())
    assert list(normalize_per_image(net).modules()) == before


def test_size_multiple():
    nets = {"resnet_6blocks": 4, "unet_16": 16, "unet_128": 128, "unet_256": 256}
    assert {netG: size_multiple(on_meta(netG=netG, ngf=1)) for netG in nets} == nets
    assert size_multiple(on_meta(netG="resnet_1blocks", ngf=1, antialias="both")) == 4


@pytest.mark.parametrize("spec", [s for s in SPECS + ANTI_ALIASED if s.norm == "batch" and not s.dropout], ids=str)
def test_image_channels(spec):
    assert image_channels(on_meta(**asdict(spec))) == (spec.input_nc, spec.output_nc)


@pytest.mark.parametrize("function", [default_tap, size_multiple, image_channels])
def test_other_networks_are_rejected(function):
    with pytest.raises(TypeError, match=r"made by define_generator .* received Conv2d"):
        function(nn.Conv2d(1, 1, 1))


# Errors


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (define_generator, {"netG": "resnet9_blocks"}, "netG='resnet9_blocks' is unknown.*'resnet_9blocks'$"),
        (define_generator, {"netG": "resnet_0blocks"}, r"'resnet_<n>blocks' with n >= 1"),
        (define_generator, {"netG": "unet_255"}, "power of two size >= 16; the nearest is 'unet_256'$"),
        (define_generator, {"netG": "unet_8"}, "power of two size >= 16"),
        (
            define_generator,
            {"norm": "batchnorm"},
            "norm='batchnorm' is not one of 'instance', 'batch', 'none'; did you mean 'batch'",
        ),
        (
            define_generator,
            {"antialias": "dwn"},
            "antialias='dwn' is not one of 'none', 'down', 'up', 'both'; did you mean 'down'",
        ),
        (
            define_generator,
            {"netG": "unet_16", "antialias": "both"},
            "antialias='both' with netG='unet_16': only a ResNet has anti-aliasing; use 'none', or netG",
        ),
        (define_generator, {"ngf": 0}, "ngf=0: expected an integer >= 1"),
        (define_generator, {"output_nc": -1}, "output_nc=-1"),
        (
            define_generator,
            {"ngf": 1, "init_type": "kaming"},
            "init_type='kaming' is not one of .*; did you mean 'kaiming'",
        ),
        (
            define_discriminator,
            {"netD": "pixl"},
            "netD='pixl' is not one of 'basic', 'n_layers', 'pixel'; did you mean 'pixel'",
        ),
        (define_discriminator, {"norm": "inst"}, "norm='inst' is not one of .*; did you mean 'instance'"),
        (define_discriminator, {"n_layers": 0}, "n_layers=0"),
    ],
)
def test_invalid_arguments(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
