"""The machine: what it is called, what it has free, and how fast it can multiply and copy at best.

python -m bench.machine
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: str) -> str:
    """What the device calls itself."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


@functools.cache
def versions() -> dict[str, str]:
    """Columns of every row: torch's and triton's versions, and the commit, with a + where code differs from it."""
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
    """Memory that can still be had there."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


class Ceilings(NamedTuple):
    """What the device reaches at best: operations a second of matrix products, bytes a second, read and written."""

    matrix_rate: float
    copy_rate: float


@functools.cache
def ceilings(device: str, dtype: torch.dtype, precision: str, threads: int) -> Ceilings:
    """Measured now: the best of several products of random matrices, large and in the cache, and of a large copy.

    precision and threads are what torch is set to; they are here to tell measurements apart.
    """
    on_gpu = device != "cpu"
    rates = []
    for size in (4096, 8192) if on_gpu else (256, 1024, 2048):
        # many products of matrices that stay in the cache, where they are small: as many for every thread
        batch = 16 * threads if size == 256 else 1
        left, right = (torch.randn(batch, size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _best(functools.partial(torch.matmul, left, right, out=out), device)
        rates.append(2 * batch * size**3 / seconds)
    source = torch.randn(2**28 if on_gpu else 2**26, device=device)  # floats: far more than a cache holds
    seconds = _best(functools.partial(torch.empty_like(source).copy_, source), device)
    return Ceilings(max(rates), 2 * source.nbytes / seconds)


def _best(function: Callable[[], object], device: str, least: float = 0.5) -> float:
    """The seconds of the fastest of the calls that ``least`` seconds have room for, five at the least.

    Milliseconds would not do: on a shared machine they can lie wholly in a moment that others use.
    """
    function()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < least:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report() -> str:
    """The machine in a few lines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = ", ".join(f"{name} {value or 'missing'}" for name, value in versions().items())
    lines = [f"{device_name(device)}; {found}; {free_bytes(device) / 1e9:.1f} GB free"]
    for dtype in (torch.float32, torch.bfloat16):
        rates = ceilings(device, dtype, torch.get_float32_matmul_precision(), torch.get_num_threads())
        lines.append(
            f"{dtype}: products at {rates.matrix_rate / 1e12:.2f} TFLOP/s, copy {rates.copy_rate / 1e9:.0f} GB/s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
