"""Evaluation of generators on the test images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.batches import collate, sides
from ..data.synthetic import CLASSES, classes_of
from ..finite import check_finite
from ..metrics.pixels import confusion_matrix, mean_iou, pixel_accuracy, psnr
from .datasets import ImageDataset, has_targets
from .options import ResolvedConfig
from .stop_signals import raise_if_received

# name -> (label, format, explanation)
METRICS = {
    "mIoU": (
        "mIoU %",
        ".1f",
        "mean intersection over union of the six classes; a pixel's class is that of the nearest palette colour",
    ),
    "accuracy": ("accuracy %", ".1f", "fraction of pixels with the right class"),
    "psnr": ("PSNR dB", ".2f", "relative to the target image"),
    "teacher_psnr": ("PSNR to teacher dB", ".2f", "relative to the teacher's output"),
}
DIRECTION_NAMES = {"G": "", "G_A": "A to B", "G_B": "B to A"}


@torch.no_grad()
def evaluate(
    generators: Mapping[str, nn.Module],
    dataset: ImageDataset | None,
    config: ResolvedConfig,
    teachers: Mapping[str, nn.Module],
    name: str = "student",
) -> dict[str, float]:
    """Evaluate generators in eval mode on the test images; return {} if there are none.

    - target is a label map of the generated scenes: mIoU and accuracy in percent;
    - target is any other image: PSNR in dB;
    - the direction has a teacher: PSNR to the teacher's output in dB. Unpaired images have this one only.

    Args:
        generators: direction -> generator.
        teachers: direction -> teacher; directions may be missing.
        name: name of the generators, for an error message.

    Returns:
        Metrics by name: "mIoU", or "mIoU A to B" for a task of two directions.

    Raises:
        NonFiniteError: An output has a NaN or an infinite value.
        Stopped: A signal asked the process to stop.
    """
    if dataset is None:
        return {}
    confusions = {direction: torch.zeros(CLASSES, CLASSES, dtype=torch.int64) for direction in generators}
    sums: dict[str, defaultdict[str, float]] = {direction: defaultdict(float) for direction in generators}
    for batch in test_loader(dataset, config):
        for direction, generator in generators.items():  # in this loop, so that the images are read once
            raise_if_received()
            source, target = sides(direction)
            images = batch[source].to(config.torch_device)
            output = generator(images).cpu()
            check_finite(output, f"{name}: the output of {direction} for a test image", "use an earlier checkpoint")
            if _target_is_labels(config, direction):
                confusions[direction] += confusion_matrix(classes_of(output), classes_of(batch[target]), CLASSES)
            elif has_targets(config):
                sums[direction]["psnr"] += len(images) * psnr(output, batch[target])
            if direction in teachers:
                teacher_output = teachers[direction](images).cpu()
                check_finite(teacher_output, "the teacher's output for a test image", "use another --teacher")
                sums[direction]["teacher_psnr"] += len(images) * psnr(output, teacher_output)
    metrics: dict[str, float] = {}
    for direction, confusion in confusions.items():
        values = {name: total / len(dataset) for name, total in sums[direction].items()}
        if confusion.any():
            values = {"mIoU": 100 * mean_iou(confusion), "accuracy": 100 * pixel_accuracy(confusion)} | values
        metrics |= {f"{name} {DIRECTION_NAMES[direction]}".strip(): value for name, value in values.items()}
    return metrics


def metric_columns(rows: Iterable[Mapping[str, float]]) -> list[dict[str, str]]:
    """Return the table columns of all metrics in `rows`, in the order of METRICS."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [
        {"key": key, "label": label + key.removeprefix(name), "format": spec, "help": explanation}
        for name, (label, spec, explanation) in METRICS.items()
        for key in keys
        if key.partition(" ")[0] == name
    ]


def test_loader(dataset: ImageDataset, config: ResolvedConfig) -> DataLoader:
    """Return a loader of the test images in order. Images of a folder may differ in size: their batch size is 1."""
    return DataLoader(dataset, 32 if config.is_synthetic else 1, collate_fn=collate)


def _target_is_labels(config: ResolvedConfig, direction: str) -> bool:
    return config.is_synthetic and (config.direction == "AtoB") == (direction != "G_B")
