"""Export of generators as ONNX, 8-bit ONNX and PyTorch exported programs, checked against PyTorch."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as experimental

from ..arguments import check_choice, check_number, check_whole
from ..data.images import DataError, open_image, read_image
from ..data.listing import image_files
from ..data.picture import PILLOW_MODES, image_to_tensor, with_channels
from ..extras import require
from ..files import expand_user, write_file, writing
from ..finite import check_finite
from ..metrics.pixels import psnr
from ..progress import ProgressBar
from .checkpoints import SUFFIXES as WEIGHT_SUFFIXES
from .checkpoints import load_generator
from .inference import MIN_SIZE, check_output, pad_images
from .networks import image_channels, size_multiple

TOLERANCE = 1e-3  # of outputs in [-1, 1]: an eighth of a level of an 8-bit image
ExportFormat = Literal["onnx", "pt2"]
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
CALIBRATION_IMAGES = 64
EXPORT_ADVICE = "nothing was written; PyTorch's output is finite, so try another --opset or --format"

Runner = Callable[[np.ndarray], np.ndarray]  # images (B, C, H, W) -> outputs (B, C', H, W), both float32


@dataclass(frozen=True)
class QuantizedPsnr:
    """PSNR in dB of the outputs of an 8-bit model to those of the float32 model.

    mean, minimum: over the images
    images: how many there were
    held_out: whether the images were not used for the calibration
    """

    mean: float
    minimum: float
    images: int
    held_out: bool


@dataclass(frozen=True)
class ExportedFile:
    """A file that `export_generator` wrote.

    path, size: the file and its size in bytes
    size_multiple: height and width of the images must be multiples of it
    smallest_size: smallest height and width of the images
    difference: largest absolute difference of its outputs from PyTorch's; None for an 8-bit model
    quantization: the PSNR of an 8-bit model; else None
    """

    path: Path
    size: int
    size_multiple: int
    smallest_size: int
    difference: float | None = None
    quantization: QuantizedPsnr | None = None


def export_generator(
    weights: str | Path,
    output: str | Path | None = None,
    *,
    format: ExportFormat = "onnx",
    tolerance: float = TOLERANCE,
    calibration: str | Path | None = None,
    train_mode_norm: bool = False,
    force: bool = False,
    opset: int | None = None,
) -> list[ExportedFile]:
    """Export the generator in a file of weights, and check the result against PyTorch before it is written.

    Args:
        weights: a file that ``load_generator`` reads.
        output: the file to write; by default the weights' name with another suffix.
        format: "onnx" or "pt2" (``torch.export``).
        tolerance: largest allowed difference of the outputs, which are in [-1, 1].
        calibration: folder of input images; an 8-bit model is written too, as `<output>.int8.onnx`. At most
            CALIBRATION_IMAGES of them are used: every second one calibrates it, and the others measure its error.
        train_mode_norm: batch norms normalise each image by its own statistics (`normalize_per_image`).
        force: replace files that exist.
        opset: version of the ONNX operators, see ``to_onnx``.

    Returns:
        The files: the model, then the 8-bit model if there is one.

    Raises:
        ValueError: the outputs differ by more than the tolerance (nothing is written), the calibration images do not
            fit the generator, or the output would replace the weights or has the suffix of another format.
        CheckpointError: the weights cannot be used.
        DataError: a calibration image cannot be read.
        NonFiniteError: an output of the generator or of an exported model is NaN or infinite (nothing is written).
        FileExistsError: a file exists already.
        IsADirectoryError: the output is a folder.
        WriteError: a file cannot be written.
        ImportError: the extra ``export`` is not installed.
    """
    check_choice("format", format, tuple(SUFFIXES))
    check_number("tolerance", tolerance, least=0)
    if calibration and format != "onnx":
        raise ValueError(f"format={format!r} with calibration images: 8-bit models are ONNX, use --format onnx")
    if opset is not None and format != "onnx":
        raise ValueError(f"format={format!r} with opset={opset}: only ONNX has operator sets, use --format onnx")
    target = expand_user(output or Path(weights).with_suffix(SUFFIXES[format]))
    int8_target = target.with_name(target.name.removesuffix(".onnx") + ".int8.onnx")  # keeps the 5 of model-1.5
    for path in (target, int8_target) if calibration else (target,):
        _check_target(path, weights, force)
    if target.suffix in {*SUFFIXES.values(), *WEIGHT_SUFFIXES} - {SUFFIXES[format]}:
        others = [other for other, suffix in SUFFIXES.items() if suffix == target.suffix]
        change = f"use --format {others[0]}, or " if others else ""
        raise ValueError(f"{target} with format={format!r}: {change}give a name that ends in {SUFFIXES[format]}")
    net = load_generator(weights, train_mode_norm=train_mode_norm)
    images = _calibration_images(Path(calibration), net) if calibration else None
    model = to_onnx(net, opset) if format == "onnx" else to_pt2(net)
    difference = max_difference(net, {"onnx": onnx_runner, "pt2": pt2_runner}[format](model))
    if not difference <= tolerance:
        raise ValueError(
            f"the outputs of the exported model differ from PyTorch's by {difference:.2g}, more than the tolerance "
            f"{tolerance:g}: nothing was written; a larger --tolerance accepts the model"
        )
    multiple, smallest = size_multiple(net), smallest_size(net)
    contents = {target: model}
    exported = [ExportedFile(target, len(model), multiple, smallest, difference)]
    if images:
        contents[int8_target] = quantized = quantize(model, replace(images, paths=images.paths[::2]))
        held_out = replace(images, paths=images.paths[1::2] or images.paths)
        scores = quantization_psnr(model, quantized, held_out)
        psnr_to_float = QuantizedPsnr(sum(scores) / len(scores), min(scores), len(scores), held_out=len(images) > 1)
        exported.append(ExportedFile(int8_target, len(quantized), multiple, smallest, quantization=psnr_to_float))
    for path, content in contents.items():
        write_file(path, content)
    return exported


def smallest_size(net: nn.Module) -> int:
    """Return the smallest height and width that an exported generator takes: ResNet 8, U-Net ``size_multiple(net)``."""
    return max(MIN_SIZE, size_multiple(net))


def _check_target(path: Path, weights: str | Path, force: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: --output takes the name of a file, such as {path / 'net.onnx'}")
    if path.resolve() == expand_user(weights).resolve():
        raise ValueError(f"{path} is the file of the weights: give another --output")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: use --force to replace it, or give another --output")


@dataclass(frozen=True)
class _CalibrationImages:
    """Image files as (1, C, H, W) in [-1, 1], for a generator. Each is read when it is its turn: photos are large."""

    paths: list[str]
    channels: int
    multiple: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        for path in self.paths:
            picture = with_channels(read_image(path), self.channels)
            yield pad_images(image_to_tensor(picture)[None], self.multiple)


def _calibration_images(folder: Path, net: nn.Module) -> _CalibrationImages:
    """Return at most `CALIBRATION_IMAGES` of the folder's images, evenly spaced.

    Raises:
        DataError: lists all of them that cannot be read.
        ValueError: there are no images, or not for this generator.
    """
    paths = image_files(expand_user(folder))
    channels = image_channels(net)[0]
    if not paths or channels not in PILLOW_MODES:
        raise ValueError(
            f"--calibration {folder}: expected a folder of images, and a generator whose input has 1 or 3 channels; "
            f"found {len(paths)} images and {channels} channels"
        )
    count = min(CALIBRATION_IMAGES, len(paths))
    paths = [paths[index * len(paths) // count] for index in range(count)]
    unreadable = []
    for path in paths:
        try:
            with open_image(path) as image:
                image.check(decode=True)
        except DataError as error:
            unreadable.append(str(error))
    if unreadable:
        heading = f"--calibration {folder}: {len(unreadable)} of {count} images cannot be read: fix or remove them"
        raise DataError(heading, unreadable)
    return _CalibrationImages(paths, channels, size_multiple(net))


def to_onnx(net: nn.Module, opset: int | None = None) -> bytes:
    """Export a generator as an ONNX model: "image" (B, C, H, W) float32 in [-1, 1] -> "translated" (B, C', H, W).

    Batch size, height and width are dynamic; H and W must be multiples of ``size_multiple(net)`` and at least
    ``smallest_size(net)``. The model computes what the network does in eval mode.

    Args:
        net: the generator.
        opset: version of the ONNX operators; by default that of torch's exporter.

    Raises:
        ImportError: the extra ``export`` is not installed.
        ValueError: the exporter cannot write this opset.
    """
    if opset is not None:
        check_whole("opset", opset, least=1)
    for package in ("onnx", "onnxscript"):
        require(package, "export", "exporting to ONNX")
    net, example, shapes = _example(net)
    with _silenced():
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["image"],
            output_names=["translated"],
            external_data=False,
            verbose=False,
            opset_version=opset,
        )
    assert program is not None  # with dynamo=True
    model = program.model_proto
    # where it cannot convert a model, the exporter silently keeps the opset that it started from
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset not in (None, written):
        raise ValueError(
            f"opset={opset}: torch {torch.__version__} writes this generator with opset {written} "
            "instead: use this one, or a later one that it can write"
        )
    return model.SerializeToString()


def to_pt2(net: nn.Module) -> bytes:
    """Export a generator as a program that ``torch.export.load`` loads without srpkd; shapes as in `to_onnx`."""
    net, example, shapes = _example(net)
    buffer = io.BytesIO()
    # otherwise a U-Net's program rejects images of its nominal size, whose innermost map is a single pixel;
    # torch installs `patch` on its config modules at import time, which type checkers do not see
    with experimental.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(net, (example,), dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _example(net: nn.Module) -> tuple[nn.Module, Tensor, tuple[dict[int, Any]]]:
    """Return a copy of the network to export, an example input, and the input's dynamic shapes."""
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    multiple = size_multiple(net)
    # torch.export specialises on a batch of one, and takes equal sides for one dynamic size
    example = torch.zeros(2, image_channels(net)[0], 4 * multiple, 6 * multiple)
    return net, example, ({0: Dim("batch"), 2: multiple * Dim("rows"), 3: multiple * Dim("columns")},)


def onnx_runner(model: bytes) -> Runner:
    """Return a function that runs an ONNX model of `to_onnx` on the CPU, with onnxruntime.

    Raises:
        ImportError: the extra ``export`` is not installed.
    """
    runtime = require("onnxruntime", "export", "running ONNX")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def pt2_runner(model: bytes) -> Runner:
    """Return a function that runs an exported program of `to_pt2`."""
    module = torch.export.load(io.BytesIO(model)).module()
    return lambda images: module(torch.from_numpy(images)).numpy(force=True)


@torch.no_grad()
def max_difference(net: nn.Module, run: Runner) -> float:
    """Return the largest absolute difference between the outputs of a network and of its exported model.

    Several batch sizes and image sizes are compared, from the smallest size on; infinity if the output's shape differs.

    Raises:
        NonFiniteError: an output is NaN or infinite.
    """
    net = copy.deepcopy(net).cpu().float().eval()
    side = smallest_size(net)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, height, width in [(1, side, side), (3, 2 * side, side), (1, side, 3 * side)]:
        images = torch.rand(batch, image_channels(net)[0], height, width, generator=generator) * 2 - 1
        output = net(images)
        check_output(output, "random images")
        expected = output.numpy()
        found = run(images.numpy())
        check_finite(torch.from_numpy(found), "the exported model's output for random images", EXPORT_ADVICE)
        if found.shape != expected.shape:
            return float("inf")
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def quantize(model: bytes, images: Iterable[Tensor]) -> bytes:
    """Quantize the convolutions of an ONNX model to 8-bit integers, by onnxruntime's static quantization.

    Args:
        model: the result of `to_onnx`.
        images: (1, C, H, W) in [-1, 1], which calibrate the ranges of the activations.

    Raises:
        ImportError: the extra ``export`` is not installed.
        WriteError: the disk of the temporary files is full.
    """
    library = require("onnxruntime.quantization", "export", "int8")

    base: Any = library.CalibrationDataReader

    class Reader(base):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image.numpy()}

    with tempfile.TemporaryDirectory() as folder, writing(folder), _silenced():
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


def quantization_psnr(model: bytes, quantized: bytes, images: Iterable[Tensor]) -> list[float]:
    """Return the PSNR (dB) of an 8-bit model's output to the float32 model's, for each image (1, C, H, W).

    Raises:
        NonFiniteError: an output is NaN or infinite.
    """
    exact, rounded = onnx_runner(model), onnx_runner(quantized)
    scores = []
    for image in ProgressBar(images, unit="image", desc="comparing"):
        expected, found = (torch.from_numpy(run(image.numpy())) for run in (exact, rounded))
        check_output(expected, "a calibration image")
        check_finite(found, "the 8-bit model's output for a calibration image", "use other --calibration images")
        scores.append(psnr(found, expected))
    return scores


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence the log messages and warnings of the exporter and the quantizer."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
