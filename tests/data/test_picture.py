"""Levels of 8-bit and deeper images on common scales, and the nearest colour of a palette."""

import numpy as np
import pytest
import torch
from PIL import Image

from srpkd.data.picture import byte_levels, levels_to_255, nearest_colour, resize_picture, unit_levels
from srpkd.data.synthetic import PALETTE, classes_of

BYTES = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)


def test_scales():
    deep = BYTES.double() * 257 / 65535
    assert torch.equal(unit_levels(BYTES), BYTES.double() / 255) and torch.equal(unit_levels(deep), deep)
    assert levels_to_255(BYTES) is BYTES and torch.allclose(levels_to_255(deep), BYTES.double())
    assert byte_levels(BYTES) is BYTES and torch.equal(byte_levels(deep), BYTES)
    assert byte_levels(torch.tensor([0.4, 0.6]) / 255).tolist() == [0, 1]


@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_deep_pictures_are_scaled_like_those_of_8_bits(resample):
    pixels = torch.randint(256, (9, 14, 3), dtype=torch.uint8)
    expected = np.array(resize_picture(Image.fromarray(pixels.numpy()), 7, 6, resample)) / 255
    found = resize_picture(pixels.permute(2, 0, 1).double() / 255, 7, 6, resample)
    np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=1.01 / 255)


def test_nearest_colour():
    palette = torch.tensor([[0, 0, 0], [255, 0, 0], [200, 200, 200]], dtype=torch.uint8)
    pixels = torch.tensor([[10, 5, 0], [200, 30, 20], [255, 255, 255], [128, 0, 0]], dtype=torch.uint8)
    expected = (pixels[:, None].double() - palette.double()).norm(dim=2).argmin(1)
    assert expected.tolist() == [0, 1, 2, 1]
    assert nearest_colour(pixels.T.view(1, 3, 2, 2), palette).flatten().tolist() == [0, 1, 2, 1]
    images = torch.rand(2, 3, 5, 7) * 2 - 1
    distances = torch.cdist(images.movedim(1, -1).double(), PALETTE.double() / 127.5 - 1)
    assert torch.equal(nearest_colour(images, PALETTE / 127.5 - 1), distances.argmin(-1))
    assert torch.equal(nearest_colour(images, PALETTE / 127.5 - 1), classes_of(images))
