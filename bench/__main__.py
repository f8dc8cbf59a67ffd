"""The command line of the benchmarks: one sub-command per module."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "relation": "time and memory of the relation loss, by every backend and by what one would use instead",
    "train": "seconds per training step, and what the relation loss costs of them",
    "accuracy": "error of every backend against float64 as the student converges to its teacher",
    "scaling": "how recorded times and memory grow with pixels and with images",
    "plot": "pictures of recorded times and memory",
    "table": "the README's table of recorded results",
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name}", __package__)
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
