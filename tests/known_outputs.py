"""Scenes and generators with known outputs, for the tests of evaluation and samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srpkd.data.synthetic import SyntheticDataset, generate_scenes
from srpkd.training.options import ResolvedConfig, TrainConfig

COUNT = 33  # one more than a batch of test_loader
SCENES = generate_scenes(COUNT, 16, seed=5)


def options(**others: Any) -> ResolvedConfig:
    return TrainConfig(
        **{"dataroot": ":synthetic:", "synthetic_size": 16, "netG": "resnet_1blocks", "device": "cpu"} | others
    ).resolved()


class Lookup(nn.Module):
    """Maps known images to the outputs that belong to them."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        same = (x[:, None] == self.inputs[None]).flatten(2).all(2)
        assert same.any(1).all(), "not an image of the test set"
        return self.outputs[same.int().argmax(1)]


PHOTO_TO_LABEL = Lookup(SCENES.photos, SCENES.labels)


def scenes(direction: str = "AtoB") -> SyntheticDataset:
    return SyntheticDataset(SCENES, direction)


def folder(sizes: list[int], offset: float = 0.1) -> list[dict[str, Tensor]]:
    """Return items like those of a folder, which may differ in size; B is A plus an offset."""
    items = [{"A": torch.rand(3, size, size)} for size in sizes]
    return [item | {"B": item["A"] + offset} for item in items]
