"""Segmentation scores: of painted label maps, and of a segmentation network on generated photos."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.folders import Images
from ..data.synthetic import PALETTE
from .pixels import class_accuracy, confusion_matrix, mean_iou, nearest_colour, pixel_accuracy

# R G B name, as a palette file has them: the 19 classes that are scored, then what is not
CITYSCAPES = """
128 64 128 road
244 35 232 sidewalk
70 70 70 building
102 102 156 wall
190 153 153 fence
153 153 153 pole
250 170 30 traffic light
220 220 0 traffic sign
107 142 35 vegetation
152 251 152 terrain
70 130 180 sky
220 20 60 person
255 0 0 rider
0 0 142 car
0 0 70 truck
0 60 100 bus
0 80 100 train
0 0 230 motorcycle
119 11 32 bicycle
0 0 0 ignore
111 74 0 ignore
81 0 81 ignore
250 170 160 ignore
230 150 140 ignore
180 165 180 ignore
150 100 100 ignore
150 120 90 ignore
0 0 90 ignore
0 0 110 ignore
"""


class Palette(NamedTuple):
    """Colours (M, 3) in 0..255, of which the first `classes` are scored and the others ignored in the truth."""

    colours: Tensor
    classes: int


def label_scores(pairs: Iterator[tuple[Tensor, Tensor]], palette: Palette) -> dict[str, float]:
    """Scores, in percent, of painted label maps: each pixel's class is that of the nearest colour of the palette."""
    maps = (tuple(nearest_colour(image[None], palette.colours) for image in pair) for pair in pairs)
    return _class_scores((pred, true, palette.classes) for pred, true in maps)


def segmentation_scores(
    images: Images, labels: Sequence[Tensor], segmenter: Callable[[Tensor], Any], device: str = "cpu"
) -> dict[str, float]:
    """FCN scores, in percent: how well a segmentation network finds the true classes in generated photos.

    Args:
        images: generated photos.
        labels: the true class of each pixel, (H, W) integers for each; other than 0..K-1 is ignored.
        segmenter: photos (1, 3, H, W) in [0, 1] -> logits (1, K, h, w), or a mapping with them as "out"; what
            normalisation it needs is its own. Logits are scaled to the labels' size.
    """

    @torch.no_grad()
    def maps() -> Iterator[tuple[Tensor, Tensor, int]]:
        for image, label in zip(images, labels):
            logits = segmenter(image[None].to(device).float() / 255)
            logits = logits["out"] if isinstance(logits, Mapping) else logits
            if not isinstance(logits, Tensor) or logits.ndim != 4:
                received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the segmenter gave {received}; expected logits (1, K, h, w)")
            logits = F.interpolate(logits.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
            yield logits.argmax(1).cpu(), label[None], logits.shape[1]

    return _class_scores(maps())


def _class_scores(maps: Iterable[tuple[Tensor, Tensor, int]]) -> dict[str, float]:
    """Scores of (predicted, true, number of classes); another class is wrong if predicted, ignored if true."""
    total: Any = 0
    for pred, true, classes in maps:
        scored = (true >= 0) & (true < classes)
        total = total + confusion_matrix(pred[scored].clamp_max(classes), true[scored], classes + 1)
    return {
        "mIoU": 100 * mean_iou(total, classes),
        "pixel accuracy": 100 * pixel_accuracy(total),
        "class accuracy": 100 * class_accuracy(total),
    }


def load_segmenter(path: str | Path, device: str = "cpu") -> nn.Module:
    """A segmentation network from an exported program (.pt2, ``torch.export.save``) or TorchScript (other names).

    A program is what its file says it is, and ``torch.export.load`` may even unpickle parts of it: unlike a file of
    weights, take it from a source that you trust alone.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"--segmenter {path}: there is no such file")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module().to(device)
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # either loader may raise anything on other bytes
        raise ValueError(
            f"--segmenter {path}: neither TorchScript (torch.jit.save) nor, as .pt2, an exported program "
            f"(torch.export.save): {str(error).splitlines()[0]}"
        ) from error


def read_palette(name: str) -> Palette:
    """The palette "synthetic" (of the generated data), "cityscapes", or that of a file of lines ``R G B name``.

    A colour named ignore or void is left out where the truth has it. Lines that begin with # are comments.

    Raises:
        ValueError: no such file, or a line that is not like that.
    """
    if name == "synthetic":
        return Palette(PALETTE.clone(), len(PALETTE))
    if name == "cityscapes":
        text = CITYSCAPES
    else:
        try:
            text = Path(name).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--palette {name}: expected synthetic, cityscapes, or a file of lines 'R G B name' ({error})"
            ) from error
    scored, ignored = [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)(?:[\s,]+(.*))?", line)
        if not match or max(map(int, match.groups()[:3])) > 255:
            raise ValueError(f"--palette {name}: {line!r} is not a line 'R G B name' with numbers of 0 to 255")
        colour = [int(value) for value in match.groups()[:3]]
        (ignored if match[4] in ("ignore", "void") else scored).append(colour)
    if not scored:
        raise ValueError(f"--palette {name} has no colours: expected lines 'R G B name'")
    return Palette(torch.tensor(scored + ignored, dtype=torch.uint8), len(scored))
