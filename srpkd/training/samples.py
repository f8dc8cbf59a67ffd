"""Sample images and relation maps of a run's networks, written as PNG files for the report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import collate, sides
from ..models.networks import default_tap
from ..reporting.pictures import mark_pixel, relation_picture, save_image
from ..taps import FeatureTap
from .datasets import ImageDataset, has_targets
from .options import ResolvedConfig
from .validation import DIRECTION_NAMES


@torch.no_grad()
def write_samples(
    folder: Path, shown: Mapping[str, Mapping[str, nn.Module]], dataset: ImageDataset, config: ResolvedConfig
) -> list[dict[str, Any]]:
    """Write the first test images: input, output of every network, and target if there is one.

    Args:
        folder: folder of the run.
        shown: label -> direction -> generator in eval mode.

    Returns:
        The "samples" of report.json: [{"caption": ..., "images": [{"label", "file"}, ...]}, ...].
    """
    samples = []
    for index in range(min(config.samples, len(dataset))):
        item = collate([dataset[index]])  # a batch of one
        # a teacher may have one direction only
        for direction in dict.fromkeys(direction for generators in shown.values() for direction in generators):
            source, target = sides(direction)
            images = {"input": item[source][0]}
            for label, generators in shown.items():
                if direction in generators:
                    images[label] = generators[direction](item[source].to(config.torch_device))[0].cpu()
            if has_targets(config):
                images["truth"] = item[target][0]
            caption = f"test image {index} {DIRECTION_NAMES[direction]}".strip()
            samples.append({"caption": caption, "images": _write(folder, f"{index:03d}{direction}", images)})
    return samples


@torch.no_grad()
def write_relation_maps(
    folder: Path,
    shown: Mapping[str, Mapping[str, nn.Module]],
    dataset: ImageDataset,
    config: ResolvedConfig,
    places: Iterable[tuple[float, float]] = ((0.5, 0.5), (0.3, 0.7)),
) -> list[dict[str, Any]]:
    """Write, per test image, the relation of one pixel to all others at each network's tapped layer.

    Args:
        folder: folder of the run.
        shown: label -> direction -> generator in eval mode; the teacher's label is "teacher".
        places: (y, x) of the pixel as fractions of the image's height and width, one for each test image.

    Returns:
        The "relations" of report.json: [{"caption": ..., "panels": [{"label", "file"}, ...]}, ...].
    """
    relations = []
    for index, (y, x) in zip(range(len(dataset)), places):
        direction = next(iter(next(iter(shown.values()), ())), None)
        if direction is None:
            break
        image = collate([dataset[index]])[sides(direction)[0]][0]
        panels: dict[str, Any] = {}
        for label, generators in shown.items():
            if direction not in generators:
                continue
            feature = tapped_feature(generators[direction], label == "teacher", image, config)
            pixel = int(y * feature.shape[1]), int(x * feature.shape[2])
            panels.setdefault("the chosen pixel", mark_pixel(image, pixel, feature.shape))
            panels[label] = relation_picture(feature, pixel, (image.shape[1], image.shape[2]), config.normalize)
        relations.append({"caption": f"test image {index}", "panels": _write(folder, f"relation{index:03d}", panels)})
    return relations


def tapped_feature(generator: nn.Module, is_teacher: bool, image: Tensor, config: ResolvedConfig) -> Tensor:
    """Return the feature (C, h, w) of an image (C, H, W) at the first layer in ``config.layers``."""
    names = (config.layers.values() if is_teacher else config.layers) if config.layers else ()
    name = next(iter(names), None)
    if name is None or name not in dict(generator.named_modules()):
        name = default_tap(generator)  # variants may have another architecture, with other layers
    tap = FeatureTap(generator, [name])
    try:
        with tap.recording() as features, torch.no_grad():
            generator(image[None].to(config.torch_device))
    finally:
        tap.close()
    return features[name][0]


def _write(folder: Path, prefix: str, images: Mapping[str, Any]) -> list[dict[str, str]]:
    entries = []
    for number, (label, image) in enumerate(images.items()):
        file = f"images/{prefix}_{number}.png"
        save_image(image, folder / file)
        entries.append({"label": label, "file": file})
    return entries
