"""What a generated image is scored by. Exact, and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..extras import require


def confusion_matrix(pred: Tensor, true: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64: entry (i, j) counts the pixels of true class i that were predicted as j.

    pred, true: integer class maps of one shape, whatever it is. Matrices of several batches may be added.
    Raises ValueError for different shapes or a class outside 0..classes-1, TypeError for floats.
    """
    if pred.shape != true.shape:
        raise ValueError(f"pred and true must have one shape; received {tuple(pred.shape)} and {tuple(true.shape)}")
    for name, given in (("pred", pred), ("true", true)):
        if given.is_floating_point() or given.is_complex():
            raise TypeError(f"{name} holds class numbers, which are integers; received {given.dtype}")
        if given.numel() and not 0 <= given.min() <= given.max() < classes:
            raise ValueError(
                f"{name} must lie in 0..{classes - 1}; received {given.min().item()}..{given.max().item()}"
            )
    cells = true.flatten().long() * classes + pred.flatten().long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def nearest_colour(images: Tensor, palette: Tensor) -> Tensor:
    """The index of each pixel's nearest palette colour: (B, 3, H, W) and (K, 3), of one scale, to (B, H, W) int64."""
    images, palette = images.double(), palette.double()
    # |x - c|^2 is least where x . c - |c|^2 / 2 is greatest
    scores = torch.einsum("kc,bchw->bkhw", palette, images) - palette.square().sum(1).view(-1, 1, 1) / 2
    return scores.argmax(1)


def mean_iou(conf: Tensor, classes: int | None = None) -> float:
    """Mean over the classes of |pred and true| / |pred or true|, from a `confusion_matrix`, in [0, 1].

    A class absent from both prediction and truth is left out; nan if all are. classes: average over the first so
    many alone; what was predicted as another is still wrong.
    """
    conf = conf.double()
    hit = conf.diagonal()
    union = conf.sum(0) + conf.sum(1) - hit
    return (hit / union)[:classes][union[:classes] > 0].mean().item()


def class_accuracy(conf: Tensor) -> float:
    """Mean over the classes of the part of their pixels that is right, in [0, 1]; a class absent from the truth is
    left out, and it is nan if all are."""
    conf = conf.double()
    true = conf.sum(1)
    return (conf.diagonal() / true)[true > 0].mean().item()


def pixel_accuracy(conf: Tensor) -> float:
    """The part of the pixels with the right class, from a `confusion_matrix`, in [0, 1]; nan if there are none."""
    conf = conf.double()
    return (conf.trace() / conf.sum()).item()


def psnr(pred: Tensor, target: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE) of each image, averaged over the images.

    pred, target: (B, C, H, W). data_range: largest minus smallest possible value, 2 for [-1, 1]. An image that
    equals its target has infinitely many dB, and then so has the mean. Raises ValueError for different shapes.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have one shape; received {tuple(pred.shape)} and {tuple(target.shape)}")
    error = (pred.double() - target.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(data_range**2 / error)).mean().item()


def similarity(pairs: Iterator[tuple[Tensor, Tensor]], names: Sequence[str] = ("psnr", "ssim")) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM (Wang et al. 2004, 11 x 11 Gaussian window) of pairs of uint8 images (3, H, W)."""
    if "ssim" in names:
        ssim = require("torchmetrics.functional.image", "metrics", "SSIM").structural_similarity_index_measure
    sums, count = dict.fromkeys(names, 0.0), 0
    for ours, theirs in pairs:
        if "psnr" in names:
            sums["psnr"] += psnr(ours[None], theirs[None], data_range=255.0)
        if "ssim" in names:
            if min(ours.shape[1:]) < 11:
                raise ValueError(f"SSIM needs 11 x 11 pixels at least; received an image of {tuple(ours.shape[1:])}")
            sums["ssim"] += ssim(ours[None].double(), theirs[None].double(), data_range=255.0).item()
        count += 1
    return {name.upper(): total / count for name, total in sums.items()}
