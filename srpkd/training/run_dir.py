"""What a run leaves in its folder while it goes on: metrics, pictures, checkpoints, its state, and the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic_write, writing
from ..models.checkpoints import save_weights
from ..reporting.page import write_report
from . import distributed
from .loggers import Logger
from .resume import save_state


class RunDir:
    """The folder of a run; only the first of several processes writes there.

    Args:
        folder: of the run; see ``new_folder``.
        config: the configuration as YAML, written to ``config.yaml``.
        report: what the page says from the start: title, task, command, environment; see ``srpkd.report``.
        resumed: what ``kept`` gave, as the state holds it: the record then goes on from there. What was logged after
            that is cut off, since it will be logged again.
        watchers: what else metrics are given to; see ``srpkd.training.loggers``.
    """

    def __init__(
        self,
        folder: Path,
        config: str = "",
        report: dict[str, Any] | None = None,
        resumed: dict[str, Any] | None = None,
        watchers: Sequence[Logger] = (),
    ) -> None:
        self.folder, self._watchers = folder, watchers
        self.report = {"samples": [], "relations": [], "files": [], **(report or {})}
        elapsed = 0.0
        self._metrics = None
        if distributed.rank() == 0:
            self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            if resumed is None:
                with atomic_write(folder / "config.yaml") as file:
                    file.write(config.encode())
            else:
                for leftover in folder.rglob(".*.tmp"):
                    leftover.unlink()
                self._metrics.truncate(min(os.fstat(self._metrics.fileno()).st_size, resumed["metrics_bytes"]))
        if resumed is not None:
            self.report, elapsed = json.loads(resumed["report"]), resumed["elapsed"]
        self.report["status"] = "running"
        self._start = time.perf_counter() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, before it was resumed too."""
        return time.perf_counter() - self._start

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``."""
        if self._metrics is not None:
            line = {"stage": stage, "step": step, "seconds": round(self.elapsed, 3), **values}
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.write(json.dumps(line) + "\n")
            for watcher in self._watchers:
                watcher.log(stage, step, values)

    def save_checkpoint(self, folder: Path, name: str, networks: dict[str, nn.Module]) -> None:
        """Write weights as the public code names them: ``<folder>/<name>_net_<network>.pth``."""
        if self._metrics is not None:
            for network, module in networks.items():
                save_weights(module, folder / f"{name}_net_{network}.pth")

    def save_resume_state(self, state: dict[str, Any]) -> None:
        """Write the run's state, with what this record itself needs to go on."""
        if self._metrics is not None:
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.flush()
                os.fsync(self._metrics.fileno())
            written = os.fstat(self._metrics.fileno()).st_size
            kept = {"metrics_bytes": written, "report": json.dumps(self.report), "elapsed": self.elapsed}
            save_state(self.folder, state | {"record": kept})

    def write_report(self) -> None:
        """Bring ``report.json`` and ``index.html`` up to date."""
        if self._metrics is not None:
            self.report["elapsed_seconds"] = round(self.elapsed, 1)
            with atomic_write(self.folder / "report.json") as file:
                file.write(json.dumps(self.report, indent=1).encode())
            write_report(self.folder)

    def close(self) -> None:
        """Close ``metrics.jsonl``, and what else was watching."""
        if self._metrics is not None:
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.close()
            for watcher in self._watchers:
                watcher.close()


def new_folder(runs_dir: str, name: str) -> Path:
    """Make and return the first of name, name-2, name-3, ... in runs_dir that does not exist yet: nothing is
    overwritten.

    Raises:
        ValueError: it, or runs_dir, cannot be made.
    """
    folder = Path(runs_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_dir {folder}: this folder cannot be made: {error.strerror}") from error
    number = 1
    while True:
        path = folder / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ValueError(f"{path}: this folder cannot be made: {error.strerror}") from error
