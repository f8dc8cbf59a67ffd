"""The machine: names, versions, free memory, and peak rates of matrix products and copies."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from srpkd.kernels.build import available_cores
from srpkd.kernels.cpu_info import cpu_info

from .measure import seconds_of

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: str) -> str:
    """Return the name of a device.

    That of a CPU says which vector instructions torch uses: virtual machines of different processors have one name.
    """
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()}{'' if instructions == 'DEFAULT' else f' with {instructions}'}, {available_cores()} cores"


def _cpu_model() -> str:
    """Return the model of the CPU, or its architecture if the model is unknown."""
    names = [name] if (name := cpu_info().get("model name")) else []
    if not names and (lscpu := shutil.which("lscpu")):  # on ARM, the file contains numbers, whose names lscpu knows
        environment = {**os.environ, "LC_ALL": "C"}
        text = subprocess.run([lscpu], env=environment, capture_output=True, text=True).stdout
        names = re.findall(r"^\s*Model name: *(\w.*)", text, re.MULTILINE)  # a line for each kind of core
    return " and ".join(names) or platform.processor() or platform.machine()


def capability(device: str) -> str:
    """Return the compute capability of a GPU, such as "9.0", or "" for the CPU."""
    return "" if device == "cpu" else "{}.{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of torch and triton, and the commit, with a + if the code has uncommitted changes."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"torch": torch.__version__, "triton": triton, "commit": _commit()}


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "kernels", "csrc", "srpkd", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SRPKD_COMMIT", "unknown")


def free_bytes(device: str) -> int:
    """Return the memory that is free on a device."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class PeakRates(NamedTuple):
    """Measured peak rates of a device: the roofs of the roofline model.

    Attributes:
        matrix_flops: floating-point operations per second in matrix products.
        copy_bytes: bytes per second of a copy, read plus written.
    """

    matrix_flops: float
    copy_bytes: float


@functools.cache
def peak_rates(device: str, dtype: torch.dtype, precision: str, threads: int) -> PeakRates:
    """Measure the best of several matrix products, from cache-sized to large, and a large copy.

    Args:
        precision, threads: torch's present settings, as keys of the cache.
    """
    on_gpu = device != "cpu"
    rates = []
    for size in (4096, 8192) if on_gpu else (256, 1024, 2048):
        # small matrices stay in the cache; a batch gives each thread the same number of products
        batch = 16 * threads if size == 256 else 1
        left, right = (torch.randn(batch, size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _best(functools.partial(torch.matmul, left, right, out=out), device)
        rates.append(2 * batch * size**3 / seconds)
    source = torch.randn(2**28 if on_gpu else 2**26, device=device)  # far larger than the caches
    seconds = _best(functools.partial(torch.empty_like(source).copy_, source), device)
    return PeakRates(max(rates), 2 * source.nbytes / seconds)


def _best(function: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest call, over at least five calls and half a second.

    On a shared machine, a measurement of milliseconds may fall entirely into a busy moment.
    """
    function()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < 0.5:
        seconds.append(seconds_of(function, device))
    return min(seconds)
