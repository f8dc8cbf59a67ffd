"""Study whether the relation loss improves students, and in which form, at which layer and with which weight.

    python -m bench study                                                      hours on a CPU
    python -m bench study --options "{synthetic_size: 128, batch_size: 8}" --workers 1        on a GPU

Selection: on one generated data set, one choice at a time, by the mean score over seeds: first the weight of output
distillation; given that, the weight of feature matching (FitNet), and the form and weight of the relation loss; last,
the layers that the relation loss compares.

Evaluation: on other data sets, which differ in textures, colours, training scenes, teacher and seed. Students that are
compared start from the same weights and see the same images in the same order, so their scores are compared in pairs.
The study claims an effect only if the 95 % confidence interval of the mean difference excludes 0.

Each run of ``srpkd.train`` has a folder in RUNS_DIR. Call the study again to resume it: finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import yaml

from srpkd.arguments import positive
from srpkd.extras import require
from srpkd.files import expand_user
from srpkd.training.config import as_flags, parse_arguments
from srpkd.training.options import check_keys

from .plan import RESERVED_OPTIONS, SELECTION_SETTING, SETTINGS, Options, Study, teacher_run
from .report import render, write
from .runs import environment
from .selection import evaluate, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--runs_dir",
        type=expand_user,
        default="runs/study",
        help="folder of the runs and of the report (default: %(default)s)",
    )
    add("--seeds", type=positive, default=5, help="students of each kind in the selection (default: %(default)s)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to evaluate (default: all)")
    datasets = "data sets to evaluate on: one number for all settings, or one per setting (default: 6)"
    add("--datasets", nargs="+", type=positive, default=[6], help=datasets)
    workers = min(2, os.cpu_count() or 1)
    add("--workers", type=positive, default=workers, help="runs at a time (default here: %(default)s)")
    add("--options", default="{}", metavar="YAML", help="options of srpkd train for all runs, {name: value, ...}")
    add("--report", type=expand_user, metavar="DIR", help="also write the report to this folder")


def run(arguments: argparse.Namespace) -> None:
    """Run or resume the study, print its report and write it to the folder of the runs."""
    study = study_of(arguments)
    steps = select(study)
    device = teacher_run(study, SELECTION_SETTING, 1).torch_device
    result = {
        "command": arguments.command_line,
        "environment": environment(device),
        "choice": steps,
        "judged": [evaluate(study, setting, steps) for setting in study.settings],
    }
    path = write(result, Path(study.runs_dir))
    if arguments.report:
        path = write(result, arguments.report)
    print(f"{render(result)}\nreport: {path}")


def study_of(arguments: argparse.Namespace) -> Study:
    """Return the study that the command line describes.

    Raises:
        ValueError: The numbers of settings and data sets differ, or ``--options`` is invalid.
        ImportError: scipy is missing.
    """
    settings, counts = arguments.settings, arguments.datasets
    if len(counts) == 1:
        counts = counts * len(settings)
    if len(counts) != len(settings):
        raise ValueError(
            f"--datasets: received {len(counts)} numbers, expected one number or {len(settings)}, one per setting"
        )
    options = common_options(arguments.options)
    require("scipy.stats", "study", "a confidence interval")
    return Study(str(arguments.runs_dir), arguments.seeds, dict(zip(settings, counts)), arguments.workers, options)


def common_options(text: str) -> Options:
    """Parse the options of all runs from YAML; exit as the command line of ``srpkd train`` does if a type is wrong.

    Raises:
        ValueError: The text is not a mapping of options, or contains options that the study sets.
    """
    try:
        options = check_keys(yaml.safe_load(text), "--options")
    except yaml.YAMLError as error:
        raise ValueError(f"--options {text}: invalid YAML: {error}") from error
    if reserved := sorted(RESERVED_OPTIONS & options.keys()):
        raise ValueError(f"--options: remove {', '.join(reserved)}: the study sets it for every run")
    checked = parse_arguments(["--preset=demo", *as_flags(options)])
    return {name: getattr(checked, name) for name in options}
