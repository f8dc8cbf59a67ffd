"""Pixels of images with more than 8 bits per channel, which Pillow reduces to 8 bits or does not read.

PNG is decoded by imagecodecs, TIFF by tifffile. 16-bit integers and floats in [0, 1] are supported, gray or RGB, with
or without alpha.
"""

from __future__ import annotations

import logging
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..extras import require

# tifffile logs each unusual tag at each reading. Without a handler, Python prints that, and without the file's name.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

SUPPORTED = "expected 8 or 16 bits per channel, or floats from 0 to 1, in gray or RGB"
_TURNS = {  # EXIF orientation -> (swap rows and columns, mirror rows, mirror columns)
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class UnsupportedImage(ValueError):
    """An image of a kind that cannot be used; the message says which and what is expected."""


class DeepPixels(NamedTuple):
    """Pixels as stored, upright.

    values: (H, W, C), integers or floats
    maximum: the value of white; None if the kind of numbers has no defined range
    colours: 1 or 3
    alpha: "", "straight" or "premultiplied"; alpha is the channel after the colours
    inverted: 0 is white
    """

    values: np.ndarray
    maximum: float | None
    colours: int
    alpha: str = ""
    inverted: bool = False

    def colour_and_alpha(self) -> tuple[Tensor, Tensor | None]:
        """Return (C, H, W) and alpha (1, H, W) or None, float64 in [0, 1].

        Raises:
            UnsupportedImage: the numbers have no defined range, or are outside of it.
        """
        if self.maximum is None:
            raise UnsupportedImage(f"{self.values.dtype} numbers; {SUPPORTED}")
        used = self.values[:, :, : self.colours + bool(self.alpha)].astype(np.float64)
        low, high = float(used.min()), float(used.max())
        if not (low >= 0 and high <= self.maximum):  # also false for NaN
            raise UnsupportedImage(
                f"values from {low:g} to {high:g}; {SUPPORTED}: scale the values first, for example by the largest"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(used.transpose(2, 0, 1))) / self.maximum
        colour, alpha = pixels[: self.colours], pixels[self.colours :] if self.alpha else None
        if self.alpha == "premultiplied" and alpha is not None:
            colour = torch.where(alpha > 0, colour / alpha, 0.0).clamp(max=1.0)
        return 1 - colour if self.inverted else colour, alpha


def bits_per_channel(image: Image.Image) -> int:
    """Return the bits per channel of an image that Pillow has opened and not decoded yet."""
    bits = 8
    match image.format:
        case "PNG":
            bits = _start(image, 25)[24]
        case "TIFF":
            bits = max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
        case "PPM":
            bits = _pnm_maximum(image).bit_length()
        case "JPEG2000":
            bits = _jpeg2000_bits(_start(image, 1 << 16))
        case "AVIF":
            bits = _avif_bits(_start(image, 1 << 16))
    return max(bits, 16) if image.mode[0] in "IF" else bits


def white_level(image: Image.Image, bits: int) -> int:
    """Return the number that stands for white in a gray image of at most 8 bits, opened by Pillow and not decoded yet.

    Pillow scales the numbers of a gray image to 0..255, or those of a single bit to False and True.
    """
    if image.format == "PPM" and image.mode == "L":
        return _pnm_maximum(image)
    return 1 if image.mode == "1" else 2 ** min(bits, 8) - 1


def is_inverted(image: Image.Image) -> bool:
    """Return whether 0 is white in the file of a gray image of at most 8 bits; Pillow inverts such images."""
    if image.format == "TIFF":
        return image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    return image.format == "PPM" and image.mode == "1"


def decode_deep(path: str | os.PathLike[str], image: Image.Image | None, frame: int, orientation: int) -> DeepPixels:
    """Decode a frame of an image with more than 8 bits per channel, upright.

    Args:
        path: the file.
        image: what Pillow has opened, not decoded yet; None if Pillow cannot, which happens with TIFF only.
        frame: number of the page or frame.
        orientation: EXIF orientation; that of a TIFF is read here.

    Raises:
        UnsupportedImage: the kind of image is not supported.
        ImportError: tifffile or imagecodecs is not installed.
    """
    if image is None or image.format == "TIFF":
        return _decode_tiff(path, frame)
    if frame:
        raise UnsupportedImage(f"further frames of a 16-bit {image.format} cannot be read: convert them to TIFF pages")
    match image.format:
        case "PNG":
            library = require("imagecodecs", "train", "reading 16-bit PNG")
            with open(path, "rb") as file:
                values = library.png_decode(file.read())
            values = values[:, :, None] if values.ndim == 2 else values
            channels = values.shape[2]
            pixels = DeepPixels(values, 65535.0, 1 if channels < 3 else 3, "" if channels % 2 else "straight")
        case "PPM":
            pixels = _decode_pnm(path, image)
        case _:
            raise UnsupportedImage(
                f"{image.format} of more than 8 bits per channel; convert it to a 16-bit PNG or TIFF"
            )
    if pixels.values.shape[:2] != image.size[::-1]:
        raise ValueError(f"decoded {pixels.values.shape[:2]}, but the header has {image.size[::-1]}")
    return pixels._replace(values=turn_upright(pixels.values, orientation))


def turn_upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to (H, W, C); unknown numbers change nothing."""
    swap, rows, columns = _TURNS.get(orientation, (False, False, False))
    values = values.swapaxes(0, 1) if swap else values
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


class TiffHeader(NamedTuple):
    """Of a page: (width, height) upright, the number of pages, a short description, and the ICC profile."""

    size: tuple[int, int]
    frames: int
    mode: str
    icc_profile: bytes | None


def read_tiff_header(path: str | os.PathLike[str]) -> TiffHeader:
    """Read the header of a TIFF's first page."""
    with require("tifffile", "train", "reading this TIFF").TiffFile(path) as file:
        page = file.pages[0]
        size = page.imagewidth, page.imagelength
        profile = page.tags.get(34675)
        return TiffHeader(
            size[::-1] if _tiff_orientation(page) in (5, 6, 7, 8) else size,
            len(file.pages),
            f"{page.dtype} {getattr(page.photometric, 'name', page.photometric)}",
            bytes(profile.value) if profile else None,
        )


def _decode_tiff(path: str | os.PathLike[str], frame: int) -> DeepPixels:
    with require("tifffile", "train", "reading TIFF of more than 8 bits per channel").TiffFile(path) as file:
        page: Any = file.pages[frame]
        end = os.path.getsize(path)
        segments = list(zip(page.dataoffsets, page.databytecounts))
        # tifffile fills missing data with zeros
        if any(not offset or not count or offset + count > end for offset, count in segments):
            raise ValueError("its data ends early")
        if not page.is_contiguous and len(segments) < math.prod(page.chunked):
            raise ValueError(f"it has {len(segments)} of {math.prod(page.chunked)} strips or tiles")
        values = page.asarray()
        photometric, extra = int(page.photometric), page.extrasamples
        if photometric not in (0, 1, 2) or page.axes not in ("YX", "YXS", "SYX") or page.dtype.kind not in "uif":
            name = getattr(page.photometric, "name", photometric)
            raise UnsupportedImage(f"TIFF of {page.bitspersample} bits, {name}, axes {page.axes}; {SUPPORTED}")
        values = values[:, :, None] if page.axes == "YX" else values
        values = values.transpose(1, 2, 0) if page.axes == "SYX" else values
        maximum = None
        if page.dtype.kind == "f":
            maximum = 1.0
        elif page.dtype.kind == "u" and page.bitspersample <= 16:
            maximum = 2.0**page.bitspersample - 1
        alpha = {1: "premultiplied", 2: "straight"}.get(int(extra[0]), "") if extra else ""
        return DeepPixels(
            turn_upright(values, _tiff_orientation(page)),
            maximum,
            3 if photometric == 2 else 1,
            alpha,
            inverted=photometric == 0,
        )


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag else 1


def _pnm_maximum(image: Image.Image) -> int:
    """Return the largest level of a PBM, PGM or PPM file, as its header says."""
    arguments = image.tile[0].args  # type: ignore[attr-defined]
    if isinstance(arguments, tuple):
        return int(arguments[1]) if image.mode != "F" else 65535
    return 65535 if arguments == "I;16B" else 255


def _decode_pnm(path: str | os.PathLike[str], image: Image.Image) -> DeepPixels:
    if image.mode == "F":
        return DeepPixels(np.array(image)[:, :, None], 1.0, 1)
    maximum, offset = _pnm_maximum(image), image.tile[0].offset  # type: ignore[attr-defined]
    channels = 3 if image.mode == "RGB" else 1
    with open(path, "rb") as file:
        plain = file.read(2) in (b"P2", b"P3")
        file.seek(offset)
        data = file.read()
    count = image.width * image.height * channels
    if plain:
        numbers = re.sub(rb"#[^\r\n]*", b" ", data).split()[:count]
        values = np.array([int(number) for number in numbers], dtype=np.int64)
    else:
        values = np.frombuffer(data[: 2 * count], ">u2")
    if len(values) < count:
        raise ValueError("its data ends early")
    return DeepPixels(values.astype(np.int64).reshape(image.height, image.width, channels), float(maximum), channels)


def _start(image: Image.Image, length: int) -> bytes:
    """Return the first bytes of the file that Pillow has open."""
    file = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    try:
        return bytes(file.read(length))
    finally:
        file.seek(position)


def _jpeg2000_bits(start: bytes) -> int:
    """Return the largest number of bits per component, from the SIZ segment (ISO/IEC 15444-1, A.5.1)."""
    begin = start.find(b"\xff\x4f\xff\x51")
    if begin < 0:
        return 8
    components = int.from_bytes(start[begin + 40 : begin + 42], "big")
    depths = start[begin + 42 : begin + 42 + 3 * components : 3]
    return max(((depth & 0x7F) + 1 for depth in depths), default=8)


def _avif_bits(start: bytes) -> int:
    """Return the largest number of bits per channel, from the pixi box (ISO/IEC 23008-12, 6.5.6)."""
    begin = start.find(b"pixi")
    channels = start[begin + 8] if 0 <= begin < len(start) - 9 else 0
    return max(start[begin + 9 : begin + 9 + channels], default=8)
