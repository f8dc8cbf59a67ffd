"""Compare generators on images in the browser: ``python -m srpkd.compare runs/demo``."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_device, add_train_mode_norm, exit_on_error, parse, positive
from .kernels.formulas import DEFAULT_NORMALIZE, NORMALIZATIONS
from .reporting.comparison import Comparison, layers_of, networks_of, samples_of
from .reporting.comparison_server import ComparisonServer


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd compare",
        description="Open a page on this computer (127.0.0.1) where you drop an image and see the outputs of teacher "
        "and students side by side, with their milliseconds and sizes. A click on a pixel shows its relations to all "
        "other pixels in each network. Ctrl-C ends the server.",
        epilog="examples: srpkd compare runs/demo;  srpkd compare teacher_net_G.pth runs/h2z/latest_net_G_A.pth",
    )
    add = result.add_argument
    add("paths", nargs="+", metavar="RUN_OR_WEIGHTS", help="folder of a run, or a generator (.pth or .safetensors)")
    add("--direction", choices="AB", default="A", help="generator of a CycleGAN run: A (A to B) or B (default: A)")
    add(
        "--size",
        type=positive,
        default=512,
        help="larger images are scaled down to this many pixels at their longer side (default: %(default)s)",
    )
    add(
        "--normalize",
        choices=NORMALIZATIONS,
        help=f"relation matrix of the maps (default: that of the run, else {DEFAULT_NORMALIZE})",
    )
    add("--port", type=int, default=0, help="of 127.0.0.1 (default: any free port)")
    add("--no_browser", action="store_true", help="only print the address")
    add_device(result)
    add_train_mode_norm(result, " (default: as in the run)")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until Ctrl-C."""
    options = parse(parser(), arguments)
    with exit_on_error():
        if not 0 <= options.port <= 65535:
            raise ValueError(f"--port {options.port}: expected 0 to 65535")
        weights, config, notes = networks_of(options.paths, options.direction)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        normalize = options.normalize or config.get("normalize")
        comparison = Comparison(
            weights,
            device=options.device,
            size=options.size,
            normalize=normalize if normalize in NORMALIZATIONS else DEFAULT_NORMALIZE,
            layers=layers_of(config, weights),
            train_mode_norm=options.train_mode_norm or config.get("train_mode_norm") is True,
        )
        server = ComparisonServer(comparison, options.port, samples_of(map(Path, options.paths), options.direction))
    with server:
        print(f"{', '.join(weights)}: {server.url} (Ctrl-C ends the server)", flush=True)
        if not options.no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
