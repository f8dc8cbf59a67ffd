"""How good generators are on the test images, and the pictures of it that the report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.batches import collate, sides
from ..data.synthetic import CLASSES, classes_of
from ..distiller import FeatureTap
from ..metrics.pixels import confusion_matrix, mean_iou, pixel_accuracy, psnr
from ..models.networks import default_tap
from ..reporting.pictures import mark_pixel, relation_picture, save_image
from .options import TrainConfig

METRICS = {
    "mIoU": (
        "mIoU %",
        ".1f",
        "mean intersection over union of the six classes, each pixel's by its nearest palette colour",
    ),
    "accuracy": ("accuracy %", ".1f", "share of the pixels whose class is right"),
    "psnr": ("PSNR dB", ".2f", "to the true image"),
    "teacher_psnr": ("PSNR to teacher dB", ".2f", "to the teacher's output"),
}
DIRECTIONS = {"G": "", "G_A": "A to B", "G_B": "B to A"}


@torch.no_grad()
def evaluate(
    generators: Mapping[str, nn.Module], dataset: Dataset, config: TrainConfig, teachers: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Metrics by name, "mIoU" or, with two directions, "mIoU A to B", of generators in eval mode.

    Where the truth is a label map of the generated world: mIoU and accuracy, in percent; where it is another
    image: PSNR in dB; to the teacher's output where there is a teacher: PSNR in dB. Unpaired images have no truth.
    """
    metrics = {}
    paired = config.is_synthetic or config.dataset_mode == "aligned"
    for direction, generator in generators.items():
        source, target = sides(direction)
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
        sums: dict[str, float] = {}
        for batch in test_loader(dataset, config):
            images = batch[source].to(config.torch_device)
            output = generator(images).cpu()
            if paired and target_is_labels(config, direction):
                confusion += confusion_matrix(classes_of(output), classes_of(batch[target]), CLASSES)
            elif paired:
                sums["psnr"] = sums.get("psnr", 0) + len(images) * psnr(output, batch[target])
            if direction in teachers:
                likeness = psnr(output, teachers[direction](images).cpu())
                sums["teacher_psnr"] = sums.get("teacher_psnr", 0) + len(images) * likeness
        found = {name: total / len(dataset) for name, total in sums.items()}
        if confusion.any():
            found = {
                "mIoU": 100 * float(mean_iou(confusion)),
                "accuracy": 100 * float(pixel_accuracy(confusion)),
            } | found
        metrics |= {f"{name} {DIRECTIONS[direction]}".strip(): value for name, value in found.items()}
    return metrics


def metric_columns(rows: Iterable[Mapping[str, float]]) -> list[dict[str, str]]:
    """The table's columns for those metrics that some row has."""
    present = dict.fromkeys(key for row in rows for key in row if key.split(" ")[0] in METRICS)
    columns = []
    for key in sorted(present, key=lambda key: list(METRICS).index(key.split(" ")[0])):
        name, _, direction = key.partition(" ")
        label, form, explanation = METRICS[name]
        columns.append({"key": key, "label": f"{label} {direction}".strip(), "format": form, "help": explanation})
    return columns


@torch.no_grad()
def show_samples(
    folder: Path, shown: Mapping[str, Mapping[str, nn.Module]], dataset: Dataset, config: TrainConfig
) -> list[dict[str, Any]]:
    """Write the first test images as input, each network's output and truth; what the page needs to show them.

    Args:
        shown: label -> direction -> generator in eval mode.
    """
    samples = []
    paired = config.is_synthetic or config.dataset_mode == "aligned"
    for index in range(min(config.samples, len(dataset))):
        item = dataset[index]
        # the teacher may know one direction alone
        for direction in dict.fromkeys(direction for generators in shown.values() for direction in generators):
            source, target = sides(direction)
            images = {"input": item[source]}
            for label, generators in shown.items():
                if direction in generators:
                    images[label] = generators[direction](item[source][None].to(config.torch_device))[0].cpu()
            if paired:
                images["truth"] = item[target]
            caption = f"test image {index} {DIRECTIONS[direction]}".strip()
            samples.append({"caption": caption, "images": _write(folder, f"{index:03d}{direction}", images)})
    return samples


@torch.no_grad()
def show_relations(
    folder: Path,
    shown: Mapping[str, Mapping[str, nn.Module]],
    dataset: Dataset,
    config: TrainConfig,
    places: Iterable[tuple[float, float]] = ((0.5, 0.5), (0.3, 0.7)),
) -> list[dict[str, Any]]:
    """Paint, per test image, the relation of one pixel to all others at each network's tapped layer.

    Args:
        shown: label -> direction -> generator in eval mode, the teacher's under "teacher".
        places: (y, x) of the pixel in an image, as shares of its height and width; one image each.
    """
    relations = []
    for index, (y, x) in zip(range(len(dataset)), places):
        direction = next(iter(next(iter(shown.values()), ())), None)
        if direction is None:
            break
        image = dataset[index][sides(direction)[0]]
        panels: dict[str, Any] = {}
        for label, generators in shown.items():
            if direction not in generators:
                continue
            feature = tapped_feature(generators[direction], label == "teacher", image, config)
            pixel = int(y * feature.shape[1]), int(x * feature.shape[2])
            panels.setdefault("the chosen pixel", mark_pixel(image, pixel, feature.shape))
            panels[label] = relation_picture(feature, pixel, tuple(image.shape[1:]), config.normalize)
        relations.append({"caption": f"test image {index}", "panels": _write(folder, f"relation{index:03d}", panels)})
    return relations


def tapped_feature(generator: nn.Module, is_teacher: bool, image: Tensor, config: TrainConfig) -> Tensor:
    """The feature (C, h, w) of an image (C, H, W) at the first layer that the run's options tap."""
    name = next(iter(config.layers.values() if is_teacher else config.layers)) if config.layers else None
    if name not in dict(generator.named_modules()):
        name = default_tap(generator)  # an variant may be of another architecture, with layers of its own
    tap = FeatureTap(generator, [name])
    try:
        with tap.recording() as features, torch.no_grad():
            generator(image[None].to(config.torch_device))
    finally:
        tap.close()
    return features[name][0]


def test_loader(dataset: Dataset, config: TrainConfig) -> DataLoader:
    """The test images in order; those of a folder one at a time, since they may differ in size."""
    return DataLoader(dataset, 32 if config.is_synthetic else 1, collate_fn=collate)


def target_is_labels(config: TrainConfig, direction: str) -> bool:
    """Whether a direction's target is a label map of the generated world."""
    return config.is_synthetic and (config.direction == "AtoB") == (direction != "G_B")


def _write(folder: Path, prefix: str, images: Mapping[str, Any]) -> list[dict[str, str]]:
    entries = []
    for number, (label, image) in enumerate(images.items()):
        file = f"images/{prefix}_{number}.png"
        save_image(image, folder / file)
        entries.append({"label": label, "file": file})
    return entries
