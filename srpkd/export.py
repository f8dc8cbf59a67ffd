"""A generator for elsewhere: ``python -m srpkd.export student.pth`` writes ONNX, and int8 on request.

Needs ``pip install 'srpkd[export]'``: onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .arguments import check_number, number
from .data.folders import image_files, read_image
from .files import atomic_write
from .kernels.dispatch import check_choice
from .models.checkpoints import load_generator
from .models.exporters import FORMATS, TOLERANCE, cost_of, onnx_runner, parity, pt2_runner, quantize, to_onnx, to_pt2
from .models.inference import MODES, image_tensor, pad_images
from .models.networks import image_channels, size_multiple
from .translate import TRAIN_MODE_NORM

CALIBRATION_IMAGES = 64


def export(
    weights: str | Path,
    output: str | Path | None = None,
    *,
    kind: str = "onnx",
    tolerance: float = TOLERANCE,
    calibration: str | Path | None = None,
    train_mode_norm: bool = False,
    force: bool = False,
) -> list[str]:
    """Export a file of weights, check what comes out against PyTorch, and write it beside (or to `output`).

    Args:
        kind: "onnx" or "pt2".
        tolerance: the largest difference of outputs, which lie in [-1, 1], that passes.
        calibration: a folder of input images: an int8 model is written too, as <output>.int8.onnx.
        train_mode_norm: batch norms by each image's own statistics: those are then of every single image of a batch.
        force: replace files that exist.

    Returns:
        Lines that say what was written and how it compares.

    Raises:
        ValueError: the outputs differ by more than the tolerance (nothing is written), images that do not fit, or the
            output would replace the weights.
        FileExistsError: what would be written exists.
        IsADirectoryError: it is a folder.
        WriteError: it cannot be written.
        ImportError: the extra ``export`` is not installed.
    """
    check_choice("kind", kind, tuple(FORMATS))
    check_number("tolerance", tolerance, least=0)
    target = Path(output or Path(weights).with_suffix(FORMATS[kind])).expanduser()
    small = target.with_suffix(".int8.onnx")
    if calibration and kind != "onnx":
        raise ValueError("int8 is made of ONNX: leave --format at onnx")
    for path in (target, small) if calibration else (target,):
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder: --output takes the name of a file, such as {path / 'net.onnx'}"
            )
        if path.resolve() == Path(weights).expanduser().resolve():
            raise ValueError(f"{path} holds the weights: --output names another file")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists: --force replaces it, --output names another")
    net = load_generator(weights, train_mode_norm=train_mode_norm)
    multiple = size_multiple(net)
    if calibration:
        images = _calibration(Path(calibration), MODES.get(image_channels(net)[0]), multiple)
    make, runner = {"onnx": (to_onnx, onnx_runner), "pt2": (to_pt2, pt2_runner)}[kind]
    model = make(net)
    difference = parity(net, runner(model))
    if not difference <= tolerance:
        raise ValueError(f"the exported model differs from PyTorch by {difference:.2g}, more than {tolerance:g}")
    lines = [
        f"{target}: {len(model):,} bytes; any batch, height and width multiples of {multiple}; outputs differ from "
        f"PyTorch's by at most {difference:.2g} (allowed: {tolerance:g})"
    ]
    files = {target: model}
    if calibration:
        # with every second image the ranges are found, with the others it is judged
        files[small] = quantize(model, images[::2])
        cost = cost_of(model, files[small], images[1::2] or images)
        lines.append(
            f"{small}: {len(files[small]):,} bytes; PSNR to float32 {cost['mean']:.2f} dB on average, "
            f"{cost['least']:.2f} dB at worst, over {cost['images']} images"
            + ("" if len(images) > 1 else " (the one it was calibrated with)")
        )
    for path, content in files.items():
        with atomic_write(path) as file:
            file.write(content)
    return lines


def _calibration(folder: Path, mode: str | None, multiple: int) -> list[Tensor]:
    paths = image_files(folder.expanduser())
    if not paths or mode is None:
        raise ValueError(f"--calibration {folder}: expected a folder of images, of 1 or 3 channels as the generator's")
    count = min(CALIBRATION_IMAGES, len(paths))
    chosen = [paths[index * len(paths) // count] for index in range(count)]  # spread over the folder
    return [pad_images(image_tensor(read_image(path).convert(mode))[None], multiple) for path in chosen]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd export",
        description="Write a generator as ONNX (or as a PyTorch exported program), for any batch and size, and check "
        "its outputs against PyTorch's before the file is written.",
        epilog="example: srpkd export runs/h2z/latest_net_G_A.pth --int8 --calibration datasets/horse2zebra/testA",
    )
    add = result.add_argument
    add("weights", help="the generator: .pth or .safetensors; its architecture is read off the file")
    add("--format", choices=FORMATS, default="onnx", help="onnx, or pt2: torch.export (default: %(default)s)")
    add("--output", metavar="FILE", help="where to (default: beside the weights, under their name)")
    add("--tolerance", type=number, default=TOLERANCE, help="difference allowed, of outputs in [-1, 1] (default: 1e-3)")
    add("--int8", action="store_true", help="write an 8-bit model too, and what it costs in PSNR; needs --calibration")
    add("--calibration", metavar="FOLDER", help="input images for --int8; every second one judges it")
    add("--train_mode_norm", action="store_true", help=TRAIN_MODE_NORM)
    add("--force", action="store_true", help="replace files that exist")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        if options.int8 != bool(options.calibration):
            raise ValueError("--int8 and --calibration FOLDER, with input images, belong together")
        lines = export(
            options.weights,
            options.output,
            kind=options.format,
            tolerance=options.tolerance,
            calibration=options.calibration,
            train_mode_norm=options.train_mode_norm,
            force=options.force,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
