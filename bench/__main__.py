"""Benchmarks of srpkd, the study, and the tables of the README."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from srpkd.arguments import parse
from srpkd.cli import prepare_terminal

COMMANDS = {  # each is a module of this package with add_arguments(parser) and run(arguments)
    "relation": "time and memory of the relation loss: srpkd's backends and their alternatives in PyTorch",
    "train": "time per training step, and the share of the relation loss",
    "breakdown": "time of every kernel in a call on a GPU, and of the host",
    "profile": "what the warps of every kernel in a call wait for, by source line: by Nsight Compute",
    "ablation": "times of the wgmma tiles without one of their parts, on an H100",
    "accuracy": "errors of the backends against float64 as the student converges to its teacher",
    "columns": "spread and speed of estimates from sampled columns",
    "recipes": "time and memory of the recipes in docs/recipes: public code of other methods against srpkd",
    "scaling": "growth of the recorded times and memory with the pixels and the batch size",
    "plot": "plots of the recorded times and memory",
    "record": "take results into bench/results, and update the table from which auto chooses on GPUs",
    "table": "tables of the recorded results, for the README",
    "readme": "table and picture of a demo run, for the README",
    "study": "whether the relation loss improves students, on generated images",
    "photographs": "whether it improves students on photographs, with the weights that the study selected",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one command."""
    if arguments is None:
        prepare_terminal()
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if name not in words:  # not imported: some commands need packages that others do not
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f".{name}", __package__)
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command_line=shlex.join(["python", "-m", "bench", *words]))
    parsed = parse(parser, words)
    try:
        parsed.run(parsed)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
