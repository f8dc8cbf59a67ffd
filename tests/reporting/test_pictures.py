"""Images and relation maps as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srpkd.reporting import pictures
from srpkd.reporting.pictures import mark_pixel, relation_picture, relation_row, save_image


@pytest.mark.parametrize("normalize", ["row", "cosine", "none"])
def test_relation_row_is_a_row_of_the_matrix(normalize: str) -> None:
    feature = np.random.default_rng(0).normal(size=(5, 3, 4))
    feature[:, 2, 1] = 0  # a zero-norm pixel
    q = feature.reshape(5, 12).T
    gram = q @ q.T
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore"):
        matrix = {
            "row": gram / np.linalg.norm(gram, axis=1, keepdims=True),
            "cosine": gram / (norms[:, None] * norms[None, :]),
            "none": gram,
        }[normalize]
    for y, x in [(0, 0), (1, 3), (2, 1)]:
        row = relation_row(torch.tensor(feature), (y, x), normalize)
        assert row.dtype == torch.float32 and row.shape == (3, 4)
        expected = np.nan_to_num(matrix[y * 4 + x]).reshape(3, 4)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["row", "cosine", "none"])
def test_relation_picture_colours(normalize: str, dtype: torch.dtype) -> None:
    # columns of the map: similar, unrelated, opposite
    feature = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=dtype, requires_grad=True)
    feature = feature[:, None].expand(2, 3, 3)
    picture = relation_picture(feature, (0, 0), (30, 60), normalize).astype(int)
    assert picture.shape == (30, 60, 3)
    red, white, blue = picture[25, 5], picture[25, 30], picture[25, 55]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50 and white.min() > 240
    assert (picture[20:, :20] == red).all() and (picture[20:, 40:] == blue).all()  # nearest neighbour
    assert (picture[5, 10] == red).all() and not picture[10, 5].any()  # the cell is visible and framed
    turned = relation_picture(feature.mT, (0, 0), (60, 30), normalize)
    np.testing.assert_array_equal(turned, picture.swapaxes(0, 1))


def test_relation_picture_that_is_smaller_than_the_map_shows_averages() -> None:
    # columns of the map: similar and opposite in turn, then similar; the last one is the pixel
    feature = torch.tensor([1.0, -1.0] * 100 + [1.0] * 200).expand(1, 300, 400)
    picture = relation_picture(feature, (0, 399), (75, 100), "none").astype(int)
    assert picture.shape == (75, 100, 3) and (picture[5:, :50].min(-1) > 240).all()
    assert (picture[5:, 50:95, 0] > picture[5:, 50:95, 2] + 50).all()
    assert not picture[1, 98:].any() and picture[0, 99].any()  # its frame, and its cell


@pytest.mark.parametrize("size", [(4000, 6000), (6000, 4000), (1280, 1280), (1281, 1280), (40, 24), (1, 9000)])
def test_size_of_a_preview(size: tuple[int, int]) -> None:
    height, width = pictures.preview_size(size)
    assert max(height, width) == min(1280, max(size))
    assert abs(height - width * size[0] / size[1]) <= 0.5 or height == 1
    if max(size) <= 1280:
        assert (height, width) == size


def test_a_preview_is_an_average() -> None:
    image = torch.rand(3, 2, 2560)
    torch.testing.assert_close(pictures.preview(image), image.unflatten(2, (1280, 2)).mean((1, 3))[:, None])
    small = image[:, :, :1280]
    assert pictures.preview(small) is small


def test_relation_picture_of_zero_features_is_white() -> None:
    picture = relation_picture(torch.zeros(3, 4, 4), (0, 0), (16, 16), "row")
    assert (picture[8:, 8:] > 240).all()


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (3, 3), (37, 64)])
@pytest.mark.parametrize("pixel", [(0, 0), (4, 6), (2, 3)])
def test_frame_surrounds_the_cell_of_the_pixel(size: tuple[int, int], pixel: tuple[int, int]) -> None:
    """The frame is outside of the cell and thinner than 5 pixels, also if the image is smaller than the map."""
    image = torch.zeros(3, *size)
    image[0] = 0.5
    marked = mark_pixel(image, pixel, (8, 5, 7))
    framed = (marked != pictures.to_pixels(image)).any(-1)
    assert marked.shape == (*size, 3) and framed.any()
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, (5, 7)))
    cell = (rows == pixel[0])[:, None] & (columns == pixel[1])
    assert not (framed & cell).any()
    near = [np.flatnonzero(inside.any(axis)) for inside in (framed | cell,) for axis in (1, 0)]
    assert all(len(places) <= n // cells + 1 + 4 for places, n, cells in zip(near, size, (5, 7)))


def test_save_image(tmp_path: Path) -> None:
    ramp = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, float("nan")], dtype=torch.float64, requires_grad=True)
    path = save_image(ramp.expand(1, 2, 6), tmp_path / "new" / "ramp.png")
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2, 6, 3) and pixels[0, :, 1].tolist() == [0, 0, 128, 255, 255, 0]
    colour = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 2, 2)
    save_image(colour, path)
    assert np.asarray(Image.open(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 4
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (np.asarray(Image.open(save_image(array, path))) == array).all()
