"""Conversions between layouts of features, and the shapes that look like another layout."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from srpkd import SRPLoss
from srpkd.layouts import LAYOUTS, Layout, convert, likely_layout, warn_if_unlikely


def as_layout(image: Tensor, layout: Layout) -> Tensor:
    """(B, C, H, W) or (C, H, W) in another layout, by its definition."""
    if layout == "nchw":
        return image
    channels_last = torch.stack(image.unbind(-3), -1)
    return channels_last if layout == "nhwc" else torch.cat(channels_last.unbind(-3), -2)


@pytest.mark.parametrize("has_batch", [True, False])
@pytest.mark.parametrize(("layout", "target"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_conversions(layout: Layout, target: Layout, has_batch: bool) -> None:
    image = torch.randn(2, 3, 4, 5) if has_batch else torch.randn(3, 4, 5)
    for partner_layout in ("nchw", "nhwc"):
        features, partner = as_layout(image, layout), as_layout(image, partner_layout)
        converted = convert(features, layout, target, partner, partner_layout)
        assert torch.equal(converted, as_layout(image, target))
        assert converted.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()


def test_tokens_of_both_networks_become_a_map_of_one_column() -> None:
    tokens = torch.randn(2, 6, 3)
    assert torch.equal(convert(tokens, "nlc", "nchw", tokens, "nlc"), tokens.mT[..., None])


def test_tokens_that_are_not_the_pixels_of_the_map_raise() -> None:
    with pytest.raises(
        ValueError, match=r"\(2, 17, 3\) have 17 tokens .* \(2, 3, 4, 4\) has 4 x 4 pixels: .*class tokens"
    ):
        convert(torch.ones(2, 17, 3), "nlc", "nchw", torch.ones(2, 3, 4, 4), "nchw")
    with pytest.raises(ValueError, match=r"\(2, 17, 3\) and \(2, 16, 3\) have 17 and 16 tokens: .*\(B, C, N\)"):
        convert(torch.ones(2, 17, 3), "nlc", "nchw", torch.ones(2, 16, 3), "nlc")


@pytest.mark.parametrize(
    ("shape", "layout", "likely"),
    [
        ((2, 16, 16, 96), "nchw", "nhwc"),  # stages of Swin and SwinIR
        ((2, 7, 7, 768), "nchw", "nhwc"),
        ((2, 64, 64, 180), "nchw", "nhwc"),
        ((16, 16, 96), "nchw", "nhwc"),
        ((2, 96, 16, 16), "nchw", None),
        ((2, 64, 64, 64), "nchw", None),
        ((2, 64, 32, 64), "nchw", None),
        ((2, 8, 8, 12), "nchw", None),
        ((2, 12, 16, 16), "nhwc", None),
        ((96, 16, 16), "nchw", None),
        ((2, 96, 16, 16), "nhwc", "nchw"),
        ((2, 16, 16, 96), "nhwc", None),
        ((2, 12, 16, 96), "nhwc", None),
        ((8, 196, 384), "nchw", "nlc"),  # tokens of a vision transformer, without and with its class token
        ((8, 197, 384), "nchw", "nlc"),
        ((8, 196, 384), "nhwc", "nlc"),
        ((8, 100, 100), "nchw", None),
        ((16, 36, 384), "nchw", None),
        ((8, 196, 384), "nlc", None),
        ((196, 384), "nlc", None),
        ((32, 198, 384), "nchw", "nlc"),  # DeiT with its distillation token
        ((32, 261, 384), "nchw", "nlc"),  # DINOv2 with four registers
        ((6, 129, 64), "nchw", "nlc"),  # of a wide image; maps with 6 channels are rare
        ((32, 128, 384), "nchw", None),
    ],
)
def test_likely_layout(shape: tuple[int, ...], layout: Layout, likely: Layout | None) -> None:
    assert likely_layout(torch.empty(shape), layout) == likely


@pytest.mark.parametrize(
    ("shape", "layout", "image", "likely"),
    [
        ((2, 64, 128, 192), "nchw", (512, 1024), "nhwc"),  # stage 2 of Swin for Cityscapes
        ((2, 16, 32, 768), "nchw", (512, 1024), "nhwc"),
        ((2, 192, 64, 128), "nchw", (512, 1024), None),
        ((2, 16, 32, 32), "nhwc", (64, 128), None),  # without the image: 16 channels of 32 x 32
        ((2, 16, 32, 32), "nhwc", None, "nchw"),
        ((2, 192, 65, 127), "nchw", (512, 1024), None),  # by a convolution without padding
        ((2, 65, 127, 192), "nchw", (512, 1024), "nhwc"),
        ((2, 32, 64, 128), "nchw", (512, 1024), None),  # either
        ((2, 16, 16, 19), "nchw", (64, 64), None),  # 19 classes are no usual width
        ((2, 512, 1, 28), "nchw", (32, 112), None),  # neither: pooled in one direction
        ((2, 16, 16, 96), "nchw", (64, 3), "nhwc"),  # neither: images (B, H, W, 3); the map is square
        ((8, 196, 384), "nchw", (224, 224), "nlc"),
        ((2, 128, 128), "nchw", (64, 128), "nlc"),  # the batch of the images
        ((32, 128, 128), "nchw", (64, 128), None),
    ],
)
def test_likely_layout_of_images_that_are_known(
    shape: tuple[int, ...], layout: Layout, image: tuple[int, int] | None, likely: Layout | None
) -> None:
    assert likely_layout(torch.empty(shape), layout, image and (2, 3, *image)) == likely


def test_one_of_two_features_is_not_enough_for_a_warning() -> None:
    """A map (B, C, H, W) with C = H that is not square: the other network has other channels."""
    student, teacher = torch.empty(2, 64, 64, 128), torch.empty(2, 256, 64, 128)
    assert not warn_if_unlikely(student, teacher, ("nchw", "nchw"))
    with pytest.warns(UserWarning, match="look like"):
        assert warn_if_unlikely(student, student, ("nchw", "nchw"))


def test_features_of_one_pixel_give_a_warning_once() -> None:
    loss_fn, student, teacher = SRPLoss(), torch.ones(2, 4, 1, 1, requires_grad=True), torch.ones(2, 6, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(student.detach(), teacher)  # a validation
        for options in ({"scope": "batch"}, {"normalize": "none"}):
            SRPLoss(**options)(student, teacher)
    with pytest.warns(UserWarning, match=r"\(2, 4, 1, 1\) have one pixel .* scope='batch'") as caught:
        loss_fn(student, teacher)
        assert loss_fn(student, teacher) == 0
    assert len(caught) == 1
