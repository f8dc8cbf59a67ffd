"""Train a generator, or distil a small one from a large one: ``python -m srpkd.train``.

A run is a list of stages: the teacher, unless it is loaded from a file, then every student for every seed. The state
of the run is saved between stages and every `save_latest_freq` steps; ``--resume`` continues from it.
"""

from __future__ import annotations

import shlex
import sys

from .cli import prepare_terminal
from .data.folders import DataError
from .files import WriteError
from .finite import NonFiniteError
from .models.checkpoints import CheckpointError
from .reporting.table import format_table
from .training import distributed
from .training.config import parse_arguments
from .training.loop import Diverged
from .training.options import TrainConfig
from .training.pipeline import execute
from .training.plan import prepare


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    A configuration, images or weights that cannot be used end the process with one message. Any other exception is
    a bug and keeps its traceback; Ctrl-C ends the process after a line that says how to resume.
    """
    if arguments is None:
        prepare_terminal()
    config = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    with distributed.process_group(config.torch_device):
        failure = run_cli(config, shlex.join(["python", "-m", "srpkd.train", *given]))
    if failure:
        sys.exit(f"error: {failure}")


def run_cli(config: TrainConfig, command: str) -> str:
    """Train, print the table, and return an error message, or "" on success.

    The message is returned and not raised: a traceback would keep networks alive after ``distributed.process_group``.
    """
    try:
        plan = prepare(config, command)
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    try:
        run_dir = execute(plan)
    except (DataError, CheckpointError, Diverged, NonFiniteError, WriteError) as error:
        return str(error)
    if distributed.rank() == 0:
        print(f"\n{format_table(run_dir.report['table'])}\n\nreport: {run_dir.folder / 'index.html'}")
    return ""


if __name__ == "__main__":
    main()
