"""Print versions, devices and backends, and why a backend is unavailable: ``python -m srpkd.info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Sequence

import torch

from . import __version__
from .arguments import first_line
from .devices import device_name, visible_devices
from .kernels import BACKENDS, Relation, auto_backend, measured, native, requested_backend, unavailable_reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """Return the versions, devices and backends of this machine as text."""
    devices = visible_devices()
    lines = [
        f"srpkd {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        *(f"  {package:<12} {_version(package)}" for package in ("triton", "torchvision", "numpy", "ninja")),
        f"  threads      {torch.get_num_threads()}",
        f"  native       {native.status()}",
    ]
    for device in devices:
        name = device_name(device)
        lines.append(f"\n{device} ({name})")
        for backend, summary in BACKENDS.items():
            reason = unavailable_reason(backend, device)
            lines.append(f"  {backend:<12} " + (f"yes: {summary}" if reason is None else f"no: {reason}"))
        dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
        for relation, dtype in itertools.product((Relation(distance="l1"), Relation(distance="l2")), dtypes):
            large, small = (auto_backend(device, relation, dtype, pixels) for pixels in (64**2, 1))
            also = f", {small} for small maps" if small != large else ""
            lines.append(
                f"  auto, {relation.distance}     {large}{also}" + (f", in {str(dtype)[6:]}" if len(dtypes) > 1 else "")
            )
        if has_kernels(device) and name not in (recorded := [known for known, _ in measured.DEVICES]):
            lines.append(
                f"  This GPU has not been measured: auto compares the times of {', '.join(recorded)}. Run srpkd check "
                "to test whether the results are right here."
            )
    if any(map(has_kernels, devices)) and (old := measured.stale(measured.RECORDED)):
        lines.append(
            f"\nauto uses times that were measured with earlier kernels of {', '.join(old)}. Run srpkd check to test "
            "whether the present ones are right here."
        )
    try:
        setting = f"= {requested_backend('auto')}" if os.environ.get("SRPKD_BACKEND") else "is not set"
    except ValueError as error:
        setting = f"is invalid: {error}"
    lines.append(f"\nSRPKD_BACKEND {setting}")
    if len(devices) == 1:
        lines.append(f"torch sees no GPU{unusable_gpus()}: everything runs on the CPU")
    return "\n".join(lines)


def unusable_gpus() -> str:
    """Return how many GPUs torch cannot use and why, or "" if there are none."""
    if not (count := torch.cuda.device_count()):
        return ""
    try:
        torch.cuda.init()
        reason = "unknown error"
    except Exception as error:  # of several types
        reason = first_line(error)
    return f" that it can use (of {count}: {reason})"


def has_kernels(device: torch.device) -> bool:
    """Return whether GPU kernels run on a device, between which ``auto`` chooses by recorded times."""
    return device.type == "cuda" and None in (unavailable_reason(name, device) for name in ("native", "triton"))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, which has no options."""
    return argparse.ArgumentParser(
        prog="srpkd info",
        description="List versions, devices, the backends that this machine can run, and why it cannot run the others.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser().parse_args(arguments)
    print(describe())


if __name__ == "__main__":
    main()
