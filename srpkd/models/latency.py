"""Parameters, MACs and latency of one network."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_number, check_type, check_whole
from ..kernels.dispatch import check_choice
from .complexity import count_macs, count_parameters
from .exporters import onnx_runner, to_onnx

MODES = ("eager", "compiled", "onnx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 3  # calls that are not timed; the first of them compiles


def profile_network(
    net: nn.Module,
    input_shape: tuple[int, int, int, int],
    *,
    device: str = "cpu",
    modes: Sequence[str] = MODES,
    repeats: int = 30,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Count and time one generator.

    Args:
        net: any network that takes images; "onnx" takes those of ``define_generator`` alone.
        input_shape: (B, C, H, W) of what is timed. MACs are counted for one image of it.
        device: where it runs; ONNX runs on the CPU, by onnxruntime.
        modes: of "eager", "compiled" (torch.compile) and "onnx".
        repeats: timed calls, at most ...
        seconds: ... as many as fit into so many seconds, three at least.

    Returns:
        "parameters", "macs" (transposed convolutions counted on their output grid, as published), "macs_input_grid" (on
        their input grid, as computed), and "latency": a list of {"mode", "dtype", "device",
        "p50_ms", "p95_ms", "images_per_second", "calls"}, or with "why_not" in place of numbers where it cannot run.

    Raises:
        TypeError, ValueError: an argument that is none of the above; of an unknown mode the nearest is named.
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
    one = (1, *input_shape[1:])
    result: dict[str, Any] = {
        "parameters": count_parameters(net),
        "latency": [],
    }
    try:
        result["macs"], result["macs_input_grid"] = (count_macs(net, one, grid) for grid in ("output", "input"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"input_shape={tuple(input_shape)}: the network does not take such images ({error})"
        ) from error
    images = torch.rand(input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for mode in modes:
        for dtype in DTYPES:
            entry: dict[str, Any] = {"mode": mode, "dtype": dtype, "device": "cpu" if mode == "onnx" else device}
            try:
                with torch.no_grad():
                    call = _runner(net, images, mode, dtype, torch.device(device))
                    entry |= measure_latency(call, len(images), repeats, seconds)
            except Exception as error:  # a compiler or a runtime that is not there may raise anything
                entry["why_not"] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            result["latency"].append(entry)
    return result


def _runner(net: nn.Module, images: Tensor, mode: str, dtype: str, device: torch.device) -> Callable[[], Any]:
    """What makes one forward pass and returns when it is done."""
    if mode == "onnx":
        if dtype != "fp32":
            raise NotImplementedError("onnxruntime has no bf16 convolutions on the CPU")
        run, array = onnx_runner(to_onnx(net)), images.numpy()
        return lambda: run(array)
    net = copy.deepcopy(net).to(device, DTYPES[dtype]).eval()
    images = images.to(device, DTYPES[dtype])
    if mode == "compiled":
        net = torch.compile(net)

    def call() -> None:
        net(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def measure_latency(call: Callable[[], Any], images: int, repeats: int, seconds: float) -> dict[str, float]:
    """Median and 95th percentile of a call's time, and images a second, after a warm-up."""
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p50, p95 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    )
    return {
        "p50_ms": 1000 * p50,
        "p95_ms": 1000 * p95,
        "images_per_second": images * len(times) / sum(times),
        "calls": len(times),
    }
