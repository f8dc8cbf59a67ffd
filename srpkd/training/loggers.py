"""Optional loggers of a run's metrics beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Each has an option; its package is imported only if the option is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ..extras import require
from ..files import writing
from .options import ResolvedConfig


class Logger(Protocol):
    """A receiver of the metrics of a run."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step of a stage, by name."""

    def close(self) -> None:
        """Finish the log."""


class TensorBoard:
    """Event files in ``<run>/tensorboard``, for ``tensorboard --logdir``."""

    def __init__(self, package: ModuleType, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        with writing(self.folder):
            self.writer = package.SummaryWriter(str(self.folder))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        with writing(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        with writing(self.folder):
            self.writer.close()


class Tracker:
    """A run of Weights & Biases or of Trackio, which have the same interface."""

    def __init__(self, package: ModuleType, folder: Path, config: ResolvedConfig) -> None:
        self.run = package.init(project="srpkd", name=folder.name, config=asdict(config))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # steps start at 1 in every stage, but a tracker's step must increase: log it as a value
        self.run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


def import_loggers(config: ResolvedConfig) -> dict[str, ModuleType]:
    """Return name -> package of the loggers that the options select.

    Raises:
        ImportError: a package is not installed; the message says how to install it.
    """
    options = {
        "tensorboard": (config.tensorboard, "torch.utils.tensorboard"),
        "wandb": (config.wandb, "wandb"),
        "trackio": (config.trackio, "trackio"),
    }
    return {name: require(module, name, f"--{name}") for name, (selected, module) in options.items() if selected}


def open_loggers(packages: Mapping[str, ModuleType], folder: Path, config: ResolvedConfig) -> list[Logger]:
    """Open a logger with each package of ``import_loggers``; call this on rank 0 only."""
    return [
        TensorBoard(package, folder) if name == "tensorboard" else Tracker(package, folder, config)
        for name, package in packages.items()
    ]
