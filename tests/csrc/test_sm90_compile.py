"""The wgmma tiles, compiled for sm_90a without a GPU: registers, spills, and the products in the machine code."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from compile_once import compile_once

from bench.machine_code import tool
from srpkd.kernels import build

SOURCES = tuple(sorted(path.stem for path in (build.CSRC / "cuda" / "sm90").glob("*.cu")))
CONFIG = re.compile(r"ConfigINS0_\d+(\w+?)ELb(\d)ELb(\d)ELb(\d)ELb(\d)ELi(\d)E")
# bytes per thread: with a gradient, the elementwise part needs a few registers more than 208 per consumer. They spill
# outside the products, which stay asynchronous
MAX_SPILL = 40

pytestmark = pytest.mark.slow


class Kernel(NamedTuple):
    element: str
    pixels_adjacent: int
    symmetric: int
    l1: int
    grad: int
    terms: int


def kernel(symbol: str) -> Kernel:
    match = CONFIG.search(symbol)
    assert match, symbol
    return Kernel(match[1], *map(int, match.groups()[1:]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Return the report of ptxas and the path of the binary for each source."""
    if (nvcc := tool("nvcc")) is None:
        pytest.skip("nvcc is not installed")

    def run(source: str) -> tuple[str, Path]:
        options = ["-std=c++17", *build.NVCC_FLAGS, "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a"]
        command = [nvcc, *options, "-fatbin", build.CSRC / "cuda" / "sm90" / f"{source}.cu"]
        return compile_once(tmp_path_factory, command, ".fatbin")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(run, SOURCES)))


@pytest.mark.parametrize("source", SOURCES)
def test_registers(compiled: dict[str, tuple[str, Path]], source: str) -> None:
    """The launch has the registers that setmaxnreg hands out, and a warpgroup does not spill those of its role."""
    report, _ = compiled[source]
    assert "warning" not in report
    assert "serialized" not in report  # C7510 and the like: ptxas waits after every product
    parts = report.split("Compiling entry function ")[1:]
    assert parts
    for part in parts:
        config = kernel(part)
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", part).groups())
        assert max(stack, stores, loads) <= MAX_SPILL * config.grad, part
        threads = 512 if config.grad else 384
        # with fewer, setmaxnreg.inc would wait forever; they are allocated in units of 8
        assert int(re.search(r"Used (\d+) registers", part)[1]) == 65536 // threads // 8 * 8, part


@pytest.mark.parametrize("source", SOURCES)
def test_products(compiled: dict[str, tuple[str, Path]], source: str) -> None:
    """The machine code has each product once, and no register of setmaxnreg exceeds 240."""
    if (disassembler := tool("cuobjdump")) is None or tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    _, target = compiled[source]
    done = subprocess.run([disassembler, "-sass", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = done.stdout.split("Function : ")[1:]
    assert functions
    for function in functions:
        config = kernel(function.split("\n", 1)[0])
        words = Counter(re.findall(r"\s([A-Z][\w.]+)", function))
        type_ = "F32" if config.element == "Half" else "F32.BF16"
        # of two terms, all pairs but the product of both second terms
        pairs = config.terms * (config.terms + 1) // 2
        # groups of 64 channels: in two loops over the teacher's and two over the student's, and the last one
        assert words[f"HGMMA.64x128x16.{type_}"] == 5 * 4 * pairs
        # U of the rows, and of two halves of the columns, over 128 pixels
        assert words[f"HGMMA.64x64x16.{type_}"] == 3 * 8 * pairs * config.grad
        assert max(int(register) for register in re.findall(r"\bR(\d+)\b", function)) < 240
        assert words["UTMALDG.3D"] > 0
