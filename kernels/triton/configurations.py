"""Tile sizes and compile options of the kernels of backend ``triton``.

For the tile kernel they come from a hand-chosen table or, with SRPKD_AUTOTUNE=1, from measurements.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..build import user_cache
from ..formulas import matmul_precision
from .primitives import triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels around the tile kernel: channels of a tile of terms_kernel, and channels of a tile of a product with M.
BLOCK_TERMS, BLOCK_CHANNELS = 32, 64
MOST_SPLITS = 16  # programs that share the columns of a row block: parts of h that are read at once
MOST_WEIGHTED, BLOCK_WEIGHTED = 12, 4  # partial sums of a tile of M_w, and how many its last program reads at once
BLOCK_BACKWARD = 2048  # elements of the gradient that a program of backward multiplies: 16 per thread
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


# ``moment_blocks`` of a weighted sum, whose left factors are float32; it prefetches by three steps
WEIGHTED_MOMENT_BLOCKS = 32, 64, OPTIONS | {"num_warps": 8, "num_stages": 4}


def moment_blocks(dtype: torch.dtype, channels: int) -> tuple[int, int, dict]:
    """Return pixels and channels of a step of a sum over pixels, and compile options.

    float32 features are split into terms in registers, which limits the tile.
    """
    if dtype == torch.float32:
        return 32, 64, OPTIONS
    if channels <= 64:
        return 64, 64, OPTIONS
    return 64, 128, OPTIONS | {"num_warps": 8, "num_stages": 3}


def product_blocks(dtype: torch.dtype, pixels: int, multiprocessors: int) -> tuple[int, int, dict]:
    """Return pixels of a tile and depth of a step of a product of features with M, and compile options.

    Args:
        pixels: of the batch. Smaller tiles let a small batch occupy the device.
    """
    if dtype != torch.bfloat16:  # features of several terms: larger tiles need too many registers before sm_90
        return 64, 32, OPTIONS
    if pixels < 256 * multiprocessors:
        return 64, 64, OPTIONS
    return 128, 64, OPTIONS | {"num_warps": 8}


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and compile options of the tile kernel.

    Attributes:
        block_m, block_n: rows and columns of a tile.
        block_s, block_t: the student's and the teacher's channels per block; the kernel loops over the blocks.
        warps: warps of a program.
        stages: depth of the pipeline that prefetches columns.
    """

    block_m: int
    block_n: int
    block_s: int
    block_t: int
    warps: int
    stages: int


# For an architecture and a number format (of float32: its matmul precision), rows of
# (maximum C_s, maximum C_t, block_m, block_n, warps, stages); the first row whose maxima fit is used. Each row has the
# largest tile, which reads features least often, that spills at most MAX_SPILLED bytes and fits into shared memory
# according to python -m srpkd.kernels.triton.compiler_report. The rows are not timed yet.
ANY = 1 << 30
MAX_SPILLED = 64  # bytes per thread: 16 registers, the difference between Triton releases (3.6 to 3.9) for one kernel
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
    ("sm_90", "medium"): (
        (64, 64, 128, 64, 8, 3),
        (64, ANY, 128, 64, 8, 3),
        (128, 128, 128, 32, 8, 3),
        (128, ANY, 128, 32, 8, 3),
        (ANY, ANY, 128, 32, 8, 3),
    ),
    ("sm_90", "high"): (
        (64, 64, 128, 64, 8, 2),
        (64, ANY, 128, 64, 8, 2),
        (128, 128, 128, 32, 8, 3),
        (128, ANY, 128, 32, 8, 3),
        (ANY, ANY, 128, 32, 8, 3),
    ),
    ("sm_90", "highest"): ((64, 64, 128, 32, 8, 3), (64, ANY, 128, 32, 8, 3), (ANY, ANY, 128, 32, 8, 3)),
    ("sm_80", "bfloat16"): ((64, 256, 128, 64, 8, 2), (128, 256, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "float16"): ((64, 256, 128, 32, 8, 2), (128, 256, 64, 32, 4, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "medium"): ((64, 64, 128, 32, 8, 2), (64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "high"): ((64, 64, 128, 32, 8, 2), (64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_80", "highest"): ((64, 64, 128, 32, 8, 2), (64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "bfloat16"): (
        (64, 128, 128, 32, 8, 2),
        (64, 256, 64, 64, 8, 2),
        (128, 256, 64, 32, 4, 2),
        (ANY, ANY, 128, 32, 8, 2),
    ),
    ("sm_86", "float16"): (
        (64, 128, 128, 32, 8, 2),
        (64, 256, 64, 32, 4, 2),
        (64, ANY, 64, 32, 8, 2),
        (ANY, ANY, 64, 64, 8, 2),
    ),
    ("sm_86", "medium"): ((64, 64, 128, 32, 8, 2), (64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "high"): ((64, 64, 128, 32, 8, 2), (64, ANY, 128, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
    ("sm_86", "highest"): ((64, 64, 64, 32, 8, 2), (64, ANY, 64, 32, 8, 2), (ANY, ANY, 128, 32, 8, 2)),
}
# Data-centre Blackwell has as much shared memory as Hopper and uses its rows. The exceptions are rows that would spill
# more, and rows for which Triton 3.6 needs more tensor memory than exists: it then compiles a kernel that only traps.
TABLE |= {("sm_100", numbers): rows for (name, numbers), rows in TABLE.items() if name == "sm_90"}
TABLE["sm_100", "float16"] = ((64, 256, 128, 32, 8, 3), *TABLE["sm_90", "float16"][1:])
TABLE["sm_100", "high"] = (
    (64, 64, 64, 64, 8, 2),
    (64, ANY, 64, 64, 8, 2),
    (128, 128, 64, 32, 4, 3),
    (128, ANY, 64, 64, 8, 3),
    *TABLE["sm_90", "high"][4:],
)
TABLE["sm_100", "highest"] = ((64, ANY, 64, 32, 4, 3), *TABLE["sm_90", "highest"][2:])
TERMS = {"bfloat16": 1, "float16": 2, "medium": 1, "high": 2, "highest": 3}  # see primitives.py
# channels per block where the kernel loops over several blocks
LOOP_BLOCK = {"bfloat16": 64, "float16": 64, "medium": 32, "high": 32, "highest": 32}


def number_format(dtype: torch.dtype) -> str:
    """Return the TABLE's name for features of that dtype."""
    return matmul_precision() if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def architecture(capability: tuple[int, int]) -> str:
    """Return the TABLE's name for GPUs of that compute capability; unknown ones use the rows that need least memory."""
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "sm_86")


def configuration(capability: tuple[int, int], numbers: str, channels_s: int, channels_t: int) -> Configuration:
    """Return the hand-chosen configuration.

    Student and teacher with equally many channels get equal blocks: G is then summed in the same order, and D of equal
    features is exactly 0.
    """
    rows = TABLE[architecture(capability), numbers]
    row = next(row for row in rows if channels_s <= row[0] and channels_t <= row[1])
    if channels_s == channels_t and row[0] != ANY == row[1]:  # only the teacher's would be computed in blocks
        row = rows[-1]
    block_s, block_t = (
        LOOP_BLOCK[numbers] if most == ANY else max(32, triton.next_power_of_2(channels))
        for most, channels in zip(row, (channels_s, channels_t))
    )
    block_m, block_n, warps, stages = row[2:]
    return Configuration(block_m, block_n, block_s, block_t, warps, stages)


def candidates(chosen: Configuration) -> list[Configuration]:
    """Return the hand-chosen configuration, and others with at most as many tile elements per thread as the TABLE.

    As in the TABLE, block_n divides block_m: otherwise tiles would be partly inside the diagonal block, or beyond the
    columns of a program.
    """
    others = [
        replace(chosen, block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        for block_m in (64, 128)
        for block_n in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3)
        if block_m * block_n // (32 * warps) <= 32
    ]
    return [chosen, *(other for other in others if other != chosen)]


def autotune(case: str, kernel: str, chosen: Configuration, measure: Callable[[Configuration], float]) -> Configuration:
    """Return the fastest candidate for a case. It is measured once per machine and then read from a file.

    Where the file cannot be written, each process measures.

    Args:
        case: the properties that the fastest candidate depends on: GPU, number format, relation, bucketed shapes.
        kernel: a hash of the kernel's source, part of the file name: a changed kernel is measured again.
        chosen: the hand-chosen configuration.
        measure: returns the time of a run with a candidate.
    """
    root = user_cache() or Path(os.devnull)  # which cannot contain a file
    file = root / "srpkd" / f"triton-{triton.__version__}-{kernel[:16]}.json"
    known = cached_winners(file)
    # an older version had other candidates
    if known.get(case) not in [asdict(candidate) for candidate in candidates(chosen)]:
        known[case] = asdict(min(candidates(chosen), key=measure))
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}")  # replaced atomically: no process reads half a file
            try:
                temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
    return Configuration(**known[case])


@functools.lru_cache(maxsize=1)
def cached_winners(file: Path) -> dict[str, dict]:
    """Return the fastest configurations in the file, by case."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: a file that a power failure has damaged
        return {}


def run_milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a run in ms; infinity if it needs more shared memory than the device has."""
    try:
        return triton.testing.do_bench(run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf
