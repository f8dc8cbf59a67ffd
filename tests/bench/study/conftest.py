"""A study that trains in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.study.plan import Study

TINY = {
    "synthetic_size": 16, "synthetic_pairs": 4, "synthetic_test_pairs": 2, "max_dataset_size": 2, "epoch_steps": 1,
    "n_epochs": 1, "n_epochs_decay": 0, "teacher_n_epochs": 1, "teacher_n_epochs_decay": 0, "ngf": 2, "teacher_ngf": 3,
    "ndf": 2, "n_layers_D": 1, "teacher_netG": "resnet_3blocks", "netG": "resnet_3blocks",
}  # fmt: skip


@pytest.fixture
def tiny_options() -> dict[str, Any]:
    """Options of ``srpkd train`` for two training steps on two images of 16 x 16 pixels."""
    return dict(TINY)


@pytest.fixture
def tiny_study() -> Callable[..., Study]:
    """Make a study of one setting with tiny runs in a folder; keywords are options of ``srpkd train``."""

    def make(folder: Path, workers: int = 1, **options: Any) -> Study:
        return Study(str(folder), 2, {"few pairs": 2}, workers, TINY | options)

    return make
