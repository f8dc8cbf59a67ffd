"""Image files: decode them safely."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import system_reason
from .deep import (
    DeepPixels,
    UnsupportedImage,
    bits_per_channel,
    decode_deep,
    is_inverted,
    read_tiff_header,
    white_level,
)
from .picture import Picture, crop_columns, picture_size, picture_to_levels, resize_picture, with_channels

# The formats that Pillow may decode, by content and not by suffix: for EPS it would start another program.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# On a network drive, opening a file takes milliseconds in which the processor is idle.
THREADS = 16
# Images in memory at a time, beside the one in use: they may be large.
AHEAD = 4

T = TypeVar("T")
R = TypeVar("R")
Crop = Callable[[Picture, str], Picture]  # (image, its path) -> the part to use


class DataError(ValueError):
    """A dataset or an image file that cannot be used.

    Args:
        heading: the first line of the message.
        problems: listed below it, numbered.
    """

    def __init__(self, heading: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([heading, *(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))]))


class ImageFile:
    """An open image file. Sizes and pixels are upright: an EXIF orientation is applied here, once.

    Args:
        path: the file.
        image: what Pillow has opened; None for a TIFF that only tifffile reads.
        file_size: in bytes.
    """

    def __init__(self, path: str | os.PathLike[str], image: Image.Image | None, file_size: int) -> None:
        self.path, self._image, self.file_size = path, image, file_size
        self._tiff = read_tiff_header(path) if image is None else None
        self._decoded: tuple[int, Image.Image | DeepPixels] | None = None
        self._first_bits = 16 if image is None else bits_per_channel(image)
        self._white = white_level(image, self._first_bits) if image else 0
        if self._tiff and self._tiff.size[0] * self._tiff.size[1] > 2 * (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError(f"{self._tiff.size[0]} x {self._tiff.size[1]} pixels")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), from the header."""
        if self._image is None:
            assert self._tiff
            return self._tiff.size
        width, height = self._image.size
        # Pillow's size of a TIFF is upright already. getexif of a PNG would decode it, that of the base class does not.
        turned = self._image.format != "TIFF" and _orientation(self._image, Image.Image.getexif) >= 5
        return (height, width) if turned else (width, height)

    @property
    def frames(self) -> int:
        """Number of pages or frames."""
        if self._tiff:
            return self._tiff.frames
        try:
            return getattr(self._image, "n_frames", 1)
        except Exception:  # Pillow raises several kinds for pages that it does not read
            if not self._image or self._image.format != "TIFF":
                raise
            self._image.seek(0)
            return read_tiff_header(self.path).frames

    @property
    def mode(self) -> str:
        """Pillow's mode, or a description of the numbers and colours of a TIFF that only tifffile reads."""
        return self._tiff.mode if self._tiff else self._image.mode if self._image else ""

    @property
    def icc_profile(self) -> bytes | None:
        """The embedded colour profile, if there is one."""
        return self._tiff.icc_profile if self._tiff else self.info.get("icc_profile")

    @property
    def info(self) -> dict[str, Any]:
        """Pillow's information about the frame that was read last, such as its duration."""
        return {str(key): value for key, value in self._image.info.items()} if self._image else {}

    def read(self, frame: int = 0) -> Picture:
        """Decode a frame to RGB."""
        pixels = self._decode(frame)
        if isinstance(pixels, DeepPixels):
            return with_channels(pixels.colour_and_alpha()[0], 3)
        if pixels.mode == "P" and pixels.has_transparency_data:
            pixels = pixels.convert("RGBA")  # from a palette with transparency to RGB, Pillow warns
        return pixels.convert("RGB")

    def read_alpha(self, frame: int = 0) -> Picture | None:
        """Decode a frame's alpha channel, as a picture of one channel; None if it has none."""
        pixels = self._decode(frame)
        if isinstance(pixels, DeepPixels):
            return pixels.colour_and_alpha()[1]
        return pixels.convert("RGBA").getchannel("A") if pixels.has_transparency_data else None

    def bits(self, frame: int = 0) -> int:
        """Return the bits per channel that hold a frame's levels: 8, 16, or 32 for floating-point numbers."""
        pixels = self._decode(frame)
        if not isinstance(pixels, DeepPixels):
            return 8
        if pixels.values.dtype.kind == "f":
            return 32
        return 8 if pixels.maximum and pixels.maximum <= 255 else 16  # tifffile reads some 8-bit files, too

    def read_class_numbers(self) -> np.ndarray | None:
        """Return the stored numbers (H, W) of a gray or palette image of any depth; None if it is in colour."""
        pixels = self._decode(0)
        if isinstance(pixels, DeepPixels):
            return pixels.values[:, :, 0] if pixels.values.shape[2] == 1 and pixels.values.dtype.kind in "ui" else None
        numbers = np.array(pixels)
        if pixels.mode in ("1", "L"):
            assert self._image
            scale = self._white / (255 if pixels.mode == "L" else 1)  # undoes that of Pillow
            numbers = np.rint(scale * numbers.astype(np.float64)).astype(np.uint8)
            return self._white - numbers if is_inverted(self._image) else numbers
        return numbers if pixels.mode == "P" else None

    @property
    def needs_decoding(self) -> bool:
        """Whether ``check`` decodes in any case."""
        return self._image is None

    def check(self, decode: bool) -> None:
        """Check that the first frame can be decoded, or only what its header (and the checksums of PNG) tell."""
        if self._image is None or (decode and self._first_bits > 8):
            self.read()
            return
        if self._first_bits > 8 and self._image.format not in ("PNG", "PPM", "TIFF"):
            decode_deep(self.path, self._image, 0, 1)  # raises
        # a JPEG is decoded at an eighth of its size: this reads every byte, and is faster
        self._image.draft("RGB", (1, 1))
        if decode:
            self._image.load()
        else:
            self._image.verify()

    def _decode(self, frame: int) -> Image.Image | DeepPixels:
        if not self._decoded or self._decoded[0] != frame:
            self._decoded = frame, self._decode_frame(frame)
        return self._decoded[1]

    def _decode_frame(self, frame: int) -> Image.Image | DeepPixels:
        image, bits = self._image, self._first_bits
        if image is None:
            return decode_deep(self.path, None, frame, 1)
        if image.tell() != frame:
            try:
                image.seek(frame)
            except Exception:  # Pillow raises several kinds for pages that it does not read
                if image.format != "TIFF":
                    raise
                return decode_deep(self.path, None, frame, 1)
        if frame and image.format == "TIFF":
            bits = bits_per_channel(image)
        if bits > 8:
            if image.format == "PNG" and "exif" not in image.info and b"eXIf" in Path(self.path).read_bytes():
                image.load()  # the orientation is stored behind the pixels
            return decode_deep(self.path, image, frame, _orientation(image, Image.Image.getexif))
        image.load()  # a TIFF becomes upright, and its orientation is removed
        method = _TRANSPOSE.get(_orientation(image, type(image).getexif))
        return image if method is None else image.transpose(method)


_TRANSPOSE = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, getexif: Callable[[Any], Any]) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF data are damaged."""
    try:
        value = getexif(image).get(0x0112, 1)
    except Exception:  # damaged EXIF data raise all kinds of exceptions; the pixels are not affected
        return 1
    return value if value in _TRANSPOSE else 1


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[ImageFile]:
    """Open an image file; it is decoded inside the block. All of srpkd opens images through this function.

    Raises:
        DataError: the file cannot be decoded, is not in one of `FORMATS`, has a depth or kind of numbers that is not
            supported, or is so large that Pillow takes it for a decompression bomb. The message is "path: reason".
    """
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_open_regular(path))
            try:
                image = stack.enter_context(Image.open(file, formats=FORMATS))
            except UnidentifiedImageError:
                file.seek(0)
                if file.read(4) not in TIFF_MAGIC:
                    raise
                image = None
            yield ImageFile(path, image, os.fstat(file.fileno()).st_size)
    except (DataError, ImportError):
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        raise DataError(f"{path}: {_reason(error)}") from error


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Its kind is checked once it is open: on a network drive, os.stat takes as long as opening it.

    Raises:
        UnsupportedImage: the path is that of something else.
        OSError: the file cannot be opened.
    """
    without_waiting = getattr(os, "O_NONBLOCK", 0)  # for a process that writes to a named pipe
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | without_waiting))  # noqa: SIM115
    except OSError:
        if not os.path.exists(path) or os.path.isfile(path):
            raise
    else:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise UnsupportedImage("a folder, a pipe or a device; expected a file")


def _reason(error: Exception) -> str:
    """Return why an image could not be read."""
    if isinstance(error, UnsupportedImage):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"far too large ({error}); if this size is intended, scale the image down first"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image; expected one of {', '.join(FORMATS)}"
    return system_reason(error) or f"damaged or truncated ({error})"


def in_threads(function: Callable[[T], R], items: Iterable[T], ahead: int = 4 * THREADS) -> Generator[R, None, None]:
    """Yield `function` of each item in order; up to `THREADS` threads call it, for at most `ahead` items at a time.

    An error that `items` raises comes after the results of the items before it.
    """
    Image.init()  # registers Pillow's formats: two threads that do it at the same time miss some
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(THREADS)

    def futures() -> Iterator[Future[R]]:
        try:
            for item in items:
                yield pool.submit(function, item)
        except Exception as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            yield failed

    try:
        for future in futures():
            waiting.append(future)
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_image(path: str) -> Picture:
    """Decode the first frame of an image file to RGB, upright. Raises the errors of `open_image`."""
    with open_image(path) as image:
        return image.read()


class Headers(NamedTuple):
    """What the headers of images tell: path -> (width, height), and which have further pages or frames, in words."""

    sizes: dict[str, tuple[int, int]]
    further_frames: str


def read_headers(paths: Sequence[str]) -> Headers:
    """Open all images; raises the errors of `open_image`."""

    def read(path: str) -> tuple[tuple[int, int], int]:
        with open_image(path) as image:
            return image.size, image.frames

    found = list(in_threads(read, paths))
    several = [path for path, (_, frames) in zip(paths, found) if frames > 1]
    return Headers({path: size for path, (size, _) in zip(paths, found)}, describe_further_frames(several))


def describe_further_frames(paths: Sequence[str]) -> str:
    """Return "3 images have further pages or frames, which are not used, such as a.gif", or '' for no paths."""
    if not paths:
        return ""
    subject = f"{len(paths):,} images have" if len(paths) > 1 else "1 image has"
    return f"{subject} further pages or frames, which are not used, such as {paths[0]}"


def split_pair(image: Picture, path: str) -> tuple[Picture, Picture]:
    """Return the left half (A) and the right half (B) of an aligned image.

    Raises:
        DataError: the width is odd.
    """
    width, _ = picture_size(image)
    half = half_width(width, path)
    return crop_columns(image, 0, half), crop_columns(image, half, width)


def half_width(width: int, path: str) -> int:
    """Return the width of A and of B in an aligned image. Raises the error of `split_pair`."""
    if width % 2:
        raise DataError(f"{path}: {width} pixels wide; expected an even width: A and B of the same size side by side")
    return width // 2


def left_half(image: Picture, path: str) -> Picture:
    """Return A of an aligned image; a `Crop`."""
    return split_pair(image, path)[0]


def right_half(image: Picture, path: str) -> Picture:
    """Return B of an aligned image; a `Crop`."""
    return split_pair(image, path)[1]


class ImageFiles(Dataset[Tensor]):
    """Dataset of image files as tensors (3, H, W), for metrics: no augmentation, no normalisation.

    8-bit images are uint8; deeper ones are float64 in [0, 1].

    Args:
        paths: the files.
        size: scale every image to size x size; None keeps its own size.
        crop: (image, path) -> the part of the image to use, before scaling.
        resample: Pillow's filter for scaling; use NEAREST to keep the colours of label maps.
        headers: what `read_headers` returned for these files, if it was called.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        crop: Crop | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        headers: Headers | None = None,
    ) -> None:
        self.paths, self.size, self.crop, self.resample = list(paths), size, crop, resample
        self.headers = headers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.paths[index])
        if self.crop:
            image = self.crop(image, self.paths[index])
        if self.size:
            image = resize_picture(image, self.size, self.size, self.resample)
        return picture_to_levels(image)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def have_same_size(self) -> bool:
        """Return whether all images have the same size; reads only their headers."""
        return bool(self.size) or len({*(self.headers or read_headers(self.paths)).sizes.values()}) == 1
