"""Segmentation scores: palettes, label maps, and FCN scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_images import noise, save, save_all
from torch import nn

from srpkd.data.images import DataError, ImageFiles, find_images
from srpkd.data.synthetic import PALETTE
from srpkd.finite import NonFiniteError
from srpkd.metrics.segmentation import label_scores, load_segmenter, read_label_map, read_palette, segmentation_scores


def test_ignored_colours(tmp_path):
    (tmp_path / "palette.txt").write_text("# a comment\n255 0 0 red\n0, 255, 0, green\n0 0 255\n0 0 0 void\n")
    palette = read_palette(str(tmp_path / "palette.txt"))
    assert palette.classes == 3 and palette.colours.tolist()[3] == [0, 0, 0]
    red, green, blue, void = palette.colours.tolist()
    true = torch.tensor([[red, red, green, void]], dtype=torch.uint8).permute(2, 0, 1)
    pred = torch.tensor([[red, void, green, blue]], dtype=torch.uint8).permute(2, 0, 1)
    # 1 of 2 red pixels is found, and all green ones; blue has no true pixels; the last pixel is ignored
    assert label_scores([(pred, true)], palette) == {
        "mIoU": pytest.approx(100 * (1 / 2 + 1) / 2),
        "pixel accuracy": pytest.approx(100 * 2 / 3),
        "class accuracy": pytest.approx(75),
    }


def test_palettes():
    cityscapes = read_palette("cityscapes")
    assert cityscapes.classes == 19 and len(torch.unique(cityscapes.colours, dim=0)) == 29
    road, bicycle, black = (cityscapes.colours[index].tolist() for index in (0, 18, 19))
    assert (road, bicycle, black) == ([128, 64, 128], [119, 11, 32], [0, 0, 0])
    assert torch.equal(read_palette("synthetic").colours, PALETTE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected synthetic, cityscapes, or a file"),
        ("", "has no colours to score"),
        ("1 2", "line '1 2', expected 'R G B name'"),
        ("1 2 256 x", "numbers of 0 to 255"),
        ("0 0 0 void", "has no colours to score"),
    ],
)
def test_invalid_palettes(tmp_path, text, message):
    if text is not None:
        (tmp_path / "p").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_palette(str(tmp_path / "p"))


class Segmenter(nn.Module):
    """Logits (B, 3, H/2, W/2) that are proportional to red, green and blue."""

    def forward(self, photos):
        return F.avg_pool2d(photos, 2) * 10


def test_outputs_of_segmenters(tmp_path):
    photos = ImageFiles(find_images(str(save_all(tmp_path, noise(3)))))
    labels = [torch.zeros(12, 12, dtype=torch.int64)] * len(photos)
    plain = segmentation_scores(photos, labels, Segmenter())
    assert plain == segmentation_scores(photos, labels, lambda x: {"out": Segmenter()(x), "aux": None})
    with pytest.raises(ValueError, match=r"the segmenter returned \(1, 3\): expected logits \(1, K, h, w\)"):
        segmentation_scores(photos, labels, lambda x: x.mean((2, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite(tmp_path, value):
    """Interpolation makes them NaN, which would win every comparison."""
    photos = ImageFiles(find_images(str(save_all(tmp_path, noise(1)))))

    def segmenter(photos):
        return torch.stack([photos[:, 0], torch.full_like(photos[:, 1], value)], 1)

    labels = [torch.zeros(photos[0].shape[1:], dtype=torch.int64)]
    with pytest.raises(NonFiniteError, match="the segmenter's output is not finite"):
        segmentation_scores(photos, labels, segmenter)


def test_invalid_segmenter_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_segmenter(tmp_path / "net.pt")
    for name in ("net.pt", "net.pt2"):
        torch.save({}, tmp_path / name)
        with pytest.raises(ValueError, match=r"expected TorchScript .* or as .pt2 an exported program"):
            load_segmenter(tmp_path / name)


def test_label_maps(tmp_path):
    grey = save(tmp_path / "grey.png", np.array([[0, 1], [2, 255]]))
    assert read_label_map(grey).tolist() == [[0, 1], [2, 255]]
    (tmp_path / "palette").write_text("255 0 0 a\n0 255 0 b\n0 0 0 ignore")
    colour = save(tmp_path / "colour.png", np.array([[[255, 0, 0], [0, 250, 9]], [[0, 0, 0], [200, 30, 0]]]))
    assert read_label_map(colour, read_palette(str(tmp_path / "palette"))).tolist() == [[0, 1], [-1, 0]]
    with pytest.raises(DataError, match=r"is a colour image \(RGB\): give its --palette"):
        read_label_map(colour)
