"""How the tile kernel of backend ``triton`` is compiled: a hand-chosen table, or with SRPKD_AUTOTUNE=1 the fastest."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..formulas import matmul_precision
from .primitives import triton


@dataclass(frozen=True)
class Configuration:
    """How the tile kernel is compiled.

    Attributes:
        block_m, block_n: rows and columns of a tile.
        block_s, block_t: the student's and the teacher's channels that are held at a time; of more, one block after
            the other is.
        warps, stages: warps of a program; depth of the pipeline that loads columns ahead.
    """

    block_m: int
    block_n: int
    block_s: int
    block_t: int
    warps: int
    stages: int


# By architecture and number format (of float32, its matmul precision), the first row that has room for the channels:
# (C_s at most, C_t at most, block_m, block_n, warps, stages). They are the largest tiles, which read features least
# often, of those that spill at most SPILLED bytes and fit into shared memory (python -m srpkd.kernels.triton.compiler_report). Not
# timed yet.
ANY = 1 << 30
SPILLED = 64  # per thread: 16 registers, by which releases of Triton differ for one and the same kernel (3.6 to 3.9)
TABLE = {
    ("sm_90", "bfloat16"): (
        (64, 256, 128, 64, 8, 3),
        (128, 256, 128, 64, 8, 2),
        (128, ANY, 128, 32, 8, 3),
        (ANY, ANY, 128, 32, 8, 3),
    ),
    ("sm_90", "float16"): (
        (64, 256, 128, 64, 8, 3),
        (128, 256, 128, 32, 8, 3),
        (128, ANY, 128, 32, 8, 3),
        (ANY, ANY, 128, 32, 8, 3),
    ),
    ("sm_90", "medium"): ((64, ANY, 128, 64, 8, 3), (128, ANY, 128, 32, 8, 3), (ANY, ANY, 128, 32, 8, 3)),
    ("sm_90", "high"): ((64, ANY, 128, 64, 8, 2), (128, ANY, 128, 32, 8, 3), (ANY, ANY, 128, 32, 8, 3)),
    ("sm_90", "highest"): ((64, ANY, 128, 32, 8, 3), (ANY, ANY, 128, 32, 8, 3)),
    ("sm_80", "bfloat16"): ((64, 256, 128, 64, 8, 2), (128, 256, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "float16"): ((64, 256, 128, 32, 8, 2), (128, 256, 64, 32, 4, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "medium"): ((64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "high"): ((64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "highest"): ((64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "bfloat16"): (
        (64, 128, 128, 32, 8, 2),
        (64, 256, 64, 64, 8, 2),
        (128, 256, 64, 32, 4, 2),
        (ANY, ANY, 128, 32, 8, 2),
    ),
    ("sm_86", "float16"): ((64, 128, 128, 32, 8, 2), (64, 256, 64, 32, 4, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "medium"): ((64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "high"): ((64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "highest"): ((64, ANY, 64, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
}
# data-centre Blackwell goes by Hopper's rows, having as much shared memory, but where it would spill more, or where
# Triton 3.6 would need more tensor memory than there is: that compiles to a kernel which does nothing but trap
TABLE |= {("sm_100", numbers): rows for (name, numbers), rows in TABLE.items() if name == "sm_90"}
TABLE["sm_100", "float16"] = ((64, 256, 128, 32, 8, 3), *TABLE["sm_90", "float16"][1:])
TABLE["sm_100", "high"] = ((64, ANY, 64, 64, 8, 2), (128, ANY, 64, 64, 8, 3), *TABLE["sm_90", "high"][2:])
TABLE["sm_100", "highest"] = ((64, ANY, 64, 32, 4, 3), *TABLE["sm_90", "highest"][1:])
TERMS = {"bfloat16": 1, "float16": 2, "medium": 1, "high": 2, "highest": 3}  # see triton_algebra.py
LOOPED = {"bfloat16": 64, "float16": 64, "medium": 32, "high": 32, "highest": 32}  # channels of a block, if of several


def number_format(dtype: torch.dtype) -> str:
    """The TABLE's name for features of that dtype."""
    return matmul_precision() if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def architecture(capability: tuple[int, int]) -> str:
    """The TABLE's name for GPUs of that compute capability; what is unknown goes by the rows that need least."""
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "sm_86")


def configuration(capability: tuple[int, int], numbers: str, channels_s: int, channels_t: int) -> Configuration:
    """The hand-chosen configuration."""
    rows = TABLE[architecture(capability), numbers]
    row = next(row for row in rows if channels_s <= row[0] and channels_t <= row[1])
    block_s, block_t = (
        LOOPED[numbers] if most == ANY else max(32, triton.next_power_of_2(channels))
        for most, channels in zip(row, (channels_s, channels_t))
    )
    block_m, block_n, warps, stages = row[2:]
    return Configuration(block_m, block_n, block_s, block_t, warps, stages)


def candidates(chosen: Configuration) -> list[Configuration]:
    """The hand-chosen configuration, and others with no more elements of a tile per thread than the TABLE has."""
    others = [
        replace(chosen, block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        for block_m in (64, 128)
        for block_n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        if 8 <= block_m * block_n // (32 * warps) <= 32
    ]
    return [chosen, *(other for other in others if other != chosen)]


def tuned(case: str, kernel: str, chosen: Configuration, measure: Callable[[Configuration], float]) -> Configuration:
    """The candidate with the shortest time for a case: measured once on a machine, then read from the disk.

    Args:
        case: what the winner depends on: the GPU, the number format, the relation, shapes in buckets.
        kernel: what else makes old measurements worthless: a hash of the kernel's source.
        chosen: the configuration to start from.
        measure: the time of a run.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = root / "srpkd" / f"triton-{triton.__version__}-{kernel[:16]}.json"
    known = measured(file)
    if case not in known:
        times = {candidate: measure(candidate) for candidate in candidates(chosen)}
        known[case] = asdict(min(times, key=times.get))
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")  # written aside, so that nobody reads half a file
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(file)
    return Configuration(**known[case])


@functools.lru_cache(maxsize=1)
def measured(file: Path) -> dict[str, dict]:
    """The winners that the file holds, by case."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a run; infinite if it needs more memory than a multiprocessor has."""
    try:
        return triton.testing.do_bench(run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf
