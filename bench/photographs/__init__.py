"""Study whether the relation loss helps on photographs, with the weights that the study on generated scenes selected.

    python -m bench photographs                    two hours on one core of a CPU

Photographs that come inside scikit-image, scikit-learn and matplotlib are cut into crops; the test crops are from
photographs that neither teacher nor students have seen. Two tasks: restore a blurred, noisy image, and convert a
halftone to continuous tones. In each partition into training and test photographs, students start from the same weights
and see the same crops in the same order, so their scores are compared in pairs, as in ``python -m bench study``.

Each run of ``srpkd.train`` has a folder in RUNS_DIR. Call it again to resume it: finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from bench.study.runs import environment, is_finished, train_one
from srpkd.arguments import positive
from srpkd.extras import require
from srpkd.files import expand_user
from srpkd.progress import ProgressBar

from .images import SHORT_SIDE, TASKS, write_dataset
from .plan import Study, dataset_folder, run_config
from .report import render, write
from .scores import examples, run_scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--runs_dir",
        type=expand_user,
        default="runs/photographs",
        help="folder of the runs and of the report (default: %(default)s)",
    )
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--partitions", type=positive, default=6, help="into training and test photographs (default: %(default)s)")
    add("--size", type=positive, default=96, help="side of the crops in pixels (default: %(default)s)")
    add("--pairs", type=positive, default=400, help="training crops (default: %(default)s)")
    add("--epoch_steps", type=positive, help="steps per epoch, to try it out (default: that of the plan)")
    add("--report", type=expand_user, metavar="DIR", help="also write the report to this folder")


def run(arguments: argparse.Namespace) -> None:
    """Run or resume the study, print its report and write it to the folder of the runs."""
    require("scipy.stats", "study", "a confidence interval")
    if arguments.size > SHORT_SIDE:
        raise ValueError(f"--size: received {arguments.size}, expected at most {SHORT_SIDE}, as the photographs have")
    study = Study(str(arguments.runs_dir), arguments.size, arguments.pairs, arguments.epoch_steps)
    pairs = [(task, number) for number in range(arguments.partitions) for task in arguments.tasks]
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in arguments.tasks}
    for task, number in ProgressBar(pairs, desc="runs"):
        write_dataset(dataset_folder(study, task, number), task, number, study.pairs, study.size)
        config = run_config(study, task, number)
        if not is_finished(config):
            train_one(config)
        found[task].append(run_scores(study, task, number))
    result = {
        "command": _without_folders(arguments.command_line),
        "size": study.size,
        "pairs": study.pairs,
        "environment": environment(config.torch_device),
        "tasks": found,
    }
    images = {task: examples(study, task, 0) for task in arguments.tasks}
    for folder in (Path(study.runs_dir), *([arguments.report] if arguments.report else [])):
        path = write(result, images, folder)
    print(f"{render(result)}\nreport: {path}")


def _without_folders(command: str) -> str:
    """Return a command without the folders that it reads and writes, which say nothing about its results."""
    return re.sub(r" --(runs_dir|report)[ =]\S+", "", command)
