"""What a run leaves in its folder while it goes on: metrics, pictures, checkpoints, and the page made of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import atomic_write, save_weights
from .report import write_report


class RunRecord:
    """The folder of a run, ``<runs_dir>/<name>``; if that exists, a new one beside it: nothing is overwritten.

    Args:
        runs_dir, name: where, and what it is called.
        config: the resolved configuration as YAML, written to ``config.yaml``.
        report: what the page says from the start: title, task, command, environment; see ``srpkd.report``.
    """

    def __init__(self, runs_dir: str, name: str, config: str, report: dict[str, Any]) -> None:
        self.folder = _new_folder(Path(runs_dir), name)
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(config.encode())
        self.report = {"samples": [], "relations": [], "files": [], "status": "running", **report}
        self._start = time.perf_counter()
        self._metrics = open(self.folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``."""
        line = {"stage": stage, "step": step, "seconds": round(self.elapsed, 3), **values}
        self._metrics.write(json.dumps(line) + "\n")

    def save(self, folder: Path, name: str, networks: dict[str, nn.Module]) -> None:
        """Write weights as the public code names them: ``<folder>/<name>_net_<network>.pth``."""
        for network, module in networks.items():
            save_weights(module, folder / f"{name}_net_{network}.pth")

    def write(self) -> Path:
        """Bring ``report.json`` and ``index.html`` up to date; the path of the page."""
        self.report["elapsed_seconds"] = round(self.elapsed, 1)
        with atomic_write(self.folder / "report.json") as file:
            file.write(json.dumps(self.report, indent=1).encode())
        return write_report(self.folder)

    def close(self) -> None:
        """Close ``metrics.jsonl``."""
        self._metrics.close()


def _new_folder(runs_dir: Path, name: str) -> Path:
    """Make and return the first of name, name-2, name-3, ... that does not exist yet."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_dir {runs_dir}: this folder cannot be made: {error.strerror}") from error
    number = 1
    while True:
        folder = runs_dir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
