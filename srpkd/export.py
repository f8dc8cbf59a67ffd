"""A generator for elsewhere: ``python -m srpkd.export student.pth`` writes ONNX, and int8 on request.

Needs ``pip install 'srpkd[export]'``: onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as experimental
from tqdm import tqdm

from .arguments import check_number, number
from .checkpoint import atomic_write, load_generator
from .data.folders import image_files, read_image
from .extras import require
from .kernels.dispatch import check_choice
from .metrics import psnr
from .networks import image_channels, size_multiple
from .translate import MODES, TRAIN_MODE_NORM, image_tensor, pad_images

TOLERANCE = 1e-3  # of outputs in [-1, 1]: an eighth of a level of an 8-bit image
FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
CALIBRATION_IMAGES = 64


def to_onnx(net: nn.Module) -> bytes:
    """A generator as an ONNX model: "image" (batch, C, H, W) float32 in [-1, 1] -> "translated" (batch, C', H, W).

    Batch and size are free; H and W must be multiples of ``size_multiple(net)``. It is exported in eval mode.

    Raises:
        ImportError: the extra ``export`` is not installed.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "export", "exporting to ONNX")
    net, example, shapes = _example(net)
    with _quiet():
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["image"],
            output_names=["translated"],
            external_data=False,
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def to_pt2(net: nn.Module) -> bytes:
    """A generator as an exported program, for ``torch.export.load`` without this package; sizes as in `to_onnx`."""
    net, example, shapes = _example(net)
    buffer = io.BytesIO()
    # or a U-Net's program would refuse images of the net's own size, whose innermost map is a single pixel
    with experimental.patch(backed_size_oblivious=True):
        program = torch.export.export(net, (example,), dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _example(net: nn.Module) -> tuple[nn.Module, Tensor, tuple[dict[int, Any]]]:
    """(copy to export, input, which of its sizes are free)."""
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    multiple = size_multiple(net)
    # a batch of one would be taken for a constant, and so would equal sides for one size
    example = torch.zeros(2, image_channels(net)[0], 4 * multiple, 6 * multiple)
    return net, example, ({0: Dim("batch"), 2: multiple * Dim("rows"), 3: multiple * Dim("columns")},)


def onnx_runner(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """What runs an ONNX model on the CPU by onnxruntime: image array (B, C, H, W) -> output array.

    Raises:
        ImportError: the extra ``export`` is not installed.
    """
    runtime = require("onnxruntime", "export", "running ONNX")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def pt2_runner(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """What runs an exported program: image array (B, C, H, W) -> output array."""
    module = torch.export.load(io.BytesIO(model)).module()
    return lambda images: module(torch.from_numpy(images)).numpy(force=True)


@torch.no_grad()
def parity(net: nn.Module, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest difference between a network's outputs and those of what was exported, over batches and sizes."""
    net = copy.deepcopy(net).cpu().float().eval()
    side = max(size_multiple(net), 8)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, height, width in [(1, side, side), (3, 2 * side, side), (1, side, 3 * side)]:
        images = torch.rand(batch, image_channels(net)[0], height, width, generator=generator) * 2 - 1
        found = run(images.numpy())
        expected = net(images).numpy()
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def quantise(model: bytes, images: Iterable[Tensor]) -> bytes:
    """An ONNX model with convolutions of 8-bit integers, by onnxruntime's static quantisation.

    Args:
        model: as `to_onnx` gives it.
        images: (1, C, H, W) in [-1, 1], from which the ranges of the activations are taken.

    Raises:
        ImportError: the extra ``export`` is not installed.
    """
    library = require("onnxruntime.quantization", "export", "int8")

    class Reader(library.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.feeds, None)
            return None if image is None else {"image": image.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        before.write_bytes(model)
        library.quantize_static(
            before,
            after,
            Reader(),
            quant_format=library.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "ConvTranspose"],
            per_channel=True,
            activation_type=library.QuantType.QInt8,
            weight_type=library.QuantType.QInt8,
        )
        return after.read_bytes()


def cost_of(model: bytes, quantised: bytes, images: Iterable[Tensor]) -> dict[str, float]:
    """What int8 costs: mean and least PSNR (dB) of its outputs to the float32 model's, over images (1, C, H, W)."""
    exact, rough = onnx_runner(model), onnx_runner(quantised)
    scores = [
        psnr(torch.from_numpy(rough(image.numpy())), torch.from_numpy(exact(image.numpy())))
        for image in tqdm(images, unit="image", desc="comparing")
    ]
    return {"mean": sum(scores) / len(scores), "least": min(scores), "images": len(scores)}


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
        files[small] = quantise(model, images[::2])
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


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of the exporter and the quantiser about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


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
