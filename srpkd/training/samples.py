"""Sample images and relation maps of a run's networks, written as PNG files for the report page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import collate, sides
from ..models.networks import default_tap
from ..reporting.pictures import mark_pixel, preview, preview_size, relation_picture, save_image
from ..taps import FeatureTap
from .datasets import ImageDataset, has_targets
from .options import ResolvedConfig
from .validation import DIRECTION_NAMES

CHOSEN_PIXEL = "the chosen pixel"
Drawn = MutableMapping[str, Any]  # file -> the network or data set that the picture in it shows


@torch.no_grad()
def write_samples(
    folder: Path,
    shown: Mapping[str, Mapping[str, nn.Module]],
    dataset: ImageDataset,
    config: ResolvedConfig,
    drawn: Drawn | None = None,
) -> list[dict[str, Any]]:
    """Write previews of the first test images: input, output of every network, and target if there is one.

    Args:
        folder: folder of the run.
        shown: label -> direction -> generator in eval mode.
        drawn: what earlier calls have drawn, and this one does not draw again.

    Returns:
        The "samples" of report.json: [{"caption": ..., "images": [{"label", "file"}, ...]}, ...].
    """
    item = lru_cache(1)(lambda index: collate([dataset[index]]))  # a batch of one, read if it is drawn
    # a teacher may have one direction only
    directions = list(dict.fromkeys(direction for generators in shown.values() for direction in generators))

    def sample(index: int, direction: str) -> dict[str, Any]:
        source, target = sides(direction)
        networks = {label: generators[direction] for label, generators in shown.items() if direction in generators}

        def draw(label: str) -> Tensor:
            if label in networks:
                return preview(networks[label](item(index)[source].to(config.torch_device))[0].cpu())
            return preview(item(index)[source if label == "input" else target][0])

        origins: dict[str, Any] = {"input": dataset, **networks}
        if has_targets(config):
            origins["truth"] = dataset
        return {
            "caption": f"test image {index} {DIRECTION_NAMES[direction]}".strip(),
            "images": _write(folder, f"{index:03d}{direction}", origins, draw, drawn),
        }

    return [sample(index, name) for index in range(min(config.samples, len(dataset))) for name in directions]


@torch.no_grad()
def write_relation_maps(
    folder: Path,
    shown: Mapping[str, Mapping[str, nn.Module]],
    dataset: ImageDataset,
    config: ResolvedConfig,
    places: Iterable[tuple[float, float]] = ((0.5, 0.5), (0.3, 0.7)),
    drawn: Drawn | None = None,
) -> list[dict[str, Any]]:
    """Write, per test image, the relation of one pixel to all others at each network's tapped layer.

    Args:
        folder: folder of the run.
        shown: label -> direction -> generator in eval mode; the teacher's label is "teacher".
        places: (y, x) of the pixel as fractions of the image's height and width, one for each test image.
        drawn: as for ``write_samples``.

    Returns:
        The "relations" of report.json: [{"caption": ..., "panels": [{"label", "file"}, ...]}, ...].
    """
    direction = next(iter(next(iter(shown.values()), ())), "")
    networks = {label: generators[direction] for label, generators in shown.items() if direction in generators}
    if not networks:
        return []
    source, first = sides(direction)[0], next(iter(networks))
    origins = {CHOSEN_PIXEL: networks[first], **networks}  # its size is that of a cell of the first network's map

    def relation(index: int, y: float, x: float) -> dict[str, Any]:
        image = cache(lambda: collate([dataset[index]])[source][0])
        feature = lru_cache(1)(
            lambda label: tapped_feature(networks[label], label == "teacher", image(), config)
        )  # of large images one fills much memory

        def draw(label: str) -> np.ndarray:
            map_of_network = feature(first if label == CHOSEN_PIXEL else label)
            pixel = int(y * map_of_network.shape[1]), int(x * map_of_network.shape[2])
            if label == CHOSEN_PIXEL:
                return mark_pixel(preview(image()), pixel, map_of_network.shape)
            return relation_picture(map_of_network, pixel, preview_size(image().shape[1:]), config.normalize)

        entries = _write(folder, f"relation{index:03d}", origins, draw, drawn)
        return {"caption": f"test image {index}", "panels": entries}

    return [relation(index, *place) for index, place in zip(range(len(dataset)), places)]


def tapped_feature(generator: nn.Module, is_teacher: bool, image: Tensor, config: ResolvedConfig) -> Tensor:
    """Return the feature (C, h, w) of an image (C, H, W) at the first layer in ``config.layers``."""
    layers = config.layers or {}
    name = next(iter(layers.values() if is_teacher else layers), "")
    if not name or name not in dict(generator.named_modules()):
        name = default_tap(generator)  # variants may have another architecture, with other layers
    tap = FeatureTap(generator, [name])
    try:
        with tap.recording() as features, torch.no_grad():
            generator(image[None].to(config.torch_device))
    finally:
        tap.close()
    return features[name][0]


def _write(
    folder: Path,
    prefix: str,
    origins: Mapping[str, Any],
    draw: Callable[[str], Tensor | np.ndarray],
    drawn: Drawn | None,
) -> list[dict[str, str]]:
    """Write a picture for each label, and return its entry in report.json.

    Args:
        origins: label -> what the picture shows: a network, or the data set.
        draw: returns the picture of a label.
        drawn: what the files show; a file that shows the same network or data set already is kept.
    """
    drawn = {} if drawn is None else drawn
    entries = []
    for number, (label, origin) in enumerate(origins.items()):
        file = f"images/{prefix}_{number}.png"
        if drawn.get(file) is not origin:
            save_image(draw(label), folder / file)
            drawn[file] = origin
        entries.append({"label": label, "file": file})
    return entries
