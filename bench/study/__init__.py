"""Does the relation loss help, and in which form, at which layer, with which weight? ``python -m bench.study``.

Choosing: on one generated world, one thing after the other, by the mean over the seeds. First the weight of output
distillation; upon it the weight of feature matching (FitNet), and the form and weight of the relation loss; then the
layers that it compares. Judging: on other worlds, each with textures, colours, training scenes, a teacher and a seed of
its own. Students that are compared start alike and see the same images in the same order, so their scores are compared
pair by pair: an effect is claimed where the 95 % confidence interval of the mean difference does not hold 0.

Every student is a run of ``srpkd.train`` in a folder of its own. A study that was stopped goes on: what is there is
not trained again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from srpkd.arguments import positive
from srpkd.data.folders import DataError
from srpkd.extras import require
from srpkd.models.checkpoints import CheckpointError
from srpkd.training.config import as_flags, parse_arguments
from srpkd.training.loop import Diverged
from srpkd.training.options import check_keys
from srpkd.training.summary import device_name

from .plan import CHOOSING, OWN_OPTIONS, SETTINGS, Options, Study, teacher
from .report import render, write
from .selection import choose, judge

# --- the command line -----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd study",
        description="Whether the relation loss helps on generated images: weights are chosen on one world and judged "
        "on others. Takes hours on a CPU; a study that was stopped goes on when it is called again.",
        epilog='example, on a GPU: srpkd study --options "{synthetic_size: 128, batch_size: 8}" --workers 1',
    )
    add = result.add_argument
    add("--runs_dir", default="runs/study", help="where its runs are kept, and the report (default: %(default)s)")
    add("--seeds", type=positive, default=5, help="students of each kind in choosing (default: %(default)s)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is judged (default: all)")
    add(
        "--worlds",
        nargs="+",
        type=positive,
        default=[6],
        help="worlds that each is judged on, or one number for all (6)",
    )
    add(
        "--workers",
        type=positive,
        default=min(2, os.cpu_count() or 1),
        help="runs at a time (default here: %(default)s)",
    )
    add("--options", default="{}", metavar="YAML", help="options of srpkd train that all runs have, {name: value, ...}")
    add("--docs", type=Path, metavar="FOLDER", help="write the report there too")
    return result


def common_options(text: str) -> Options:
    """The options of all runs, from YAML; a value of the wrong type ends the process, as on srpkd train's command line.

    Raises:
        ValueError: it is not a mapping of options, or has some that are the study's own.
    """
    try:
        options = check_keys(yaml.safe_load(text), "--options")
    except yaml.YAMLError as error:
        raise ValueError(f"--options {text}: is not YAML: {error}") from error
    if own := sorted(OWN_OPTIONS & options.keys()):
        raise ValueError(f"--options: {', '.join(own)} cannot be given, the study sets it in every run by itself")
    checked = parse_arguments(["--preset=demo", *as_flags(options)])
    return {name: getattr(checked, name) for name in options}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Options or folders that cannot be used end it with one message."""
    given = parser().parse_args(arguments)
    try:
        worlds = given.worlds * len(given.settings) if len(given.worlds) == 1 else given.worlds
        if len(worlds) != len(given.settings):
            raise ValueError(f"--worlds: expected one number, or {len(given.settings)}, one for each of the settings")
        options = common_options(given.options)
        require("scipy.stats", "study", "a confidence interval")
        study = Study(given.runs_dir, given.seeds, dict(zip(given.settings, worlds)), given.workers, options)
        device = teacher(study, CHOOSING, 1).torch_device
        steps = choose(study)
        result = {
            "command": shlex.join(["srpkd", "study", *(sys.argv[1:] if arguments is None else arguments)]),
            "environment": {
                "torch": torch.__version__, "python": platform.python_version(), "device": device_name(device),
            },
            "choice": steps,
            "judged": [judge(study, setting, steps) for setting in study.settings],
        }  # fmt: skip
        report = write(result, Path(given.runs_dir))
        if given.docs:
            report = write(result, given.docs)
    except (ValueError, TypeError, OSError, ImportError, DataError, CheckpointError, Diverged) as error:
        sys.exit(f"error: {error}")
    print(f"{render(result)}\nreport: {report}")


if __name__ == "__main__":
    main()
