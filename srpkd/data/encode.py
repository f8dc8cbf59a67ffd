"""Image files from a network's outputs: depth, alpha channel, colour profile and frames as in the source image."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..extras import require
from .images import ImageFile
from .picture import Picture, byte_levels, picture_to_levels, tensor_to_bytes, unit_levels

# what the files of a format hold
WITH_ALPHA = {"AVIF", "GIF", "JPEG2000", "PNG", "TIFF", "WEBP"}
WITH_PROFILE = {"AVIF", "JPEG", "PNG", "TIFF", "WEBP"}
MOST_BITS = {"PNG": 16, "PPM": 16, "TIFF": 32}  # per channel; other formats have 8
WITH_FRAMES = {"AVIF", "GIF", "PNG", "TIFF", "WEBP"}
LOSSY = {"AVIF", "GIF", "JPEG"}  # of 8 bits; a GIF has 256 colours
PROFILE_SPACE = {1: b"GRAY", 3: b"RGB "}  # by the number of channels; at byte 16 of an ICC profile

_QUALITY: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95},
}


@dataclass
class Source:
    """What the result takes over from the image that was translated.

    bits: 8, 16, or 32 for floats
    alpha: per frame the alpha channel or None
    icc_profile: embedded colour profile
    durations: of the frames, in milliseconds; empty if there are none
    loop: how often an animation repeats; None if it is not stated
    """

    bits: int = 8
    alpha: list[Picture | None] = field(default_factory=list)
    icc_profile: bytes | None = None
    durations: list[float] = field(default_factory=list)
    loop: int | None = None


def read_source(image: ImageFile, frames: int) -> tuple[list[Picture], Source]:
    """Decode the first frames of an image, and what its translation takes over."""
    pictures: list[Picture] = []
    source = Source()
    for frame in range(frames):
        pictures.append(image.read(frame))
        source.alpha.append(image.read_alpha(frame))
        if frame == 0:
            source.icc_profile = image.icc_profile
            source.loop = image.info.get("loop")
        source.bits = max(source.bits, image.bits(frame))
        source.durations.append(image.info.get("duration", 0))
    if not any(source.durations):
        source.durations = []
    return pictures, source


def image_format(suffix: str) -> str:
    """Return Pillow's name of the format of a file suffix."""
    return Image.registered_extensions()[suffix.lower()]


def lost_properties(outputs: Sequence[Tensor], source: Source, format: str) -> list[str]:
    """Return what a result in this format loses of the source, in words; usually nothing."""
    lost = []
    if source.bits > (most := MOST_BITS.get(format, 8)):
        lost.append(f"the depth of {source.bits} bits per channel ({format} is written with {most})")
    if any(alpha is not None for alpha in source.alpha) and format not in WITH_ALPHA:
        lost.append(f"the alpha channel ({format} has none)")
    if source.icc_profile and not _profile(outputs, source, format):
        reason = f"{format} files hold none" if format not in WITH_PROFILE else "it is not for these channels"
        lost.append(f"the ICC profile ({reason})")
    return lost


def encode(outputs: Sequence[Tensor], source: Source, format: str) -> bytes:
    """Return an image file of a network's outputs (C, H, W) in [-1, 1], one per frame."""
    bits = min(source.bits, MOST_BITS.get(format, 8))
    alphas = source.alpha if format in WITH_ALPHA and source.alpha else [None] * len(outputs)
    frames = [_pixels(output, alpha, bits) for output, alpha in zip(outputs, alphas, strict=True)]
    profile = _profile(outputs, source, format)
    if bits == 8:
        return _encode_8_bits(frames, source, format, profile)
    if format == "TIFF":
        return _encode_tiff(frames, profile)
    return _encode_png(frames[0], profile) if format == "PNG" else _encode_ppm(frames[0])


def _profile(outputs: Sequence[Tensor], source: Source, format: str) -> bytes | None:
    """Return the ICC profile if the format holds one and its colour space is that of the outputs."""
    profile = source.icc_profile
    fits = profile and format in WITH_PROFILE and profile[16:20] == PROFILE_SPACE.get(len(outputs[0]))
    return profile if fits else None


def _pixels(output: Tensor, alpha: Picture | None, bits: int) -> np.ndarray:
    """Return (H, W, C) uint8, uint16 or float32, with the alpha channel last."""
    if bits == 8:
        levels = tensor_to_bytes(output)
    else:
        levels = ((output.double() + 1) / 2).clamp(0, 1)
    if alpha is not None:
        extra = picture_to_levels(alpha)
        levels = torch.cat([levels, byte_levels(extra) if bits == 8 else unit_levels(extra)])
    pixels = levels.permute(1, 2, 0).contiguous().numpy()
    if bits == 16:
        return np.rint(pixels * 65535).astype(np.uint16)
    return pixels.astype(np.float32) if bits == 32 else pixels


def _encode_8_bits(frames: Sequence[np.ndarray], source: Source, format: str, profile: bytes | None) -> bytes:
    images = [Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels) for pixels in frames]
    has_alpha = frames[0].shape[2] in (2, 4)
    if has_alpha and format in ("AVIF", "GIF"):
        images = [image.convert("RGBA") for image in images]
    if has_alpha and format == "GIF":  # a pixel is opaque or transparent
        for image in images:
            image.putalpha(image.getchannel("A").point([0] * 128 + [255] * 128))
    options = dict(_QUALITY.get(format, {}))
    if profile:
        options["icc_profile"] = profile
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:]}
        if source.durations:
            options["duration"] = source.durations
        if source.loop is not None:
            options["loop"] = source.loop
        if format == "GIF" and has_alpha:
            options["disposal"] = 2  # otherwise a frame shows through the transparent parts of the next
    buffer = io.BytesIO()
    images[0].save(buffer, format, **options)
    return buffer.getvalue()


def _encode_tiff(frames: Sequence[np.ndarray], profile: bytes | None) -> bytes:
    buffer = io.BytesIO()
    with require("tifffile", "train", "writing 16-bit TIFF").TiffWriter(buffer) as file:
        for pixels in frames:
            channels = pixels.shape[2]
            file.write(
                pixels[:, :, 0] if channels == 1 else pixels,
                photometric="rgb" if channels >= 3 else "minisblack",
                planarconfig="contig" if channels > 1 else None,
                extrasamples=["unassalpha"] if channels in (2, 4) else None,
                iccprofile=profile,
                metadata=None,
                software=False,
            )
    return buffer.getvalue()


def _encode_png(pixels: np.ndarray, profile: bytes | None) -> bytes:
    library = require("imagecodecs", "train", "writing 16-bit PNG")
    png: bytes = library.png_encode(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    if not profile:
        return png
    body = b"iCCPICC profile\0\0" + zlib.compress(profile)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    header = 8 + 25  # the signature and IHDR
    return png[:header] + chunk + png[header:]


def _encode_ppm(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    return f"P{5 if channels == 1 else 6}\n{width} {height}\n65535\n".encode() + pixels.astype(">u2").tobytes()
