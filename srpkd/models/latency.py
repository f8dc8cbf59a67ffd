"""Parameters, MACs, file size and latency of generators."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_number, check_type, check_whole, first_line
from ..devices import device_name, synchronize
from ..files import expand_user
from ..finite import NonFiniteError
from ..progress import ProgressBar
from .checkpoints import load_generator
from .complexity import count_macs, count_parameters
from .exporters import onnx_runner, to_onnx
from .inference import MIN_SIZE, check_output
from .networks import image_channels, size_multiple

Mode = Literal["eager", "compiled", "onnx"]
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 3  # calls that are not timed; the first one compiles
MIN_CALLS = 3


def profile_generators(
    weights: Sequence[str],
    *,
    size: int = 256,
    batch_size: int = 1,
    device: str = "cpu",
    modes: Sequence[Mode] = MODES,
    repeats: int = 30,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Profile the generators in files of weights, on images of size x size pixels.

    Args:
        weights: files that ``load_generator`` reads.
        size, batch_size: of the timed batches.
        device, modes, repeats, seconds: see `profile_network`.

    Returns:
        {"size", "batch_size", "device", "threads", "torch", "networks"}, where "networks" has the result of
        `profile_network` for each file, with its path as "weights" and its size as "bytes".

    Raises:
        ValueError: the size is too small or not a multiple of what a generator needs.
        CheckpointError: a file does not hold a generator.
        NonFiniteError: an output of a generator has a NaN or an infinite value; the message names the file.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size={size}: expected at least {MIN_SIZE} pixels per side")
    nets = {path: load_generator(path) for path in weights}
    for path, net in nets.items():
        if size % (multiple := size_multiple(net)):
            raise ValueError(f"size={size}: {path} needs a multiple of {multiple}")
    networks = []
    bar = ProgressBar(nets.items(), unit="network", desc="profiling")
    for path, net in bar:
        shape = (batch_size, image_channels(net)[0], size, size)
        try:
            costs = profile_network(
                net, shape, device=device, modes=modes, repeats=repeats, seconds=seconds, on_timing=bar.set_postfix_str
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}: {error}") from error
        networks.append({"weights": path, "bytes": os.path.getsize(expand_user(path)), **costs})
    return {
        "size": size,
        "batch_size": batch_size,
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "networks": networks,
    }


def profile_network(
    net: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    device: str = "cpu",
    modes: Sequence[Mode] = MODES,
    repeats: int = 30,
    seconds: float = 10.0,
    on_timing: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Count and time one generator.

    Args:
        net: any network that takes images; "onnx" needs one of ``define_generator``.
        input_shape: (B, C, H, W) of the timed batches. MACs are counted for one image.
        device: where it runs; ONNX always runs on the CPU, with onnxruntime.
        modes: of "eager", "compiled" (torch.compile) and "onnx".
        repeats: number of timed calls, at most.
        seconds: time limit for the timed calls of one mode and dtype; at least three calls are made.
        on_timing: called with each mode and dtype, such as ``"compiled bf16"``, before it is compiled and timed.

    Returns:
        "parameters"; "macs" (transposed convolutions counted per output pixel, as in published numbers);
        "macs_input_grid" (per input pixel, as executed); and "latency", a list of {"mode", "dtype", "device", "p50_ms",
        "p95_ms", "images_per_second", "calls"}, or {"mode", "dtype", "device", "unavailable_reason"} where a mode
        cannot run.

    Raises:
        TypeError, ValueError: an invalid argument.
        NonFiniteError: an output has a NaN or an infinite value.
    """
    check_type("net", net, nn.Module, "a torch.nn.Module")
    if len(input_shape) != 4:
        raise ValueError(f"input_shape={tuple(input_shape)}: expected (B, C, H, W)")
    for name, length in zip("BCHW", input_shape):
        check_whole(f"input_shape's {name}", length, least=1)
    for mode in modes:
        check_choice("mode", mode, MODES)
    check_whole("repeats", repeats, least=1)
    check_number("seconds", seconds, least=0)
    one_image = (1, *input_shape[1:])
    try:
        macs, macs_input_grid = count_macs(net, one_image), count_macs(net, one_image, transposed="input")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"input_shape={tuple(input_shape)}: the network does not take such images ({error})"
        ) from error
    images = torch.rand(input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latency = []
    for mode in modes:
        for dtype in DTYPES:
            if on_timing is not None:
                on_timing(f"{mode} {dtype}")
            entry: dict[str, Any] = {"mode": mode, "dtype": dtype, "device": "cpu" if mode == "onnx" else device}
            try:
                with torch.no_grad():
                    call = _forward_call(net, images, mode, dtype, torch.device(device))
                    output = call()
                    if isinstance(output, Tensor):  # other networks may return anything
                        check_output(output, f"random images ({mode} {dtype})")
                    entry |= measure_latency(call, len(images), repeats, seconds)
            except NonFiniteError:
                raise
            except Exception as error:  # a missing compiler or runtime may raise any exception
                entry["unavailable_reason"] = first_line(error)
            latency.append(entry)
    return {
        "parameters": count_parameters(net),
        "latency": latency,
        "macs": macs,
        "macs_input_grid": macs_input_grid,
    }


def _forward_call(net: nn.Module, images: Tensor, mode: Mode, dtype: str, device: torch.device) -> Callable[[], Any]:
    """Return a function that runs one forward pass, waits for its end and returns the output."""
    if mode == "onnx":
        if dtype != "fp32":
            raise NotImplementedError("onnxruntime has no bf16 convolutions on the CPU")
        run, array = onnx_runner(to_onnx(net)), images.numpy()
        return lambda: torch.from_numpy(run(array))
    net = copy.deepcopy(net).to(device, DTYPES[dtype]).eval()
    images = images.to(device, DTYPES[dtype])
    forward: Callable[[Tensor], Any] = torch.compile(net) if mode == "compiled" else net

    def call() -> Any:
        output = forward(images)
        synchronize(device)
        return output

    return call


def measure_latency(
    call: Callable[[], Any], images: int, repeats: int, seconds: float, warm_up: int = WARM_UP
) -> dict[str, float]:
    """Time a call after a warm-up: its median and 95th percentile in ms, and images per second.

    Args:
        call: processes `images` images and returns when it is done.
        images: per call.
        repeats: number of calls, at most.
        seconds: time limit; at least `MIN_CALLS` calls are made.
        warm_up: number of calls before, which are not timed.
    """
    for _ in range(warm_up):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < MIN_CALLS or (len(times) < repeats and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p50, p95 = np.quantile(times, [0.5, 0.95]).tolist()
    return {
        "p50_ms": 1000 * p50,
        "p95_ms": 1000 * p95,
        "images_per_second": images * len(times) / sum(times),
        "calls": len(times),
    }
