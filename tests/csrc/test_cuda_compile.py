"""The CUDA kernels, compiled without a GPU: no register spills, and the expected instructions in the machine code."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import tool

from srpkd.kernels import build

ARCHITECTURES = ("sm_80", "sm_90a")
NEWER = "sm_100"  # tested too if nvcc supports it
MAX_SPILL = 16  # bytes per thread for NEWER, whose kernels need three registers more than the 255; 0 for the others
# the instructions that multiply features (k = 16 for 16 bits, k = 8 for tf32), and K
INSTRUCTIONS = {
    "bf16": ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"),
    "fp16": ("HMMA.16816.F32", "HMMA.1688.F32.TF32"),
    "tf32": ("HMMA.1688.F32.TF32",) * 2,
    "tf32x3": ("HMMA.1688.F32.TF32",) * 2,
}
KERNELS = {(adjacent, channels) for adjacent in (0, 1) for channels in (0, 64, 128)}  # of one precision
FUNCTION = re.compile(r"ConfigILNS0_9PrecisionE\dELb(\d)ELi(\d+)")

pytestmark = pytest.mark.slow


@functools.cache
def architectures() -> tuple[str, ...]:
    """Return the architectures to compile for."""
    listed = subprocess.run([tool("nvcc"), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return (*ARCHITECTURES, NEWER) if NEWER in listed else ARCHITECTURES


def kernel(symbol: str) -> tuple[int, int]:
    """Return whether a kernel's pixels are adjacent (0 or 1), and its channels of U."""
    match = FUNCTION.search(symbol)
    assert match, symbol
    return int(match[1]), int(match[2])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """Return a function: precision -> the report of ptxas and the path of the binary. Compile all in parallel."""
    if (nvcc := tool("nvcc")) is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda_compile")

    def run(precision: str) -> tuple[str, Path]:
        target = folder / f"{precision}.fatbin"
        codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures()]
        options = ["-std=c++17", *build.NVCC_FLAGS, "-fatbin", "-Xptxas", "-v", *codes, "-o", str(target)]
        command = [nvcc, *options, str(build.CSRC / "cuda" / "sm80" / f"kernels_{precision}.cu")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout, target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {precision: pool.submit(run, precision) for precision in INSTRUCTIONS}
    return lambda precision: results[precision].result()


@pytest.mark.parametrize("precision", INSTRUCTIONS)
def test_no_spills(compiled: Callable[[str], tuple[str, Path]], precision: str) -> None:
    report, _ = compiled(precision)
    seen = set()
    for part in report.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", part).groups())
        assert max(stack, stores, loads) <= (MAX_SPILL if architecture == NEWER else 0), part
        seen.add((architecture, *kernel(symbol)))
    assert seen == {(architecture, *config) for architecture in architectures() for config in KERNELS}
    assert "warning" not in report


@pytest.mark.parametrize("precision", INSTRUCTIONS)
def test_tensor_cores_and_asynchronous_copies(compiled: Callable[[str], tuple[str, Path]], precision: str) -> None:
    if (disassembler := tool("cuobjdump")) is None or tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    _, target = compiled(precision)
    done = subprocess.run([disassembler, "-sass", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = done.stdout.split("Function : ")[1:]
    assert len(functions) == len(architectures()) * len(KERNELS)
    for function in functions:
        _, channels = kernel(function.split("\n", 1)[0])
        words = set(re.findall(r"\s([A-Z][\w.]+)", function))
        of_features, of_K = INSTRUCTIONS[precision]
        assert of_features in words and (of_K in words or not channels)
        assert "LDGSTS.E.BYPASS.128.ZFILL" in words  # 16 bytes at a time
        assert any(word.startswith("LDSM") for word in words) or precision.startswith("tf32")
        # no generic loads and stores, which the compiler emits if it cannot infer the address space
        assert not [word for word in words if re.fullmatch(r"(LD|ST)(\..*)?", word)]
