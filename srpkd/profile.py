"""What generators cost, side by side: ``python -m srpkd.profile teacher.pth student.pth``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .arguments import default_device, device, json_file, number, positive
from .files import atomic_write
from .models.checkpoints import load_generator
from .models.inference import SMALLEST
from .models.latency import MODES, profile_network
from .models.networks import image_channels, size_multiple
from .reporting.table import format_table


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
        costs = profile_network(
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
