"""Run a generator on every image of a folder: ``python -m srpkd.translate student.pth photos paintings``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .arguments import add_device, add_train_mode_norm, exit_on_error, parse, positive
from .models.checkpoints import load_generator
from .models.inference import translate_folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd translate",
        description="Run a generator on every image of a folder and its sub-folders. Images may have any size; names "
        "and formats are kept, and so are 16-bit depth, alpha channels and ICC profiles where the format allows it. "
        "Files that cannot be read, or are too large for the memory, are reported and skipped (exit status 1).",
        epilog="example: srpkd translate runs/h2z/latest_net_G_A.pth photos/ zebras/ --batch_size 4",
    )
    add = result.add_argument
    add("weights", help="the generator: .pth or .safetensors; its architecture is inferred from the file")
    add("in_folder", help="folder of the images")
    add("out_folder", help="folder for the results")
    add("--batch_size", type=positive, default=1, help="images per batch, at most (default: %(default)s)")
    add("--size", type=positive, help="scale images to SIZE x SIZE first (default: keep their sizes)")
    add("--all_frames", action="store_true", help="translate all pages or frames of a file (default: only the first)")
    existing = result.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace files that exist")
    existing.add_argument(
        "--skip_existing", action="store_true", help="translate only images without a result, after an interruption"
    )
    add_device(result)
    add_train_mode_norm(result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 1 if images were skipped."""
    options = parse(parser(), arguments)
    with exit_on_error():
        net = load_generator(options.weights, train_mode_norm=options.train_mode_norm).to(options.device)
        written, skipped, notes, others = translate_folder(
            net,
            options.in_folder,
            options.out_folder,
            batch_size=options.batch_size,
            size=options.size,
            force=options.force,
            skip_existing=options.skip_existing,
            all_frames=options.all_frames,
        )
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    counts = [f"{len(written)} images written to {options.out_folder}"]
    counts += [f"{len(skipped)} skipped"] if skipped else []
    counts += [f"{others} left out"] if others else []
    print(", ".join(counts))
    sys.exit(1 if skipped else 0)


if __name__ == "__main__":
    main()
