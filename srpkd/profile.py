"""Compare the cost of generators: ``python -m srpkd.profile teacher.pth student.pth``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import add_device, exit_on_error, json_file, number, parse, positive
from .files import write_json
from .models.latency import MODES, profile_generators
from .reporting.table import format_table


def tables(result: dict[str, Any]) -> str:
    """Format the result of `profile_generators` as two tables: counts, and latencies if any were measured."""
    names = _short_names([network["weights"] for network in result["networks"]])
    latencies = [
        {"name": name, **entry} for name, network in zip(names, result["networks"]) for entry in network["latency"]
    ]
    counts = _counts_table(result, names)
    return f"{counts}\n\n{_latency_table(result, latencies)}" if latencies else counts


def _counts_table(result: dict[str, Any], names: Sequence[str]) -> str:
    columns = [
        {"key": "name", "label": "network"},
        {"key": "parameters", "format": ","},
        {"key": "MB", "label": "MB on disk", "format": ",.2f"},
        {"key": "output", "label": "GMACs", "format": ",.2f"},
        {"key": "input", "label": "GMACs (input grid)", "format": ",.2f"},
    ]
    rows = [
        {
            "name": name,
            "parameters": network["parameters"],
            "MB": network["bytes"] / 1e6,
            "output": network["macs"] / 1e9,
            "input": network["macs_input_grid"] / 1e9,
        }
        for name, network in zip(names, result["networks"])
    ]
    note = (
        f"GMACs of one {result['size']} x {result['size']} image. Published numbers count a transposed convolution on "
        "its output grid; the operations that are executed are those on its input grid."
    )
    return format_table({"columns": columns, "rows": rows, "notes": [note]})


def _latency_table(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    columns = [
        {"key": "name", "label": "network"},
        {"key": "mode"},
        {"key": "device"},
        {"key": "dtype"},
        {"key": "p50_ms", "label": "p50 ms", "format": ",.2f"},
        {"key": "p95_ms", "label": "p95 ms", "format": ",.2f"},
        {"key": "images_per_second", "label": "images/s", "format": ",.1f"},
    ]
    where = f"{result['device']}, {result['threads']} CPU threads, torch {result['torch']}"
    note = f"Batches of {result['batch_size']}, {result['size']} x {result['size']}; {where}."
    unavailable = [
        f"{row['mode']} {row['dtype']}: {row['unavailable_reason']}" for row in rows if "unavailable_reason" in row
    ]
    return format_table({"columns": columns, "rows": rows, "notes": [note, *dict.fromkeys(unavailable)]})


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the file names, or the paths if two names are the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd profile",
        description="Compare generators: parameters, file size, multiply-accumulates and measured latency.",
        epilog="example: srpkd profile teacher/latest_net_G_A.pth runs/h2z/latest_net_G_A.pth --json costs.json",
    )
    add = result.add_argument
    add("weights", nargs="+", help="generators: .pth or .safetensors; their architectures are inferred from the files")
    add("--size", type=positive, default=256, help="side of the images, in pixels (default: %(default)s)")
    add("--batch_size", type=positive, default=1, help="images per forward pass (default: %(default)s)")
    add("--modes", nargs="*", choices=MODES, default=list(MODES), help="what to time (default: all)")
    add("--repeats", type=positive, default=30, help="timed forward passes, at most (default: %(default)s)")
    add("--seconds", type=number, default=10.0, help="time limit per mode and dtype (default: %(default)s)")
    add("--json", type=json_file, metavar="FILE", help="also write the results to this file")
    add_device(result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(parser(), arguments)
    with exit_on_error():
        result = profile_generators(
            options.weights,
            size=options.size,
            batch_size=options.batch_size,
            device=options.device,
            modes=options.modes,
            repeats=options.repeats,
            seconds=options.seconds,
        )
        print(tables(result))  # before the file is written: if that fails, the results are not lost
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
