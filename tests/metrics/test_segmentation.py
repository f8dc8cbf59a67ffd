"""Segmentation scores: palettes, label maps, and FCN scores."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from sample_images import noise, save, save_all
from torch import Tensor, nn

from srpkd.data.images import DataError, ImageFiles
from srpkd.data.listing import image_files
from srpkd.data.synthetic import PALETTE
from srpkd.finite import NonFiniteError
from srpkd.metrics.segmentation import label_scores, load_segmenter, read_label_map, read_palette, segmentation_scores


def test_ignored_colours(tmp_path):
    (tmp_path / "palette.txt").write_text(
        "# a comment\n255 0 0 red\n0, 255, 0, green\n0 0 255\n0 0 0 void\n9 9 9 ignore\n"
    )
    palette = read_palette(str(tmp_path / "palette.txt"))
    assert palette.classes == 3 and palette.colours.tolist()[3] == [0, 0, 0]
    red, green, blue, void, grey = palette.colours.tolist()
    true = torch.tensor([[red, red, green, void]], dtype=torch.uint8).permute(2, 0, 1)
    pred = torch.tensor([[red, grey, green, blue]], dtype=torch.uint8).permute(2, 0, 1)
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


def test_fcn_scores_by_hand(tmp_path):
    save(tmp_path / "a.png", np.full((2, 4, 3), [[[64], [64], [192], [192]]]))
    labels = torch.tensor([[0, 0, 1, 0], [-1, 255, 2, 3]])

    def segmenter(photos):  # dark is 0, bright is 1
        dark = 0.5 - photos[:, 0]
        return torch.stack([dark, -dark, torch.full_like(dark, -1)], 1)

    assert segmentation_scores(ImageFiles([str(tmp_path / "a.png")]), [labels], segmenter) == {
        "mIoU": pytest.approx(100 * (2 / 3 + 1 / 3 + 0) / 3),
        "pixel accuracy": pytest.approx(100 * 3 / 5),
        "class accuracy": pytest.approx(100 * (2 / 3 + 1 + 0) / 3),
    }


def test_outputs_of_segmenters(tmp_path):
    photos = ImageFiles(image_files(save_all(tmp_path, noise(3))))
    labels = [torch.zeros(12, 12, dtype=torch.int64)] * len(photos)
    plain = segmentation_scores(photos, labels, Segmenter())
    assert plain == segmentation_scores(photos, labels, lambda x: {"out": Segmenter()(x), "aux": None})
    with pytest.raises(ValueError, match=r"the segmenter returned \(1, 3\): expected logits \(1, K, h, w\)"):
        segmentation_scores(photos, labels, lambda x: x.mean((2, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite(tmp_path, value):
    """Interpolation makes them NaN, which would win every comparison."""
    photos = ImageFiles(image_files(save_all(tmp_path, noise(1))))

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


def test_an_exported_program_moves_to_the_device(tmp_path):
    """Of its casts, factories and constants too. "meta" stands for a GPU: the program was exported on the CPU."""

    class Segmenter(nn.Module):
        def forward(self, photos: Tensor) -> Tensor:
            photos = photos.double().float() - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
            return photos + torch.arange(photos.shape[-1], device=photos.device)

    torch.export.save(torch.export.export(Segmenter(), (torch.rand(1, 3, 8, 8),)), tmp_path / "net.pt2")
    segmenter = load_segmenter(tmp_path / "net.pt2", "meta")
    assert segmenter(torch.rand(1, 3, 8, 8, device="meta")).is_meta


def test_label_maps(tmp_path):
    grey = save(tmp_path / "grey.png", np.array([[0, 1], [2, 255]]))
    assert read_label_map(grey).tolist() == [[0, 1], [2, 255]]
    (tmp_path / "palette").write_text("255 0 0 a\n0 255 0 b\n0 0 0 ignore")
    colour = save(tmp_path / "colour.png", np.array([[[255, 0, 0], [0, 250, 9]], [[0, 0, 0], [200, 30, 0]]]))
    assert read_label_map(colour, read_palette(str(tmp_path / "palette"))).tolist() == [[0, 1], [-1, 0]]
    with pytest.raises(DataError, match=r"is a colour image \(RGB\): give its --palette"):
        read_label_map(colour)


def gray_png(bits, numbers):
    """A gray PNG of few bits, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = numbers.shape
    packed = np.packbits(np.unpackbits(numbers[:, :, None], axis=2)[:, :, 8 - bits :].reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits(tmp_path, bits):
    """The classes are the stored numbers. Pillow scales them to 0..255."""
    classes = np.arange(35, dtype=np.uint8).reshape(5, 7) % 2**bits
    (tmp_path / "a.png").write_bytes(gray_png(bits, classes))
    maximum = 2**bits - 1
    (tmp_path / "a.pgm").write_bytes(b"P5 7 5 %d " % maximum + classes.tobytes())
    stored = classes.astype(bool) if bits == 1 else classes
    for name, photometric in (("a.tif", "minisblack"), ("b.tif", "miniswhite")):
        tifffile.imwrite(tmp_path / name, stored, bitspersample=bits, photometric=photometric, metadata=None)
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_label_map(str(path)), classes), path.name


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_label_maps_whose_zero_is_white(tmp_path, depth):
    classes = np.array([[0, 1], [2, 255]], depth)
    tifffile.imwrite(tmp_path / "a.tif", classes, photometric="miniswhite", metadata=None)
    assert read_label_map(str(tmp_path / "a.tif")).tolist() == classes.tolist()


def test_label_maps_with_an_uncommon_maximum(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 18 " + bytes([0, 5, 18]))
    (tmp_path / "b.pgm").write_bytes(b"P2 3 1 1000 0 5 18")
    (tmp_path / "c.pgm").write_bytes(b"P1 3 1 0 1 1")
    for name, classes in (("a.pgm", [[0, 5, 18]]), ("b.pgm", [[0, 5, 18]]), ("c.pgm", [[0, 1, 1]])):
        assert read_label_map(str(tmp_path / name)).tolist() == classes, name
