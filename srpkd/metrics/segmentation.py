"""Segmentation scores of generated label maps, and of a segmentation network on generated photos (FCN scores)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import first_line
from ..data.images import DataError, ImageFiles, open_image
from ..data.picture import levels_to_255, nearest_colour
from ..data.synthetic import PALETTE
from ..files import expand_user
from ..finite import check_finite
from .pixels import class_accuracy, confusion_matrix, mean_iou, pixel_accuracy


class Palette(NamedTuple):
    """Colours (M, 3) in 0..255: the first `classes` are scored; true pixels of the other colours are ignored."""

    colours: Tensor
    classes: int


def label_scores(pairs: Iterable[tuple[Tensor, Tensor]], palette: Palette) -> dict[str, float]:
    """Score generated label maps against true ones, in percent: {"mIoU", "pixel accuracy", "class accuracy"}.

    Args:
        pairs: (generated, true) images (3, H, W), as from `ImageFiles`. A pixel's class is that of the nearest colour.
        palette: the colours of the classes.
    """
    maps = ([nearest_colour(levels_to_255(image)[None], palette.colours) for image in pair] for pair in pairs)
    return _class_scores((pred, true, palette.classes) for pred, true in maps)


def segmentation_scores(
    images: ImageFiles, labels: Iterable[Tensor], segmenter: Callable[[Tensor], Any], device: str = "cpu"
) -> dict[str, float]:
    """Compute FCN scores, in percent: how well a segmentation network recovers the true classes from generated photos.

    Isola et al. 2017.

    Args:
        images: generated photos.
        labels: for each photo the true classes (H, W), integers; values outside 0..K-1 are ignored.
        segmenter: photos (1, 3, H, W) in [0, 1] -> logits (1, K, h, w), or a mapping with them as "out". It normalises
            its input itself. The logits are scaled to the size of the labels.
        device: where the photos are moved to; the segmenter must be there.

    Returns:
        {"mIoU", "pixel accuracy", "class accuracy"}.

    Raises:
        ValueError: the segmenter returns something else.
        NonFiniteError: a logit is NaN or infinite.
    """

    @torch.no_grad()
    def maps() -> Iterator[tuple[Tensor, Tensor, int]]:
        for image, label in zip(images, labels):
            logits = segmenter(levels_to_255(image)[None].to(device).float() / 255)
            logits = logits["out"] if isinstance(logits, Mapping) else logits
            if not isinstance(logits, Tensor) or logits.ndim != 4:
                received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the segmenter returned {received}: expected logits (1, K, h, w)")
            check_finite(
                logits,
                "the segmenter's output",
                "use another --segmenter; one that excludes a class returns a large negative logit, not -inf",
            )
            logits = F.interpolate(logits.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
            yield logits.argmax(1).cpu(), label[None], logits.shape[1]

    return _class_scores(maps())


def _class_scores(maps: Iterable[tuple[Tensor, Tensor, int]]) -> dict[str, float]:
    """Score (predicted, true, number of classes); other classes are wrong if predicted, and ignored if true."""
    total, classes = torch.zeros((), dtype=torch.int64), 0
    for pred, true, classes in maps:
        scored = (true >= 0) & (true < classes)
        total = total + confusion_matrix(pred[scored].clamp_max(classes), true[scored], classes + 1)
    return {
        "mIoU": 100 * mean_iou(total, classes),
        "pixel accuracy": 100 * pixel_accuracy(total),
        "class accuracy": 100 * class_accuracy(total),
    }


def load_segmenter(path: str | Path, device: str = "cpu") -> nn.Module:
    """Load a segmentation network from an exported program (.pt2, ``torch.export.save``) or TorchScript (other names).

    Both are programs, and ``torch.export.load`` may unpickle parts of the file: unlike a file of weights, load it only
    from a source that you trust. With Python 3.14, torch does not support TorchScript: loading warns, and may fail.

    Raises:
        ValueError: the file does not exist, or is neither.
    """
    path = expand_user(path)
    if not path.is_file():
        raise ValueError(f"--segmenter {path}: no such file")
    try:
        if path.suffix == ".pt2":
            from torch.export.passes import move_to_device_pass  # here, since it takes time to import

            # the program itself names the device on which it was exported, for example in casts
            return move_to_device_pass(torch.export.load(path), device).module()
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # both loaders raise all kinds of exceptions on other files
        raise ValueError(
            f"--segmenter {path}: expected TorchScript (torch.jit.save), or as .pt2 an exported program "
            f"(torch.export.save); it cannot be loaded: {first_line(error)}"
        ) from error


def read_palette(name: str) -> Palette:
    """Return the palette "synthetic" (of `srpkd.data.synthetic`), "cityscapes", or that of a file.

    The file has lines ``R G B name``; lines that begin with # are comments. True pixels of a colour named ignore or
    void are not scored.

    Raises:
        ValueError: the file cannot be read, or has another format.
    """
    if name == "synthetic":
        return Palette(PALETTE.clone(), len(PALETTE))
    if name == "cityscapes":
        return _cityscapes()
    try:
        text = expand_user(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--palette {name}: expected synthetic, cityscapes, or a file of lines 'R G B name' ({error})"
        ) from error
    scored: list[list[int]] = []
    ignored: list[list[int]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)(?:[\s,]+(.*))?", line)
        if not match or max(map(int, match.groups()[:3])) > 255:
            raise ValueError(f"--palette {name}: line {line!r}, expected 'R G B name' with numbers of 0 to 255")
        colour = [int(value) for value in match.groups()[:3]]
        (ignored if match[4] in ("ignore", "void") else scored).append(colour)
    if not scored:
        raise ValueError(f"--palette {name} has no colours to score: expected lines 'R G B name'")
    return Palette(torch.tensor(scored + ignored, dtype=torch.uint8), len(scored))


def _cityscapes() -> Palette:
    """Return the colours of the 19 classes that are scored, in the order of their numbers, then the ignored ones."""
    from torchvision.datasets import Cityscapes  # here, since it takes seconds to import

    classes = sorted(Cityscapes.classes, key=lambda entry: entry.train_id)
    scored = [entry.color for entry in classes if not entry.ignore_in_eval]
    ignored = {entry.color for entry in classes if entry.ignore_in_eval} - {*scored}  # a licence plate is a car
    return Palette(torch.tensor([*scored, *sorted(ignored)], dtype=torch.uint8), len(scored))


def read_label_map(path: str, palette: Palette | None = None) -> Tensor:
    """Read the class of each pixel of an image file, (H, W) int64.

    With a palette, the classes are those of the nearest colours, and -1 for colours that are ignored. Without one, they
    are the pixels' values.

    Raises:
        DataError: the file cannot be read, or is a colour image and there is no palette.
    """
    if palette:
        classes = nearest_colour(levels_to_255(ImageFiles([path])[0])[None], palette.colours)[0]
        return classes.masked_fill(classes >= palette.classes, -1)
    with open_image(path) as image:
        numbers = image.read_class_numbers()
    if numbers is None:
        raise DataError(f"{path} is a colour image ({image.mode}): give its --palette, or files of class numbers")
    return torch.from_numpy(numbers.astype(np.int64))
