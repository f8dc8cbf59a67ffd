"""Losses and layouts of the layers that the distiller compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srpkd import RelationDistiller, SRPLoss, relation_loss

pytestmark = pytest.mark.usefixtures("one_thread")


class ChannelsLast(nn.Module):
    """Return a layer's map (B, C, H, W) as (B, H, W, C), or as tokens (B, N, C)."""

    def __init__(self, module: nn.Module, tokens: bool = False) -> None:
        super().__init__()
        self.module, self.tokens = module, tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x).permute(0, 2, 3, 1)
        return x.flatten(1, 2) if self.tokens else x


@pytest.mark.parametrize("loss_fn", [SRPLoss("row", "l1"), SRPLoss(layout="nhwc"), SRPLoss(layout="nlc"), F.mse_loss])
def test_layouts_of_both_networks(loss_fn: nn.Module, image: Tensor) -> None:
    """The loss is that of the maps (B, C, H, W), whatever the layouts of the features and that of the loss."""
    convolutions = [nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4 if loss_fn is F.mse_loss else 6, 1)]
    wrapped = {
        "nchw": lambda module: module,
        "nhwc": ChannelsLast,
        "nlc": lambda module: ChannelsLast(module, tokens=True),
    }
    losses = []
    for ours in wrapped:
        for theirs in wrapped:
            networks = [
                nn.Sequential(wrapped[name](conv)) for name, conv in zip((ours, theirs), convolutions, strict=True)
            ]
            *_, loss = RelationDistiller(*networks, {"0": "0"}, loss_fn, layout={"0": (ours, theirs)})(image)
            losses.append(loss)
            assert torch.autograd.grad(loss, convolutions[0].weight)[0].any()
            if ours == theirs:
                *_, same = RelationDistiller(*networks, {"0": "0"}, loss_fn, layout=ours)(image)
                assert torch.equal(same, loss)
    torch.testing.assert_close(losses, losses[:1] * 9)


def test_a_loss_and_a_layout_per_layer(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    student.decoder, teacher.decoder = ChannelsLast(student.decoder), ChannelsLast(teacher.decoder)
    layers = {"encoder.conv": "encoder.conv", "encoder": "encoder", "decoder": "decoder"}
    losses = {"encoder": SRPLoss("row", "l1"), "decoder": lambda ours, theirs: (ours - theirs).square().mean()}
    distiller = RelationDistiller(student, teacher, layers, losses, {"encoder": 2.0}, {"decoder": "nhwc"})
    passes = distiller.run(image)
    pairs = [(passes.student_features[name], passes.teacher_features[name]) for name in layers]
    expected = SRPLoss()(*pairs[0]) + 2 * losses["encoder"](*pairs[1]) + losses["decoder"](*pairs[2])
    torch.testing.assert_close(distiller.compare(passes.student_features, passes.teacher_features), expected)
    assert "layout={'decoder': ('nhwc', 'nhwc')}" in repr(distiller)


def test_parameters_of_a_layers_loss_are_trained(student: nn.Module, teacher: nn.Module) -> None:
    class Learned(nn.Conv2d):
        def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
            return F.mse_loss(super().forward(ours), theirs)

    loss_fn = Learned(4, 6, 1)
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"}, {"encoder": loss_fn})
    assert [*distiller.parameters()] == [*student.parameters(), *loss_fn.parameters()]


def test_unlikely_layout_warns_once_for_each_layer() -> None:
    networks = [nn.Sequential(ChannelsLast(nn.Conv2d(3, 32, 1)), nn.Identity()) for _ in range(2)]
    layers = {"0": "0", "1": "1"}
    distiller, image = RelationDistiller(*networks, layers), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning) as caught:
        distiller(image)
    assert [str(warning.message)[:36] for warning in caught] == [
        f"student layer '{name}' with teacher layer" for name in layers
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(image)
        RelationDistiller(*networks, layers, layout="nhwc")(image)
        # a function reads the features in a layout of its own
        RelationDistiller(*networks, layers, loss=partial(relation_loss, layout="nhwc"))(image)


def test_tokens_need_a_layout(image: Tensor) -> None:
    """Read as one map (C, H, W), tokens of two networks of the same width would give a wrong loss."""
    networks = [nn.Sequential(ChannelsLast(nn.Conv2d(3, 4, 1), tokens=True)) for _ in range(2)]
    message = r"student layer '0' .*shape \(2, 64, 4\) and \(2, 64, 4\) need a layout: .*layout='nlc' .*\(B, C, N\)"
    for loss_fn in (None, SRPLoss(layout="nhwc")):
        with pytest.raises(ValueError, match=message):
            RelationDistiller(*networks, {"0": "0"}, loss_fn)(image)
    (student, teacher), losses = [network(image).detach() for network in networks], []
    for options in ({"layout": "nlc"}, {"loss": SRPLoss(layout="nlc")}):
        losses.append(RelationDistiller(*networks, {"0": "0"}, **options)(image)[2])
    torch.testing.assert_close(losses, [relation_loss(student, teacher, layout="nlc")] * 2)
    teacher = nn.Sequential(nn.Conv2d(3, 6, 1))
    with pytest.raises(ValueError, match=r"need a layout: pass layout=\('nlc', 'nchw'\), that of the student"):
        RelationDistiller(networks[0], teacher, {"0": "0"})(image)
    maps = [nn.Sequential(nn.Conv2d(3, width, 1)) for width in (4, 6)]  # of one image
    expected = relation_loss(maps[0](image[0]), maps[1](image[0]).detach())
    torch.testing.assert_close(RelationDistiller(*maps, {"0": "0"}, layout="nchw")(image[0])[2], expected)


class Reshaped(nn.Conv2d):
    """A convolution whose output a function changes."""

    def __init__(self, width: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(3, width, 1)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))


@pytest.mark.parametrize(
    ("change", "layout", "likely"),
    [
        (lambda x: x.permute(0, 2, 3, 1), "nchw", r"\(B, H, W, C\): if they are, pass layout='nhwc'"),
        (lambda x: x.flatten(2).permute(2, 0, 1), "nlc", r"\(N, B, C\): if they are, pass a loss that transposes"),
        (
            lambda x: F.pad(F.avg_pool2d(x, 2).flatten(2), (5, 0)).mT,
            "nlc",
            r"12 patches behind 5 class or register tokens: if they are, .* with features\[:, 5:\]",
        ),
        (lambda x: x.mean((2, 3)), "nlc", r"\(B, C\), a vector for each image: if they are, tap a layer before"),
    ],
)
def test_images_tell_which_layout_is_unlikely(change: Callable, layout: str, likely: str) -> None:
    """The batch and the aspect ratio of the images, which may be anywhere in the input."""
    networks = [nn.Sequential(Reshaped(16, change)) for _ in range(2)]
    distiller = RelationDistiller(
        *networks, {"0": "0"}, layout=layout, forward=lambda network, batch: network(batch["images"][0])
    )
    batch = {"label": torch.ones(2), "images": (torch.randn(2, 3, 4, 12),)}
    with pytest.warns(UserWarning, match=rf"student layer '0' .* but look like {likely}") as caught:
        distiller(batch)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(batch)


def test_images_tell_that_a_layout_is_likely() -> None:
    """The shape alone looks like maps (B, H, W, C) in one case, and like maps (B, C, H, W) in the other."""
    for layout, change in (("nchw", lambda x: x), ("nhwc", lambda x: x.permute(0, 2, 3, 1))):
        height, width, channels = (16, 32, 16) if layout == "nchw" else (16, 32, 32)
        networks = [nn.Sequential(Reshaped(channels, change)) for _ in range(2)]
        maps = [network(torch.randn(2, 3, height, width)).detach() for network in networks]
        with pytest.warns(UserWarning, match="look like"):
            SRPLoss(layout=layout)(*maps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RelationDistiller(*networks, {"0": "0"}, SRPLoss(layout=layout))(torch.randn(2, 3, height, width))


@pytest.mark.parametrize(
    "change",
    [
        *(lambda x, tokens=tokens: x.flatten(2)[..., :tokens].mT for tokens in (16, 36, 12, 77)),
        lambda x: x[0].flatten(1).mT,  # without a batch; an image could have 17 tokens, but these are channels
    ],
)
def test_tokens_that_may_be_patches_give_no_warning(change: Callable) -> None:
    """As many as fit into an image of 32 x 32, or not as many with some class tokens: of a text, for example."""
    networks = [nn.Sequential(Reshaped(17, change)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RelationDistiller(*networks, {"0": "0"}, layout="nlc")(torch.randn(2, 3, 32, 32))


def test_one_pixel_has_no_relations(image: Tensor) -> None:
    networks = [nn.Sequential(nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1)) for width in (4, 6)]
    layers = {"1": "1"}
    with pytest.raises(ValueError, match=r"student layer '1' .* \(2, 4, 1, 1\) have one pixel .*scope='batch'"):
        RelationDistiller(*networks, layers)(image)
    for layout, shape in (("nlc", (2, 1, 4)), ("nhwc", (2, 1, 1, 4))):
        distiller = RelationDistiller(*networks, layers, layout=layout)
        with pytest.raises(ValueError, match="have one pixel"):
            distiller.compare({"1": torch.ones(shape, requires_grad=True)}, {"1": torch.ones(shape)})
    with pytest.raises(ValueError, match="features are empty"):  # no pixel at all
        RelationDistiller(*networks, layers).compare(*({"1": torch.ones(2, 4, 0, 3, requires_grad=True)},) * 2)
    with torch.no_grad():  # a validation
        assert RelationDistiller(*networks, layers)(image)[2] == 0
    for loss_fn in (SRPLoss(scope="batch"), SRPLoss("none"), F.mse_loss):
        distiller = RelationDistiller(*networks[:1] * 2, layers, loss_fn)
        assert distiller.compare({"1": networks[0](image)}, {"1": torch.ones(2, 4, 1, 1)}) > 0


def test_a_function_receives_features_of_any_shape() -> None:
    distiller = RelationDistiller(nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity()), {"0": "0"}, F.mse_loss)
    vectors, others = torch.randn(2, 3, 5)
    assert distiller.compare({"0": vectors}, {"0": others}) == F.mse_loss(vectors, others)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", ["nlc", None])
def test_nested_features_name_the_layer(layout: str | None) -> None:
    """Such as nn.TransformerEncoder makes in a teacher, for tokens with a padding mask."""
    networks = []
    for width in (4, 8):
        block = nn.TransformerEncoderLayer(width, 2, width, dropout=0.0, batch_first=True)
        networks.append(nn.ModuleDict({"embed": nn.Linear(6, width), "blocks": nn.TransformerEncoder(block, 2)}))
    student, teacher = networks

    def forward(network: nn.Module, tokens: Tensor) -> Tensor:
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return network["blocks"](network["embed"](tokens), src_key_padding_mask=padding)

    layers = {"blocks.layers.1": "blocks.layers.1"}
    distiller = RelationDistiller(student, teacher.eval(), layers, layout=layout, forward=forward)
    with pytest.raises(TypeError, match=r"student layer 'blocks.layers.1' .*teacher features are nested"):
        distiller(torch.randn(2, 5, 6))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("NHWC", "layout='NHWC' is not one of 'nchw', 'nlc', 'nhwc'"),
        ({"encoder": ("nchw", "nchw", "nhwc")}, "expected a layout, or a pair"),
        ({"decoder": "nhwc"}, r"layout names layers \['decoder'\] that are not tapped"),
    ],
)
def test_invalid_layouts(layout: object, message: str, student: nn.Module, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        RelationDistiller(student, teacher, {"encoder": "encoder"}, layout=layout)


def test_layouts_that_do_not_fit_the_features(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"}, layout=("nchw", "nlc"))
    with pytest.raises(
        ValueError, match=r"'encoder'.*: teacher features have shape .* layout='nlc' expects \(B, N, C\)"
    ):
        distiller(image)
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"}, layout="nlc")
    with pytest.raises(ValueError, match=r"'encoder'.* give RelationDistiller layout=\('nlc', 'nchw'\), or"):
        distiller.compare({"encoder": torch.ones(2, 16, 3)}, {"encoder": torch.ones(2, 5, 4, 4)})
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"}, layout="nhwc")
    shapes = r"\(2, 3, 4, 4\).* features \(2, 4, 4, 3\), layout='nhwc'.* after the conversion to layout='nchw'"
    with pytest.raises(ValueError, match=shapes):
        distiller.compare({"encoder": torch.ones(2, 4, 4, 3)}, {"encoder": torch.ones(2, 8, 8, 5)})
    with pytest.raises(TypeError, match=r"loss\['encoder'\]: expected a module such as"):
        RelationDistiller(student, teacher, {"encoder": "encoder"}, {"encoder": "l1"})
    with pytest.raises(ValueError, match=r"loss names layers \['decoder'\] that are not tapped"):
        RelationDistiller(student, teacher, {"encoder": "encoder"}, {"decoder": SRPLoss()})
