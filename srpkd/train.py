"""Train a generator, or distil a small one from a large one: ``python -m srpkd.train``.

A run is a list of stages: the teacher, unless it is loaded from a file, then every student for every seed. The state
of the run is saved between stages and every `save_latest_freq` steps; ``--resume`` continues from it.
"""

from __future__ import annotations

import signal
import sys
import traceback
from contextlib import ExitStack
from functools import partial

from .arguments import check_usable, command_line, exit_on_error, first_line, memory_message
from .cli import prepare_terminal
from .data.images import DataError
from .devices import is_out_of_memory
from .finite import NonFiniteError
from .models.checkpoints import CheckpointError
from .reporting.table import format_table
from .training import distributed, stop_signals
from .training.config import parse_arguments
from .training.loop import Diverged
from .training.options import TrainConfig
from .training.pipeline import execute, how_to_resume
from .training.plan import prepare
from .training.stop_signals import Stopped


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    A configuration, images or weights that cannot be used, an error of the operating system, or too little memory, end
    the process with one message. Any other exception is a bug and keeps its traceback. Ctrl-C, SIGTERM and SIGHUP, on
    Windows Ctrl-C and Ctrl-Break, stop the training after its current step: the state is saved, and a line says how to
    resume. The exit status is then 130 for Ctrl-C, and 128 + the signal's number for the others.
    """
    if arguments is None:
        prepare_terminal()
    config = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    with ExitStack() as stack:
        with exit_on_error():
            check_usable(config.torch_device)
            stack.enter_context(distributed.process_group(config.torch_device))
        status = run_cli(config, command_line(["python", "-m", "srpkd.train", *given]))
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt  # Python ends the process by the signal, so that a shell script that called it ends too
    if status:
        sys.exit(status)


def run_cli(config: TrainConfig, command: str) -> str | int:
    """Train, print the table, and return the exit status: 0, an error message, or the number of a failure.

    Errors are not raised: a traceback would keep networks alive after ``distributed.process_group``. When one of
    several processes fails, the others lose their connection to it; only the first returns a message.
    """
    try:
        failure = _train(config, command)
    except Stopped as stopped:
        return 128 + stopped.number
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        is_lost = distributed.is_lost_connection(error)
        failure = _lost_connection(error) if is_lost else traceback.format_exc().rstrip()
    if failure and not distributed.is_first_failure(failure):
        return 1
    return failure or 0


def _train(config: TrainConfig, command: str) -> str:
    """Train, print the table, and return an error message, or "" on success."""
    try:
        with stop_signals.ending_at_once():
            plan = prepare(config, command)
    except (ValueError, OSError, ImportError) as error:
        return f"error: {error}"
    last_words = partial(how_to_resume, plan.run_dir.folder) if distributed.rank() == 0 else None
    try:
        with stop_signals.handled(last_words):
            run_dir = execute(plan)
    except (DataError, CheckpointError, Diverged, NonFiniteError, OSError) as error:
        return f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            advice = "start a new run with a smaller --batch_size or --crop_size, or free memory and resume this one"
            return memory_message(error, advice)
        if distributed.rank() == 0 or not distributed.is_lost_connection(error):
            raise
        # rank 0, which says how to resume, may be the one that was killed
        return f"{_lost_connection(error)}\n{how_to_resume(plan.run_dir.folder)}".rstrip()
    if distributed.rank() == 0:
        print(f"\n{format_table(run_dir.report['table'])}\n\nreport: {run_dir.folder / 'index.html'}")
    return ""


def _lost_connection(error: Exception) -> str:
    return (
        "error: another process of this run was killed or crashed without a message, for example because memory ran "
        f"out; the system's log (dmesg) may name the reason ({first_line(error).partition('. ')[0]})"
    )


if __name__ == "__main__":
    main()
