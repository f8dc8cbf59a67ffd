"""Write the HTML page of a run: ``python -m srpkd.report RUN_DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import exit_on_error, parse
from .reporting.page import overview, write_report


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd report",
        description="Write index.html of a run again, from the files in its folder.",
        epilog="example: srpkd report runs/demo --overview demo.png",
    )
    result.add_argument("run_dir", help="folder of the run")
    result.add_argument("--overview", metavar="PNG", help="also write samples and relations into one picture")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a run, from the files in its folder, and print its path."""
    options = parse(parser(), arguments)
    with exit_on_error():
        print(write_report(options.run_dir))
        if options.overview:
            print(overview(options.run_dir, options.overview))


if __name__ == "__main__":
    main()
