"""The wgmma kernels of csrc/cuda/sm90, compiled without a GPU.

Products of wgmma run beside other work only if the compiler keeps them asynchronous: it reports when it does not. The
consumers have 208 registers, and the loaders 24.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_cuda_compile import tool

from srpkd.kernels import build

SOURCES = sorted(path.stem for path in (build.CSRC / "cuda" / "sm90").glob("kernels_*.cu"))
KERNEL = re.compile(r"ConfigINS0_\d(BFloat16|Half)ELb(\d)ELb(\d)ELb(\d)ELb(\d)ELi(\d)E")
MAX_REGISTERS = 240
# bytes per thread: the elementwise part of l2 and Huber, and two terms of K, need a few registers more than there are
MAX_SPILL = {"l1": 0, "other": 64, "two terms": 160}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """Return a function: source -> the report of ptxas and the path of the binary. Compile all in parallel."""
    if (nvcc := tool("nvcc")) is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("sm90_compile")

    def run(source: str) -> tuple[str, Path]:
        target = folder / f"{source}.cubin"
        options = ["-std=c++17", *build.NVCC_FLAGS, "-cubin", "-arch=sm_90a", "-Xptxas", "-v", "-o", str(target)]
        command = [nvcc, *options, str(build.CSRC / "cuda" / "sm90" / f"{source}.cu")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout, target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {source: pool.submit(run, source) for source in SOURCES}
    return lambda source: results[source].result()


def arguments(symbol: str) -> dict[str, int]:
    """Return the template arguments of a kernel, see Config in plan.h."""
    match = KERNEL.search(symbol)
    assert match, symbol
    names = ("pixels_adjacent", "symmetric", "l1", "grad", "terms")
    return dict(zip(names, map(int, match.groups()[1:])))


def products(kernel: dict[str, int]) -> int:
    """Return the number of wgmmas in the code of a kernel: each is there once, whatever the number of channels."""
    per_pair = {1: 1, 2: 3}[kernel["terms"]]  # products of terms, without the smallest
    gram = 3 * 4 * per_pair  # the teacher's groups, the student's, and its last one; 64 channels, 16 at a time
    of_U = 3 * 8 * per_pair  # of the rows, and of two halves of the columns; 128 pixels
    return gram + kernel["grad"] * of_U


@pytest.mark.parametrize("source", SOURCES)
def test_products_stay_asynchronous(compiled: Callable[[str], tuple[str, Path]], source: str) -> None:
    report, _ = compiled(source)
    assert "serialized" not in report and "warning" not in report
    kernels = [arguments(symbol) for symbol in re.findall(r"Compiling entry function '(\S+)'", report)]
    layouts = 1 if "float32" in source else 2
    assert len(kernels) == 4 * layouts  # l1 or not, gradient or not


@pytest.mark.parametrize("source", SOURCES)
def test_registers(compiled: Callable[[str], tuple[str, Path]], source: str) -> None:
    report, _ = compiled(source)
    for part in report.split("Compiling entry function ")[1:]:
        kernel = arguments(part)
        kind = "two terms" if kernel["terms"] == 2 else "l1" if kernel["l1"] else "other"
        limit = MAX_SPILL[kind] if kernel["grad"] else 0
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        assert max(stores, loads) <= limit, part


@pytest.mark.parametrize("source", SOURCES)
def test_instructions(compiled: Callable[[str], tuple[str, Path]], source: str) -> None:
    if (disassembler := tool("cuobjdump")) is None or tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    _, target = compiled(source)
    done = subprocess.run([disassembler, "-sass", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for function in done.stdout.split("Function : ")[1:]:
        kernel = arguments(function.split("\n", 1)[0])
        words = re.findall(r"\s([A-Z][\w.]+)", function)
        assert sum(word.startswith("HGMMA") for word in words) == products(kernel)
        assert any(word.startswith("UTMALDG.3D") for word in words)
        # generic loads and stores: only the barrier of the grid, by cooperative groups, has one
        assert {word for word in words if re.fullmatch(r"(LD|ST)(\..*)?", word)} <= {"LD.E.STRONG.GPU"}
        assert max(map(int, re.findall(r"\bR(\d+)\b", function))) < MAX_REGISTERS
