"""What generators cost, side by side: ``python -m srpkd.profile teacher.pth student.pth``."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .arguments import check_number, check_type, check_whole, default_device, device, json_file, number, positive
from .checkpoint import atomic_write, load_generator
from .complexity import count_macs, count_parameters
from .export import onnx_runner, to_onnx
from .kernels.dispatch import check_choice
from .networks import image_channels, size_multiple
from .report import format_table
from .translate import SMALLEST

MODES = ("eager", "compiled", "onnx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 3  # calls that are not timed; the first of them compiles


def profile(
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
                    entry |= measure(call, len(images), repeats, seconds)
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


def measure(call: Callable[[], Any], images: int, repeats: int, seconds: float) -> dict[str, float]:
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


def profile_files(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for, as what ``--json`` writes."""
    device = torch.device(options.device)
    networks = {}
    if options.size < SMALLEST:
        raise ValueError(f"--size {options.size}: expected at least {SMALLEST} pixels a side")
    for path, net in {path: load_generator(path) for path in options.weights}.items():
        multiple = size_multiple(net)
        if options.size % multiple:
            raise ValueError(f"--size {options.size}: {path} takes multiples of {multiple}")
        networks[path] = net
    results = []
    for path, net in tqdm(networks.items(), unit="network", desc="profiling"):
        shape = (options.batch_size, image_channels(net)[0], options.size, options.size)
        costs = profile(
            net, shape, device=options.device, modes=options.modes, repeats=options.repeats, seconds=options.seconds
        )
        results.append({"weights": path, "bytes": os.path.getsize(Path(path).expanduser()), **costs})
    return {
        "size": options.size,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "networks": results,
    }


def tables(result: dict[str, Any]) -> str:
    """The result as two tables: what is counted, and what is measured."""
    names = _short([network["weights"] for network in result["networks"]])
    counted, measured, reasons = [], [], {}
    for name, network in zip(names, result["networks"]):
        size = {
            "MB": network["bytes"] / 1e6,
            "output": network["macs"] / 1e9,
            "input": network["macs_input_grid"] / 1e9,
        }
        counted.append({"name": name, "parameters": network["parameters"], **size})
        for entry in network["latency"]:
            measured.append({"name": name, **entry})
            if "why_not" in entry:
                reasons.setdefault(f"{entry['mode']} {entry['dtype']}: {entry['why_not']}")
    image = f"{result['size']} x {result['size']}"
    text = format_table(
        {
            "columns": [
                {"key": "name", "label": "network", "format": ""},
                {"key": "parameters", "label": "parameters", "format": ","},
                {"key": "MB", "label": "MB on disk", "format": ",.2f"},
                {"key": "output", "label": "GMACs", "format": ",.2f"},
                {"key": "input", "label": "GMACs (input grid)", "format": ",.2f"},
            ],
            "rows": counted,
            "notes": [
                f"GMACs of one {image} image. Published numbers count a transposed convolution on its output grid; "
                "what is computed is the count on its input grid."
            ],
        }
    )
    if not measured:
        return text
    where = f"{result['device']}, {result['threads']} CPU threads, torch {result['torch']}"
    return f"{text}\n\n" + format_table(
        {
            "columns": [
                {"key": "name", "label": "network", "format": ""},
                {"key": "mode", "label": "run by", "format": ""},
                {"key": "device", "label": "on", "format": ""},
                {"key": "dtype", "label": "dtype", "format": ""},
                {"key": "p50_ms", "label": "p50 ms", "format": ",.2f"},
                {"key": "p95_ms", "label": "p95 ms", "format": ",.2f"},
                {"key": "images_per_second", "label": "images/s", "format": ",.1f"},
            ],
            "rows": measured,
            "notes": [f"Batches of {result['batch_size']}, {image}; {where}.", *reasons],
        }
    )


def _short(paths: Sequence[str]) -> list[str]:
    """File names, with their folders where names alone would be the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd profile",
        description="Parameters, size on disk, multiply-accumulates and measured latency of generators, side by side.",
        epilog="example: srpkd profile teacher/latest_net_G_A.pth runs/h2z/latest_net_G_A.pth --json costs.json",
    )
    add = result.add_argument
    add("weights", nargs="+", help="generators: .pth or .safetensors; their architectures are read off the files")
    add("--size", type=positive, default=256, help="side of the images, in pixels (default: %(default)s)")
    add("--batch_size", type=positive, default=1, help="images a pass (default: %(default)s)")
    add("--device", type=device, default=default_device(), help="cpu, cuda, ... (default here: %(default)s)")
    add("--modes", nargs="*", choices=MODES, default=list(MODES), help="what is timed (default: all)")
    add("--repeats", type=positive, default=30, help="timed passes, at most (default: %(default)s)")
    add("--seconds", type=number, default=10.0, help="time for each of them together (default: %(default)s)")
    add("--json", type=json_file, metavar="FILE", help="write the results there too")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        result = profile_files(options)
        print(tables(result))  # first, lest it be lost with a file that cannot be written
        if options.json:
            with atomic_write(options.json) as file:
                file.write(json.dumps(result, indent=1).encode())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
