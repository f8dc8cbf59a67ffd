"""Train the study's runs in worker processes and read their scores."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import torch
import yaml

from srpkd.checking.processes import exit_with_parent
from srpkd.devices import describe_device
from srpkd.progress import ProgressBar
from srpkd.training.config import read_config, to_yaml
from srpkd.training.options import RESUME_OPTIONS, ResolvedConfig
from srpkd.training.pipeline import run
from srpkd.training.resume import has_state

from .plan import SETTINGS, Study, run_folder


def train(study: Study, setting: str, configs: Sequence[ResolvedConfig]) -> list[list[float]]:
    """Train the runs that are not finished, `study.workers` at a time, and return the scores of each run by seed.

    Raises:
        ValueError: A folder with the name of a run has other contents.
        DataError, CheckpointError, Diverged: As ``srpkd.training.pipeline.run``.
    """
    missing = [config for config in configs if not is_finished(config)]
    if study.workers == 1 or len(missing) < 2:
        for config in ProgressBar(missing, desc="runs", disable=not missing):
            train_one(config)
    else:
        # spawned processes, because forked ones would inherit torch's threads
        context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // study.workers)
        with ProcessPoolExecutor(study.workers, context, _initialize_worker, (threads,)) as pool:
            futures = [pool.submit(train_one, config) for config in missing]
            try:
                for future in ProgressBar(futures, desc="runs"):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [scores(config, SETTINGS[setting].metric) for config in configs]


def _initialize_worker(threads: int) -> None:
    """Set the number of threads, and end this process when the study's process ends for any reason."""
    torch.set_num_threads(threads)
    exit_with_parent()


def train_one(config: ResolvedConfig) -> None:
    """Start or resume a run; its output goes to a log file beside its folder."""
    folder = run_folder(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    resume = str(folder) if has_state(folder) else None
    with (
        open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        run(replace(config, resume=resume))


def is_finished(config: ResolvedConfig) -> bool:
    """Return whether a run is complete.

    Raises:
        ValueError: The folder of the run has other options, or contains no run that can be read or resumed.
    """
    folder = run_folder(config)
    if not folder.exists():
        return False
    try:
        recorded = read_config(str(folder / "config.yaml"))
        finished = json.loads((folder / "report.json").read_text(encoding="utf-8"))["status"] == "finished"
    except (ValueError, OSError, KeyError) as error:
        if has_state(folder):
            return False  # stopped before it wrote its page
        raise ValueError(f"{folder} is not a run that can be resumed: move or remove this folder") from error
    wanted = yaml.safe_load(to_yaml(config))
    ignored = RESUME_OPTIONS | {"teacher"}  # a path that moves with runs_dir
    if changed := [name for name in wanted if name not in ignored and wanted[name] != recorded.get(name)]:
        differences = ", ".join(f"{name} was {recorded.get(name)!r} and is {wanted[name]!r}" for name in changed)
        raise ValueError(f"{folder} belongs to another study: {differences}; choose another --runs_dir")
    return finished


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions and the hardware that a report names."""
    return {"torch": torch.__version__, "python": platform.python_version(), "device": describe_device(device)}


def scores(config: ResolvedConfig, metric: str) -> list[float]:
    """Return a metric of a finished run's students, by seed."""
    lines = map(json.loads, (run_folder(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [values[metric] for values in lines if metric in values]
