"""Anti-aliased sampling, compared with the filters applied pixel by pixel."""

import pytest
import torch

from srpkd.models.antialias import Downsample, Upsample


def mirror(index, size):
    index = abs(index)
    return 2 * (size - 1) - index if index >= size else index


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (2, 7)])
def test_downsample_is_a_weighted_mean_around_every_second_pixel(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    found = Downsample(3).double()(x)
    weight = {-1: 1 / 4, 0: 1 / 2, 1: 1 / 4}
    assert found.shape == (2, 3, (height + 1) // 2, (width + 1) // 2)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            expected = sum(
                weight[a] * weight[b] * x[:, :, mirror(2 * i + a, height), mirror(2 * j + b, width)]
                for a in weight
                for b in weight
            )
            torch.testing.assert_close(found[:, :, i, j], expected)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 2)])
def test_upsample_interpolates_between_the_nearest_pixels(height, width):
    """Outputs are a quarter of a pixel beside an input; outside the image, its border is repeated."""
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    found = Upsample(3).double()(x)
    assert found.shape == (2, 3, 2 * height, 2 * width)
    for i in range(2 * height):
        for j in range(2 * width):
            rows = [(i // 2, 3 / 4), (i // 2 + (1 if i % 2 else -1), 1 / 4)]
            columns = [(j // 2, 3 / 4), (j // 2 + (1 if j % 2 else -1), 1 / 4)]
            expected = sum(
                a * b * x[:, :, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                for row, a in rows
                for column, b in columns
            )
            torch.testing.assert_close(found[:, :, i, j], expected)


@pytest.mark.parametrize("layer", [Downsample, Upsample])
def test_a_constant_image_stays_constant(layer):
    assert torch.equal(layer(2)(torch.full((1, 2, 4, 6), 0.3)).unique(), torch.tensor([0.3]))


@pytest.mark.parametrize(
    ("layer", "size", "total"), [(Downsample, 3, 1.0), (Upsample, 4, 4.0)], ids=["downsample", "upsample"]
)
def test_filters_are_buffers_of_the_public_code(layer, size, total):
    state = layer(5).state_dict()
    assert list(state) == ["filt"] and state["filt"].shape == (5, 1, size, size)
    assert torch.equal(state["filt"].sum((1, 2, 3)), torch.full((5,), total))
    assert not list(layer(5).parameters())
