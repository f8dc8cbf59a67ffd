"""Generators as ONNX, int8 ONNX and exported programs, and how far these are from PyTorch."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as experimental
from tqdm import tqdm

from ..extras import require
from ..metrics.pixels import psnr
from .networks import image_channels, size_multiple

TOLERANCE = 1e-3  # of outputs in [-1, 1]: an eighth of a level of an 8-bit image
FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}


def to_onnx(net: nn.Module) -> bytes:
    """A generator as an ONNX model: "image" (batch, C, H, W) float32 in [-1, 1] -> "translated" (batch, C', H, W).

    Batch and size are free; H and W must be multiples of ``size_multiple(net)``. It is exported in eval mode.

    Raises:
        ImportError: the extra ``export`` is not installed.
    """
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


def quantize(model: bytes, images: Iterable[Tensor]) -> bytes:
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

    with tempfile.TemporaryDirectory() as folder, _silenced():
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


@contextmanager
def _silenced() -> Iterator[None]:
    """No chatter of the exporter and the quantiser about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
