"""The pictures of the recipes' pages: the relations in the teacher, and in the student before and after its training.

A page defines ``images``, ``teacher``, ``student``, and in the block that trains it ``features(network, images)``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from srpkd.data.synthetic import paint
from srpkd.files import write_file
from srpkd.reporting.figures import to_png
from srpkd.reporting.pictures import mark_pixel, relation_picture

from . import pages

# (y, x) of the framed pixel of the first two images, relative to the map
PIXELS = ((0.3, 0.45), (0.5, 0.4))
PIXELS_OF = {"pairwise-segmentation": ((0.55, 0.3), (0.65, 0.4))}  # inside regions
TITLES = ("teacher", "student before", "student after")
Picture = tuple[str, np.ndarray]  # title, pixels (H, W, 3) uint8


def draw(name: str) -> Path:
    """Run the code of a page, draw its picture and return the picture's path."""
    before: nn.Module | None = None
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for names in pages.run_blocks(name):
            if before is None and "student" in names:
                before = copy.deepcopy(names["student"])
    assert before is not None
    networks = (names["teacher"], before, names["student"])
    with torch.no_grad():
        found = [names["features"](network.eval(), names["images"]) for network in networks]
    if name == "batch-similarity":
        rows = [[(title, similarity_picture(features)) for title, features in zip(TITLES, found)]]
    else:
        maps = [as_map(features) for features in found]
        if name == "nst":
            maps = [F.normalize(features.flatten(2), dim=2).view_as(features) for features in maps]
        normalize = "none" if name == "nst" else "cosine"
        rows = [
            relation_row(names["images"][i], [features[i] for features in maps], place, normalize)
            for i, place in enumerate(PIXELS_OF.get(name, PIXELS))
        ]
    return write_file(pages.FOLDER / f"{name}.png", to_png(panels(rows), dpi=120))


def relation_row(image: Tensor, maps: list[Tensor], place: tuple[float, float], normalize: Any) -> list[Picture]:
    """Return an image with its framed pixel, and the pixel's relations in maps (C, h, w) of the three networks."""
    height, width = maps[0].shape[1:]
    pixel = round(place[0] * height), round(place[1] * width)
    shown = image if len(image) == 3 else paint(image.argmax(0)[None])[0]  # of a label map, its colours
    size = image.shape[1], image.shape[2]
    return [
        ("input", mark_pixel(shown, pixel, (height, width))),
        *((title, relation_picture(features, pixel, size, normalize)) for title, features in zip(TITLES, maps)),
    ]


def similarity_picture(features: Tensor) -> np.ndarray:
    """Return the row-normalised matrix of B images with features (B, ...), the largest values dark."""
    flat = features.flatten(1)
    matrix = F.normalize(flat @ flat.mT)
    low, high = matrix.quantile(0.02), matrix.quantile(0.98)
    return colormaps["Reds"](((matrix - low) / (high - low)).numpy(), bytes=True)[..., :3]


def as_map(features: Tensor) -> Tensor:
    """Return tokens (B, N, C) as square maps (B, C, H, W); maps are unchanged."""
    if features.ndim == 4:
        return features
    side = math.isqrt(features.shape[1])
    return features.mT.unflatten(2, (side, side))


def panels(rows: list[list[Picture]]) -> Figure:
    """Return rows of pictures as a figure."""
    figure = Figure(figsize=(1.8 * len(rows[0]), 1.8 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, pictures in zip(axes, rows):
        for axis, (title, pixels) in zip(line, pictures):
            axis.set_axis_off()
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(title, fontsize=9)
    return figure
