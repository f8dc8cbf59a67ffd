"""Images and relation maps as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from ..data.picture import tensor_to_bytes
from ..files import write_file
from ..kernels.formulas import Normalize, Relation

PREVIEW_SIDE = 1280  # pixels: a little wider than the page. A photo of 24 megapixels would have about 40 MB as PNG


def save_image(image: Tensor | np.ndarray, path: str | Path) -> Path:
    """Write an image as PNG and return its path; missing folders are created and an existing file is replaced.

    Args:
        image: what `to_pixels` takes, or what it, `relation_picture` and `mark_pixel` return.
    """
    pixels = image if isinstance(image, np.ndarray) else to_pixels(image)
    return write_file(Path(path), encode_png(pixels), "content")


def preview(image: Tensor) -> Tensor:
    """Return an image (C, H, W) scaled down such that its longer side has at most `PREVIEW_SIDE` pixels."""
    size = preview_size(image.shape[1:])
    return image if size == image.shape[1:] else F.adaptive_avg_pool2d(image, size)


def preview_size(size: Sequence[int]) -> tuple[int, int]:
    """Return (H, W) of the preview of an image of this size (H, W)."""
    height, width = size
    scale = min(1.0, PREVIEW_SIDE / max(size))
    return max(1, round(scale * height)), max(1, round(scale * width))


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the content of a PNG file of pixels (H, W, 3), uint8."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    return png.getvalue()


def relation_row(feature: Tensor, pixel: tuple[int, int], normalize: Normalize) -> Tensor:
    """Return the relations of one pixel i to all pixels: row i of the relation matrix, as a map.

    Args:
        feature: feature map (C, h, w) of any dtype, on any device.
        pixel: (y, x) of the pixel i in the feature map.
        normalize: "row" G_i / ||G_i||_2, "cosine" q_i . q_j / (||q_i|| ||q_j||), "none" G_i, with G = Q Q^T.

    Returns:
        (h, w), float32, on the CPU.
    """
    y, x = pixel
    feature = feature.detach().float().cpu()
    row = torch.einsum("c,chw->hw", feature[:, y, x], feature)

    def inverse(norm: Tensor) -> Tensor:
        return torch.where(norm > Relation.eps, 1 / norm, 0.0)  # relations of smaller norms are 0, as in SRPLoss

    if normalize == "row":
        return row * inverse(row.norm())
    if normalize == "cosine":
        scale = inverse(feature.norm(dim=0))
        return row * scale * scale[y, x]
    return row


def relation_picture(
    feature: Tensor, pixel: tuple[int, int], size: tuple[int, int], normalize: Normalize
) -> np.ndarray:
    """Render `relation_row` as a heat map: red is similar, white unrelated, blue opposite; the pixel is framed.

    The colour scale of each picture is symmetric around 0 and ends at the 99th percentile of the magnitudes, so that
    one outlier does not hide the others. "row" and "none" differ by a factor and look the same.

    Args:
        feature: feature map (C, h, w).
        pixel: (y, x) in the feature map.
        size: (H, W) of the picture, usually that of the input image; upsampling is by the nearest neighbour, and
            downsampling by averaging.
        normalize: as in `relation_row`.

    Returns:
        (H, W, 3), uint8.
    """
    row = relation_row(feature, pixel, normalize).nan_to_num(0.0, 0.0, 0.0)
    limit = np.quantile(row.abs().numpy(), 0.99) or row.abs().max().item() or 1.0
    height, width = size
    averages = F.adaptive_avg_pool2d(row[None], (min(height, row.shape[0]), min(width, row.shape[1])))[0].numpy()
    h, w = averages.shape
    cells = averages[np.arange(height)[:, None] * h // height, np.arange(width) * w // width]
    picture = colormaps["RdBu_r"](0.5 + 0.5 * cells / limit, bytes=True)[..., :3]
    return _mark(picture, pixel, row.shape)


def mark_pixel(image: Tensor, pixel: tuple[int, int], feature_shape: Sequence[int]) -> np.ndarray:
    """Frame the part of an image that corresponds to one pixel of a feature map.

    Args:
        image: (3, H, W) or (1, H, W) in [-1, 1].
        pixel: (y, x) in the feature map.
        feature_shape: shape (..., h, w) of the feature map.

    Returns:
        (H, W, 3), uint8.
    """
    return _mark(to_pixels(image), pixel, feature_shape[-2:])


def to_pixels(image: Tensor) -> np.ndarray:
    """Convert (3, H, W) or (1, H, W) in [-1, 1] to (H, W, 3) uint8: other values are clipped, and NaN is black."""
    image = image.detach().cpu().nan_to_num(nan=-1.0).expand(3, -1, -1)
    return tensor_to_bytes(image).permute(1, 2, 0).contiguous().numpy()


def _mark(picture: np.ndarray, pixel: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """Return a copy of a picture (H, W, 3) with a black and white frame around a pixel's cell."""
    y, x = pixel
    height, width = picture.shape[:2]

    def cell(i: int, cells: int, length: int) -> tuple[int, int]:
        if cells > length:
            return i * length // cells, i * length // cells + 1
        start = -(-i * length // cells)  # rounded up: the first index that nearest-neighbour upsampling maps to i
        return start, -(-(i + 1) * length // cells)

    (top, bottom), (left, right) = cell(y, shape[0], height), cell(x, shape[1], width)
    line = max(1, min(height, width) // 128)
    marked = picture.copy()
    for margin, colour in ((2 * line, 255), (line, 0)):
        rows = slice(max(0, top - margin), bottom + margin)
        columns = slice(max(0, left - margin), right + margin)
        marked[rows, columns] = colour
    marked[top:bottom, left:right] = picture[top:bottom, left:right]
    return marked
