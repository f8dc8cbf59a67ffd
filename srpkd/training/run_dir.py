"""The folder of a run and what is written there: metrics, checkpoints, the state to resume from, and the report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakValueDictionary

from torch import Tensor, nn

from ..files import WriteError, write_file, writing
from ..models.checkpoints import save_tensors, save_weights
from ..reporting.curves import MetricsReader
from ..reporting.page import write_report
from . import distributed
from .folder_lock import FolderLock
from .loggers import Logger
from .resume import FINAL, save_final_state, save_state


class RunDir:
    """The folder of a run; only rank 0 writes there.

    Args:
        folder: an existing folder; see ``new_folder``.
        config: the configuration as YAML, for ``config.yaml``.
        report: initial content of ``report.json``: title, task, command, environment; see ``srpkd.report``.
        resumed: entry "record" of the state of an interrupted run, to continue its files. Metrics that were logged
            after that state are deleted: they will be logged again.
        loggers: further receivers of the metrics; see ``srpkd.training.loggers``.
        lock: that of the folder; by default it is locked here.

    Attributes:
        folder: the folder.
        report: content of ``report.json``.
        drawn: what the pictures show, which have been written by this process; see ``write_samples``.
    """

    def __init__(
        self,
        folder: Path,
        config: str = "",
        report: Mapping[str, Any] | None = None,
        resumed: Mapping[str, Any] | None = None,
        loggers: Sequence[Logger] = (),
        lock: FolderLock | None = None,
    ) -> None:
        self.folder, self._loggers = folder, loggers
        self._lock: FolderLock | None = None
        self.report: dict[str, Any] = {"samples": [], "relations": [], "files": [], **(report or {})}
        # weak: networks whose training continues are copied for a picture, and the copies need memory
        self.drawn: WeakValueDictionary[str, Any] = WeakValueDictionary()
        elapsed = 0.0
        self._metrics: TextIO | None = None
        self._metrics_reader = MetricsReader(folder / "metrics.jsonl")
        if distributed.rank() == 0:
            self._lock = lock or FolderLock(folder)
            self._metrics = open(folder / "metrics.jsonl", "a", 1, encoding="utf-8", newline="\n")  # noqa: SIM115
            if resumed is None:
                write_file(folder / "config.yaml", config.encode())
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
        """Duration of the run in seconds, including the time before it was resumed."""
        return time.perf_counter() - self._start

    def check_folder(self) -> None:
        """Check that this folder is still the one of the run: writing a file would create a new one.

        Raises:
            WriteError: it was moved or deleted.
        """
        # Windows moves and deletes no folder with an open file
        if self._metrics is not None and sys.platform != "win32":
            with suppress(OSError):
                if os.path.samestat(os.stat(self.folder / "metrics.jsonl"), os.fstat(self._metrics.fileno())):
                    return
            raise WriteError(
                f"{self.folder} was moved or deleted during the run: resume it with --resume and its new path, or "
                "start a new run"
            )

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``, and pass the values to the loggers."""
        if self._metrics is not None:
            line = {"stage": stage, "step": step, "seconds": round(self.elapsed, 3), **values}
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.write(json.dumps(line) + "\n")
            for logger in self._loggers:
                logger.log(stage, step, values)

    def save_checkpoint(self, folder: Path, name: str, networks: Mapping[str, nn.Module]) -> None:
        """Write weights to ``<folder>/<name>_net_<network>.pth``, the file names of the public code."""
        if self._metrics is not None:
            self.check_folder()
            for network, module in networks.items():
                save_weights(module, folder / f"{name}_net_{network}.pth")

    def save_adapters(self, folder: Path, adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the weights of feature adapters, by direction, to ``<folder>/latest_net_adapter_<direction>.pth``."""
        if self._metrics is not None:
            for direction, weights in adapters.items():
                save_tensors(weights, folder / f"latest_net_adapter_{direction}.pth")

    def save_resume_state(self, state: dict[str, Any]) -> None:
        """Write the state of the run, and what this class needs to resume."""
        if self._metrics is not None:
            self.check_folder()
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.flush()
                # a resumed run keeps these bytes: without them, steps would be missing
                os.fsync(self._metrics.fileno())
            size = os.fstat(self._metrics.fileno()).st_size
            own = {"metrics_bytes": size, "report": json.dumps(self.report), "elapsed": self.elapsed}
            save_state(self.folder, state | {"record": own})

    def save_final_state(self, folder: Path, state: dict[str, Any] | None) -> None:
        """Write the state of a finished stage to its folder; None removes the previous one."""
        if self._metrics is not None:
            if state is None:
                with writing(folder):
                    (folder / FINAL).unlink(missing_ok=True)
            else:
                save_final_state(folder, state)

    def write_report(self) -> None:
        """Write ``report.json`` and ``index.html``."""
        if self._metrics is not None:
            self.check_folder()
            self.report["elapsed_seconds"] = round(self.elapsed, 1)
            write_file(self.folder / "report.json", json.dumps(self.report, indent=1).encode(), "content")
            with writing(self.folder / "index.html"):  # also if a file that it reads cannot be read
                write_report(self.folder, self._metrics_reader)

    def close(self) -> None:
        """Close ``metrics.jsonl`` and the loggers."""
        if self._metrics is not None:
            with writing(self.folder / "metrics.jsonl"):
                self._metrics.close()
            for logger in self._loggers:
                logger.close()
        if self._lock is not None:
            self._lock.close()


def new_folder(runs_dir: str, name: str) -> Path:
    """Create and return the first folder of name, name-2, name-3, ... in runs_dir that does not exist yet.

    Raises:
        ValueError: the folder, or runs_dir, cannot be created.
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
