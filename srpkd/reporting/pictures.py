"""Images and relation maps as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from ..files import write_file

# --- pictures of images and of relations --------------------------------------------------------------------


def save_image(image: Tensor | np.ndarray, path: str | Path) -> Path:
    """Write a picture as PNG, and make its folder.

    Args:
        image: a tensor in [-1, 1], (3, H, W) colour or (1, H, W) grey (what lies outside is clipped, NaN is
            black), or a uint8 array (H, W, 3) such as `relation_picture` and `mark_pixel` return.
        path: where to; a file that is there is replaced.

    Raises:
        ValueError: the shape is none of these.
    """
    pixels = image if isinstance(image, np.ndarray) else _to_pixels(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"save_image expected a uint8 array (H, W, 3), got {pixels.dtype} {pixels.shape}")
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    return write_file(Path(path), png.getvalue())


def relation_row(feature: Tensor, pixel: tuple[int, int], normalize: str = "row", eps: float = 1e-12) -> Tensor:
    """The relation of one pixel to all pixels: row i of the relation matrix, as a map.

    Args:
        feature: (C, h, w), of any dtype and device.
        pixel: (y, x), the pixel i in the feature map's coordinates.
        normalize: "row" G_i / ||G_i||_2, "cosine" q_i . q_j / (||q_i|| ||q_j||), "none" G_i, with G = Q Q^T.
        eps: as in `SRPLoss`: where a norm is not above it, the relation is 0.

    Returns:
        (h, w), float32, on the CPU.

    Raises:
        ValueError: not a (C, h, w) feature, a pixel outside of it, an unknown `normalize`.
    """
    if feature.ndim != 3:
        raise ValueError(f"feature: expected the shape (C, h, w) of one image, got {tuple(feature.shape)}")
    y, x = _checked_pixel(pixel, feature.shape[-2:])
    feature = feature.detach().float().cpu()
    row = torch.einsum("c,chw->hw", feature[:, y, x], feature)

    def inverse(norm: Tensor) -> Tensor:
        return torch.where(norm > eps, 1 / norm, 0.0)

    match normalize:
        case "row":
            return row * inverse(row.norm())
        case "cosine":
            scale = inverse(feature.norm(dim=0))
            return row * scale * scale[y, x]
        case "none":
            return row
    raise ValueError(f'normalize: expected "row", "cosine" or "none", got {normalize!r}')


def relation_picture(
    feature: Tensor, pixel: tuple[int, int], size: tuple[int, int], normalize: str = "row"
) -> np.ndarray:
    """Paint `relation_row`: red is alike, white unrelated, blue opposite, and the pixel itself is marked.

    Each picture has its own scale, symmetric around 0 and up to the 99th percentile of its magnitudes (one
    outlier would make all else pale), so "row" and "none", which differ by a factor, look the same.

    Args:
        feature: (C, h, w).
        pixel: (y, x) in the feature map's coordinates.
        size: (H, W) of the picture, as a rule the input image's; cells are repeated, never blended.
        normalize: as in `relation_row`.

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: as `relation_row`.
    """
    row = relation_row(feature, pixel, normalize).nan_to_num(0.0, 0.0, 0.0).numpy()
    limit = np.quantile(abs(row), 0.99) or abs(row).max() or 1.0
    (h, w), (height, width) = row.shape, size
    cells = row[np.arange(height)[:, None] * h // height, np.arange(width) * w // width]
    picture = colormaps["RdBu_r"](0.5 + 0.5 * cells / limit, bytes=True)[..., :3]
    return _mark(picture, pixel, row.shape)


def mark_pixel(image: Tensor, pixel: tuple[int, int], feature_shape: Sequence[int]) -> np.ndarray:
    """Draw a frame around the part of an image that one pixel of a feature map stands for.

    Args:
        image: (3, H, W) or (1, H, W) in [-1, 1].
        pixel: (y, x) in the feature map's coordinates.
        feature_shape: the feature map's shape; its last two numbers are (h, w).

    Returns:
        (H, W, 3), uint8.

    Raises:
        ValueError: not one such image, or a pixel outside of the feature map.
    """
    return _mark(_to_pixels(image), pixel, feature_shape[-2:])


def _to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) or (1, H, W) in [-1, 1] to (H, W, 3) of uint8."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected one image of shape (3, H, W) or (1, H, W) in [-1, 1], got {tuple(image.shape)}")
    image = image.detach().float().cpu().nan_to_num(nan=-1.0).expand(3, -1, -1)
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _checked_pixel(pixel: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    (y, x), (h, w) = pixel, shape
    if not (0 <= y < h and 0 <= x < w):
        raise ValueError(f"pixel: expected (y, x) inside the {h} x {w} feature map, got ({y}, {x})")
    return y, x


def _mark(picture: np.ndarray, pixel: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """A copy of picture (H, W, 3), the pixel's cell framed in black and white, which shows on any ground."""
    y, x = _checked_pixel(pixel, shape)
    height, width = picture.shape[:2]

    def cell(i: int, cells: int, length: int) -> tuple[int, int]:
        start = -(-i * length // cells)  # rounded up: the first place whose nearest cell is i
        return start, max(start + 1, -(-(i + 1) * length // cells))

    (top, bottom), (left, right) = cell(y, shape[0], height), cell(x, shape[1], width)
    line = max(1, min(height, width) // 128)
    marked = picture.copy()
    for margin, colour in ((2 * line, 255), (line, 0)):
        rows = slice(max(0, top - margin), bottom + margin)
        columns = slice(max(0, left - margin), right + margin)
        marked[rows, columns] = colour
    marked[top:bottom, left:right] = picture[top:bottom, left:right]
    return marked
