"""Train the study's runs in worker processes, and read their scores."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import torch
import yaml
from tqdm import tqdm

from srpkd.training.config import read_config, to_yaml
from srpkd.training.options import RESUME_OPTIONS, TrainConfig
from srpkd.training.pipeline import run
from srpkd.training.resume import has_state

from .plan import SETTINGS, Study, run_folder


def train(study: Study, setting: str, runs: Sequence[TrainConfig]) -> list[list[float]]:
    """Do those runs that are not finished, a few at a time: the setting's scores of each, seed by seed.

    Raises:
        ValueError: a folder of a run's name holds something else.
        DataError, CheckpointError, Diverged: as ``srpkd.train.run``.
    """
    missing = [config for config in runs if not is_finished(config)]
    if study.workers == 1 or len(missing) < 2:
        for config in tqdm(missing, desc="runs", disable=not missing):
            train_one(config)
    else:
        # a run at a time in each process; forked ones would inherit torch's threads
        context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // study.workers)
        with ProcessPoolExecutor(study.workers, context, _begin_worker, (threads,)) as pool:
            waiting = [pool.submit(train_one, config) for config in missing]
            try:
                for done in tqdm(waiting, desc="runs"):
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [scores(config, SETTINGS[setting].metric) for config in runs]


def _begin_worker(threads: int) -> None:
    """Have so many threads, and end when the study does, however it is ended."""
    torch.set_num_threads(threads)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def train_one(config: TrainConfig) -> None:
    """Do a run, or what is left of it; what it prints goes to a file beside its folder."""
    folder = run_folder(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stopped = str(folder) if has_state(folder) else None
    with (
        open(folder.with_name(f"{folder.name}.log"), "a", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        run(replace(config, resume=stopped))


def is_finished(config: TrainConfig) -> bool:
    """Whether a run is there, whole.

    Raises:
        ValueError: its folder is there, but is of other options, or can neither be read nor gone on with.
    """
    folder = run_folder(config)
    if not folder.exists():
        return False
    try:
        there = read_config(str(folder / "config.yaml"))
        finished = json.loads((folder / "report.json").read_text())["status"] == "finished"
    except (ValueError, OSError, KeyError) as error:
        if has_state(folder):
            return False  # stopped before its page was written
        raise ValueError(f"{folder} is in the way: it is not a run that can be gone on with; move it away") from error
    wanted = yaml.safe_load(to_yaml(config))
    moved = RESUME_OPTIONS | {"teacher"}  # which lies beside it, wherever that is
    if changed := [name for name in wanted if name not in moved and wanted[name] != there.get(name)]:
        differences = ", ".join(f"{name} was {there.get(name)!r} and is {wanted[name]!r}" for name in changed)
        raise ValueError(f"{folder} is of another study: {differences}; take another --runs_dir")
    return finished


def scores(config: TrainConfig, metric: str) -> list[float]:
    """A finished run's students by this metric, seed by seed."""
    lines = map(json.loads, (run_folder(config) / "metrics.jsonl").read_text().splitlines())
    return [values[metric] for values in lines if metric in values]
