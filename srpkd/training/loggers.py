"""Where else a run's metrics go, beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, each by a flag.

Their packages are imported only if their flag is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from .options import TrainConfig


class Logger(Protocol):
    """What the metrics of a run are given to."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Values by name, of a step of a stage."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in ``<run>/tensorboard``, which ``tensorboard --logdir`` reads."""

    def __init__(self, package: ModuleType, folder: Path) -> None:
        self.writer = package.SummaryWriter(str(folder / "tensorboard"))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """A run of Weights & Biases, or of Trackio, which takes after it."""

    def __init__(self, package: ModuleType, folder: Path, config: TrainConfig) -> None:
        self.run = package.init(project="srpkd", name=folder.name, config=asdict(config))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # every stage begins with step 1 again, which the trackers' own count of steps cannot do
        self.run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def import_loggers(config: TrainConfig) -> dict[str, ModuleType]:
    """The packages that the flags ask for.

    Raises:
        ImportError: one is not installed; says how to install it.
    """
    packages = {}
    for name, module in PACKAGES.items():
        if getattr(config, name):
            try:
                packages[name] = import_module(module)
            except ImportError as error:
                raise ImportError(
                    f'--{name} needs the package {name}: pip install "srpkd[{name}]", or leave it out'
                ) from error
    return packages


def open_loggers(packages: Mapping[str, ModuleType], folder: Path, config: TrainConfig) -> list[Logger]:
    """Begin to log to each of the packages; call it in one process."""
    return [
        TensorBoard(package, folder) if name == "tensorboard" else Tracker(package, folder, config)
        for name, package in packages.items()
    ]
