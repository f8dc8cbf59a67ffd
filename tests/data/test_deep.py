"""Images of more than 8 bits per channel, decoded at full precision or refused."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sample_images import save_deep

from srpkd.data.images import DataError, ImageFiles, open_image, read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 65536, (9, 14, 3), dtype=np.uint16)
FLOATS = RNG.uniform(0, 1, (9, 14, 3))


def unit(pixels, maximum=65535):
    """(H, W, C) -> (3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float64) / maximum).permute(2, 0, 1).expand(3, -1, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("0.png", {}),
        ("0.tif", {}),
        ("0.tif", {"byteorder": ">"}),
        ("0.tif", {"compression": "lzw", "predictor": True}),
        ("0.tif", {"compression": "zlib"}),
        ("0.tif", {"tile": (16, 16)}),
        ("0.tif", {"bigtiff": True}),
    ],
)
def test_sixteen_bit_files(tmp_path, name, options, channels):
    pixels = RGB[:, :, :channels]
    picture = read_image(save_deep(tmp_path / name, pixels, **options))
    assert picture.dtype == torch.float64 and torch.equal(picture, unit(pixels))
    (levels,) = ImageFiles([str(tmp_path / name)])
    assert torch.equal(levels, unit(pixels))


def test_other_tiffs(tmp_path):
    path = tmp_path / "0.tif"
    tifffile.imwrite(path, RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", metadata=None)
    assert torch.equal(read_image(path), unit(RGB))
    tifffile.imwrite(path, 65535 - RGB[:, :, 0], photometric="miniswhite", metadata=None)
    torch.testing.assert_close(read_image(path), unit(RGB[:, :, :1]))
    tifffile.imwrite(path, RGB[:, :, 0] // 16, photometric="minisblack", bitspersample=12, metadata=None)
    assert torch.equal(read_image(path), unit(RGB[:, :, :1] // 16, 4095))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats(tmp_path, dtype, channels):
    pixels = FLOATS[:, :, :channels].astype(dtype)
    assert torch.equal(read_image(save_deep(tmp_path / "0.tif", pixels)), unit(pixels, 1))


@pytest.mark.parametrize("maximum", [65535, 1023])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_pnm(tmp_path, maximum, plain, channels):
    pixels = RGB[:, :, :channels].astype(int) % (maximum + 1)
    kind = (2 if plain else 5) + (channels == 3)
    data = " ".join(map(str, pixels.ravel())).encode() if plain else pixels.astype(">u2").tobytes()
    path = tmp_path / "0.ppm"
    path.write_bytes(f"P{kind}\n# a comment\n14 9\n{maximum}\n".encode() + data)
    assert torch.equal(read_image(path), unit(pixels, maximum))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"0.ppm: damaged or truncated \(its data ends early\)"):
        read_image(path)


@pytest.mark.parametrize("name", ["0.png", "0.tif"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha(tmp_path, name, channels):
    pixels = RNG.integers(0, 65536, (9, 14, channels), dtype=np.uint16)
    options = {} if name == "0.png" else {"extrasamples": ["unassalpha"], "planarconfig": "contig"}
    with open_image(save_deep(tmp_path / name, pixels, **options)) as image:
        assert torch.equal(image.read(), unit(pixels[:, :, :-1]))
        assert torch.equal(image.read_alpha(), unit(pixels[:, :, -1:])[:1])


def test_premultiplied_alpha(tmp_path):
    pixels = np.array([[[20000, 10000, 0, 40000], [0, 0, 0, 0]]], np.uint16)
    with open_image(save_deep(tmp_path / "0.tif", pixels, extrasamples=["assocalpha"])) as image:
        torch.testing.assert_close(image.read()[:, 0].T, torch.tensor([[0.5, 0.25, 0], [0, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (FLOATS * 255, {}, r"values from .* to 25\d.*; expected 8 or 16 bits per channel, or floats from 0 to 1"),
        (FLOATS - 0.5, {}, r"values from -0\.\d+ to"),
        (np.where(FLOATS > 0.9, np.nan, FLOATS), {}, "values from nan to nan"),
        (RGB.astype(np.uint32), {}, "uint32 numbers; expected 8 or 16 bits"),
        (RGB.astype(np.int16), {}, "int16 numbers; expected 8 or 16 bits"),
        (RNG.integers(0, 9, (9, 14, 4), dtype=np.uint16), {"photometric": "separated"}, "TIFF of 16 bits, SEPARATED"),
    ],
)
def test_other_kinds_are_refused(tmp_path, pixels, options, message):
    path = save_deep(tmp_path / "0.tif", pixels, **options)
    with pytest.raises(DataError, match=rf"0\.tif: {message}"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jp2", "avif"])
def test_deep_files_that_would_lose_precision_are_refused(tmp_path, suffix):
    path = tmp_path / f"0.{suffix}"
    if suffix == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(RGB, bitspersample=16, codecformat="jp2", level=0))
    else:
        path.write_bytes(imagecodecs.avif_encode(RGB // 64, bitspersample=10))
    with pytest.raises(DataError, match=r"of more than 8 bits per channel; convert it to a 16-bit PNG or TIFF"):
        read_image(path)


@pytest.mark.parametrize("name", ["0.png", "0.tif", "1.tif"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    save_deep(path, FLOATS if name == "1.tif" else RGB)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="damaged or truncated"):
        read_image(path)


@pytest.mark.parametrize("layout", [{"rowsperstrip": 3, "compression": "lzw"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("missing", ["data", "entry"])
def test_tiffs_that_lack_a_strip_or_tile(tmp_path, layout, missing):
    """tifffile would fill it with zeros."""
    path = save_deep(tmp_path / "0.tif", np.tile(RGB, (1, 2, 1)), photometric="rgb", **layout)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in list(file.pages[0].tags):
            if tag.name.endswith("Offsets"):
                tag.overwrite((*tag.value[:-1], 0) if missing == "data" else tag.value[:-1])
    message = {"data": "its data ends early", "entry": r"it has \d of \d strips or tiles"}[missing]
    with pytest.raises(DataError, match=message):
        read_image(path)


def test_claimed_size_of_a_float_tiff_is_limited(tmp_path, monkeypatch):
    path = save_deep(tmp_path / "0.tif", FLOATS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match="far too large"):
        read_image(path)


def exif_chunk(orientation: int) -> bytes:
    body = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    "kind", ["png 16", "late png 16", "tif 16", "tif float", "tif 8", "jpg 8", "png 8", "late png 8"]
)
@pytest.mark.parametrize("orientation", range(1, 10))
def test_orientation_is_applied_once(tmp_path, kind, orientation):
    """The eight orientations turn a picture in the same way in all formats; 9 is none."""
    turned = {  # what is stored -> what is displayed
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }.get(orientation, lambda a: a)
    _, late, kind = kind.rpartition("late ")
    suffix, depth = kind.split()
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16], stored[8:, :16], stored[8:, 16:] = 255, 85, 170
    path = tmp_path / f"0.{suffix}"
    if suffix == "tif":
        pixels = {"8": stored, "16": stored.astype(np.uint16) * 257, "float": stored.astype(np.float64) / 255}[depth]
        save_deep(path, pixels, extratags=[(274, "H", 1, orientation, True)])
    elif suffix == "jpg":
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif, quality=100, subsampling=0)
    else:
        if depth == "8":
            Image.fromarray(stored).save(path)
        else:
            save_deep(path, stored.astype(np.uint16) * 257)
        png = path.read_bytes()
        place = len(png) - 12 if late else 33
        path.write_bytes(png[:place] + exif_chunk(orientation) + png[place:])
    expected = turned(stored)
    with open_image(path) as image:
        if not late:
            assert image.size == (expected.shape[1], expected.shape[0])
        picture = image.read()
    found = np.array(picture) if depth == "8" else (picture * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=2)


def test_pages_of_different_depths(tmp_path):
    path = tmp_path / "0.tif"
    pages = [(RGB >> 8).astype(np.uint8), RGB, FLOATS]
    with tifffile.TiffWriter(path) as file:
        for pixels in pages:
            file.write(pixels, photometric="rgb", metadata=None, extratags=[(274, "H", 1, 6, True)])
    with open_image(path) as image:
        assert image.frames == 3 and image.size == (9, 14)
        for frame in (0, 2, 1, 0):
            picture, expected = image.read(frame), np.rot90(pages[frame], -1)
            if frame:
                assert torch.equal(picture, unit(expected, 65535 if frame == 1 else 1))
            else:
                np.testing.assert_array_equal(picture, expected)
