"""Pixel metrics: PSNR, SSIM, and scores of class maps from their confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ..data.picture import unit_levels
from ..extras import require

PixelMetric = Literal["psnr", "ssim"]
PIXEL_METRICS: tuple[PixelMetric, ...] = get_args(PixelMetric)
WINDOW = 11  # side of SSIM's window in pixels
TILE = 32  # SSIM's windows per side that are computed at once: torch copies the pixels of each, here into the cache


def confusion_matrix(pred: Tensor, true: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix (classes, classes), int64: entry (i, j) counts pixels of true class i predicted as j.

    Matrices of several batches can be added.

    Args:
        pred, true: integer class maps of the same shape, which is arbitrary.
        classes: number of classes.

    Raises:
        ValueError: different shapes, or a class outside 0..classes-1.
        TypeError: maps that are not integers.
    """
    _check_shapes(pred, true, "true")
    for name, given in (("pred", pred), ("true", true)):
        if given.is_floating_point() or given.is_complex():
            raise TypeError(f"{name} is {given.dtype}: expected integers, the number of each pixel's class")
        if given.numel() and not 0 <= given.min() <= given.max() < classes:
            raise ValueError(
                f"{name} has classes {given.min().item()}..{given.max().item()}: expected 0..{classes - 1}"
            )
    cells = true.flatten().long() * classes + pred.flatten().long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def mean_iou(conf: Tensor, classes: int | None = None) -> float:
    """Return the mean intersection over union of the classes, in [0, 1], from a `confusion_matrix`.

    A class that is neither predicted nor true is left out; NaN if all are.

    classes: average only over the first `classes` classes; predictions of other classes still count as wrong.
    """
    conf = conf.double()
    intersection = conf.diagonal()
    union = conf.sum(0) + conf.sum(1) - intersection
    return (intersection / union)[:classes][union[:classes] > 0].mean().item()


def class_accuracy(conf: Tensor) -> float:
    """Return the mean over the classes of the fraction of their pixels that is predicted correctly, in [0, 1].

    A class without true pixels is left out; NaN if all are.
    """
    conf = conf.double()
    true = conf.sum(1)
    return (conf.diagonal() / true)[true > 0].mean().item()


def pixel_accuracy(conf: Tensor) -> float:
    """Return the fraction of pixels with the correct class, in [0, 1], from a `confusion_matrix`; NaN if empty."""
    conf = conf.double()
    return (conf.trace() / conf.sum()).item()


def psnr(pred: Tensor, target: Tensor, data_range: float = 2.0) -> float:
    """Return the peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), averaged over the images.

    Infinite if one image equals its target.

    Args:
        pred, target: (B, C, H, W).
        data_range: largest minus smallest possible value, 2 for [-1, 1].

    Raises:
        ValueError: different shapes.
    """
    _check_shapes(pred, target)
    error = (pred.double() - target.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(data_range**2 / error)).mean().item()


def ssim(pred: Tensor, target: Tensor, data_range: float = 2.0) -> float:
    """Return the structural similarity of Wang et al. 2004, averaged over the images and their channels.

    The window is an 11 x 11 Gaussian with a standard deviation of 1.5 pixels. As in the authors' code, the average is
    over the positions where the window is inside the image. Computed by torchmetrics.

    Args:
        pred, target: (B, C, H, W).
        data_range: largest minus smallest possible value, 2 for [-1, 1].

    Raises:
        ValueError: different shapes, or images that are smaller than the window.
        ImportError: torchmetrics is not installed.
    """
    _check_shapes(pred, target)
    check_window(min(pred.shape[2:]))
    library = require_ssim()
    # since version 1.5 the library's own average counts windows across mirrored edges too
    edge = WINDOW // 2
    overlap = 2 * edge
    total = 0.0
    for top, left in product(range(0, pred.shape[2] - overlap, TILE), range(0, pred.shape[3] - overlap, TILE)):
        tile = (..., slice(top, top + TILE + overlap), slice(left, left + TILE + overlap))
        _, at_pixels = library.structural_similarity_index_measure(
            pred[tile].double(), target[tile].double(), sigma=1.5, data_range=data_range, return_full_image=True
        )
        total += at_pixels[..., edge:-edge, edge:-edge].sum().item()
    return total / (math.prod(pred.shape[:2]) * math.prod(side - overlap for side in pred.shape[2:]))


def check_window(side: int) -> None:
    """Raise a ValueError if a side of the images is shorter than the window of SSIM."""
    if side < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels; received a side of {side}")


def require_ssim() -> ModuleType:
    """Return the module that computes SSIM; raise an ImportError that says what to install if it is missing."""
    return require("torchmetrics.functional.image", "metrics", "SSIM")


def _check_shapes(pred: Tensor, target: Tensor, name: str = "target") -> None:
    if pred.shape != target.shape:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)} and {name} {tuple(target.shape)}: expected the same shape"
        )


def similarity(
    pairs: Iterable[tuple[Tensor, Tensor]], metrics: Sequence[PixelMetric] = PIXEL_METRICS
) -> dict[str, float]:
    """Return mean PSNR (dB) and SSIM of pairs of images (3, H, W), as {"PSNR": ..., "SSIM": ...}.

    The images are uint8, or floats in [0, 1] for deeper images. Both metrics relate the error to the full range, so
    that 8-bit and 16-bit versions of an image have about the same scores.

    Raises:
        ValueError: an image is smaller than SSIM's window.
        ImportError: torchmetrics, which SSIM needs, is not installed.
    """
    sums, count = dict.fromkeys(metrics, 0.0), 0
    for one, other in pairs:
        data_range = 255.0
        if one.is_floating_point() or other.is_floating_point():
            one, other, data_range = unit_levels(one), unit_levels(other), 1.0
        if "psnr" in metrics:
            sums["psnr"] += psnr(one[None], other[None], data_range=data_range)
        if "ssim" in metrics:
            sums["ssim"] += ssim(one[None], other[None], data_range=data_range)
        count += 1
    return {metric.upper(): total / count for metric, total in sums.items()}
