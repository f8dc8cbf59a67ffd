"""Image files from outputs: depth, alpha channels, colour profiles and frames."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from srpkd.data.encode import Source, encode, lost_properties, read_source
from srpkd.data.images import open_image

imagecodecs = pytest.importorskip("imagecodecs")

OUTPUT = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1  # some values are clipped
UNIT = ((OUTPUT.double() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
ALPHA = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits(channels):
    expected = np.rint(UNIT[:, :, :channels] * 65535).astype(np.uint16)
    expected = expected[:, :, 0] if channels == 1 else expected
    source = Source(bits=16)
    outputs = [OUTPUT[:channels]]
    np.testing.assert_array_equal(imagecodecs.png_decode(encode(outputs, source, "PNG")), expected)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(encode(outputs, source, "TIFF"))), expected)
    header, _, data = encode(outputs, source, "PPM").partition(b"65535\n")
    assert header == f"P{5 if channels == 1 else 6}\n8 6\n".encode()
    np.testing.assert_array_equal(np.frombuffer(data, ">u2").reshape(expected.shape), expected)
    assert not lost_properties(outputs, source, "PNG")
    assert lost_properties(outputs, source, "JPEG") == ["the depth of 16 bits per channel (JPEG is written with 8)"]
    assert opened(encode(outputs, source, "JPEG")).size == (8, 6)


def test_floats():
    source = Source(bits=32)
    found = tifffile.imread(io.BytesIO(encode([OUTPUT], source, "TIFF")))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, UNIT.astype(np.float32))
    assert imagecodecs.png_decode(encode([OUTPUT], source, "PNG")).dtype == np.uint16
    assert not lost_properties([OUTPUT], source, "TIFF")
    lost = ["the depth of 32 bits per channel (PPM is written with 16)"]  # such as a.ppm with the content of a .pfm
    assert lost_properties([OUTPUT], source, "PPM") == lost


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000", "JPEG", "BMP", "PPM"])
def test_alpha(format, channels):
    source, outputs = Source(alpha=[ALPHA]), [OUTPUT[:channels]]
    image = opened(encode(outputs, source, format))
    assert image.format == format and image.size == (8, 6)
    if lost_properties(outputs, source, format):
        assert lost_properties(outputs, source, format) == [f"the alpha channel ({format} has none)"]
        assert format in ("JPEG", "BMP", "PPM")
    else:
        found = np.array(image.convert("RGBA"))[:, :, 3]
        exact = np.array(ALPHA)
        expected = np.where(exact > 127, 255, 0) if format == "GIF" else exact
        assert np.abs(found.astype(int) - expected).max() <= (2 if format == "AVIF" else 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_alpha_and_profile(format, channels):
    alpha = torch.arange(48, dtype=torch.float64).view(1, 6, 8) * 1000 / 65535
    source = Source(16, [alpha], PROFILE)
    content = encode([OUTPUT[:channels]], source, format)
    pixels = imagecodecs.png_decode(content) if format == "PNG" else tifffile.imread(io.BytesIO(content))
    if format == "TIFF":
        assert tifffile.TiffFile(io.BytesIO(content)).pages[0].extrasamples == (tifffile.EXTRASAMPLE.UNASSALPHA,)
    np.testing.assert_array_equal(pixels[:, :, channels], np.arange(48).reshape(6, 8) * 1000)
    np.testing.assert_array_equal(pixels[:, :, :channels], np.rint(UNIT[:, :, :channels] * 65535))
    lost = lost_properties([OUTPUT[:channels]], source, format)
    if channels == 3:
        assert not lost and opened(content).info["icc_profile"] == PROFILE
    else:
        assert lost == ["the ICC profile (it is not for these channels)"]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF", "GIF", "BMP"])
def test_profile(format):
    source = Source(icc_profile=PROFILE)
    found = opened(encode([OUTPUT], source, format)).info.get("icc_profile")
    lost = lost_properties([OUTPUT], source, format)
    if format in ("GIF", "BMP"):
        assert not found and lost == [f"the ICC profile ({format} files hold none)"]
    else:
        assert found == PROFILE and not lost


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "GIF", "AVIF"])
def test_frames(format):
    outputs = [OUTPUT, -OUTPUT, OUTPUT.flip(2)]
    source = Source(alpha=[None] * 3, durations=[100, 200, 300] if format != "TIFF" else [], loop=0)
    image = opened(encode(outputs, source, format))
    assert image.n_frames == 3
    for index, output in enumerate(outputs):
        image.seek(index)
        if format != "TIFF":
            image.load()
            assert image.info["duration"] == 100 * (index + 1)
        if format in ("PNG", "TIFF", "WEBP"):
            expected = ((output + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0)
            np.testing.assert_array_equal(np.array(image.convert("RGB")), expected)


def test_a_gif_frame_does_not_show_through_the_next():
    opaque = np.repeat([[255, 0]], 4, 1).repeat(6, 0).astype(np.uint8)  # the left half
    alphas = [Image.fromarray(np.ascontiguousarray(mask)) for mask in (opaque, opaque[:, ::-1])]
    image = opened(encode([OUTPUT] * 2, Source(alpha=alphas), "GIF"))
    for index, alpha in enumerate(alphas):
        image.seek(index)
        assert image.convert("RGBA").getchannel("A").tobytes() == alpha.tobytes()


def test_deep_pages():
    content = encode([OUTPUT, -OUTPUT], Source(16, [None, None]), "TIFF")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        assert [page.dtype for page in file.pages] == [np.uint16] * 2
        np.testing.assert_array_equal(file.pages[0].asarray(), np.rint(UNIT * 65535))


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 16), (np.float32, 32)])
def test_depth_of_a_tiff_that_tifffile_reads(tmp_path, dtype, bits):
    path = tmp_path / "0.tif"
    compression = "png" if bits < 32 else None
    tifffile.imwrite(path, np.ones((6, 8, 3), dtype), photometric="rgb", compression=compression)
    with open_image(path) as image:
        assert image.read_alpha() is None and read_source(image, 1)[1].bits == bits
