"""Export a generator: ``python -m srpkd.export student.pth`` writes ONNX, and an 8-bit model on request.

Needs ``pip install "srpkd[export]"``: onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import add_train_mode_norm, exit_on_error, number, parse, positive
from .data.listing import list_images
from .files import expand_user
from .models.exporters import SUFFIXES, TOLERANCE, ExportedFile, export_generator


def describe(file: ExportedFile, tolerance: float) -> str:
    """Return a line that says what was written and how it compares with PyTorch."""
    if (psnr := file.quantization) is None:
        comparison = (
            f"any batch, height and width multiples of {file.size_multiple} from {file.smallest_size}; outputs differ "
            f"from PyTorch's by at most {file.difference:.2g} (allowed: {tolerance:g})"
        )
    else:
        comparison = (
            f"PSNR to float32 {psnr.mean:.2f} dB on average, {psnr.minimum:.2f} dB at worst, over {psnr.images} "
            f"images{'' if psnr.held_out else ' (the one that calibrated it)'}"
        )
    return f"{file.path}: {file.size:,} bytes; {comparison}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd export",
        description="Convert a generator to ONNX (or to a PyTorch exported program) for any batch size, height and "
        "width (in multiples of 4; of its size for a U-Net), and compare its outputs with PyTorch's before the file is "
        "written.",
        epilog="example: srpkd export runs/h2z/latest_net_G_A.pth --int8 --calibration datasets/horse2zebra/testA",
    )
    add = result.add_argument
    add("weights", help="the generator: .pth or .safetensors; its architecture is inferred from the file")
    add("--format", choices=tuple(SUFFIXES), default="onnx", help="onnx, or pt2: torch.export (default: %(default)s)")
    add("--opset", type=positive, help="version of the ONNX operators (default: that of torch's exporter)")
    add("--output", metavar="FILE", help="file to write (default: next to the weights, under their name)")
    add("--tolerance", type=number, default=TOLERANCE, help="allowed difference of outputs in [-1, 1] (default: 1e-3)")
    add("--int8", action="store_true", help="also write an 8-bit model and print its PSNR; needs --calibration")
    add(
        "--calibration",
        metavar="FOLDER",
        help="input images for --int8, of which 64 are used; every second one measures its error",
    )
    add("--force", action="store_true", help="replace files that exist")
    add_train_mode_norm(result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(parser(), arguments)
    with exit_on_error():
        if options.int8 != bool(options.calibration):
            raise ValueError("--int8 and --calibration FOLDER, a folder of input images, must be given together")
        exported = export_generator(
            options.weights,
            options.output,
            format=options.format,
            tolerance=options.tolerance,
            calibration=options.calibration,
            train_mode_norm=options.train_mode_norm,
            force=options.force,
            opset=options.opset,
        )
    for file in exported:
        print(describe(file, options.tolerance))
    if options.calibration and (others := list_images(expand_user(options.calibration)).others):
        print(f"{options.calibration}: {others} left out")


if __name__ == "__main__":
    main()
