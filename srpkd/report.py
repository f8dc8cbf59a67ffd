"""Write the page of a run again: ``python -m srpkd.report RUN_DIR``."""

import argparse
from collections.abc import Sequence

from .reporting.page import overview, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m srpkd.report RUN_DIR`: write the page again and print its path."""
    parser = argparse.ArgumentParser(prog="python -m srpkd.report", description="Write a run's index.html again.")
    parser.add_argument("run_dir", help="the run's folder, such as runs/demo")
    parser.add_argument("--overview", metavar="PNG", help="also paint samples and relations into one picture")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_dir))
        if options.overview:
            print(overview(options.run_dir, options.overview))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
