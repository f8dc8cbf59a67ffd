"""The CUDA kernels, compiled without a GPU: no register spills, and the expected instructions in the machine code."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compile_once import compile_once

from bench.machine_code import tool
from srpkd.kernels import build

ARCHITECTURES = ("sm_80", "sm_90a")
NEWER = ("sm_100", "sm_120")  # tested too if nvcc supports them
MAX_SPILL = 16  # bytes per thread for NEWER, whose kernels need three registers more than the 255; 0 for the others
# the instructions that multiply features (k = 16 for 16 bits, k = 8 for tf32), and K
INSTRUCTIONS = {
    "bf16": ("HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"),
    "fp16": ("HMMA.16816.F32", "HMMA.1688.F32.TF32"),
    "tf32": ("HMMA.1688.F32.TF32",) * 2,
    "tf32x3": ("HMMA.1688.F32.TF32",) * 2,
}
VARIANTS = {"": "default", "_rectified": "rectified"}  # files of the sm80 kernels
KERNELS = {(adjacent, channels) for adjacent in (0, 1) for channels in (0, 64, 128)}  # of one precision
FUNCTION = re.compile(r"ConfigILNS0_9PrecisionE\dELb(\d)ELi(\d+)ELb(\d)")
# of the kernels around the tiles, for one element type: how many, and which of them multiply on tensor cores. Those
# after the tiles exist for the sums of the sm_80 and of the sm_90 tiles
ALGEBRA = {
    "Moments": 2, "FinishMoments": 1, "RowNorms": 4, "PixelNorms": 2, "WeightedMoment": 4, "Gradient": 8, "Backward": 2
}  # fmt: skip
CLOSED_FORM = {
    "Moments": 8, "SumMoments": 2, "RowScales": 2, "ScaledMoments": 4, "Gradient": 8, "PixelNorms": 2
}  # fmt: skip
ELEMENTS = ("bf16", "fp16", "float")
WITHOUT_PRODUCTS = ("FinishMoments", "PixelNorms", "SumMoments", "Backward")
WITHOUT_INPUTS = ("FinishMoments", "SumMoments")  # they read only what earlier kernels of the call have written
ONLY_INPUTS = ("PixelNorms", "Backward")
GLOBAL_MEMORY = re.compile(r"(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG)\b")

pytestmark = pytest.mark.slow


@functools.cache
def architectures(rectified: bool = False) -> tuple[str, ...]:
    """Return the architectures to compile for; fewer for rectified tiles, which have only a few instructions more."""
    if rectified:
        return ARCHITECTURES
    listed = subprocess.run([tool("nvcc"), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return (*ARCHITECTURES, *(name for name in NEWER if name in listed))


def kernel(symbol: str, rectified: bool) -> tuple[int, int]:
    """Return whether a kernel's pixels are adjacent (0 or 1), and its channels of U."""
    match = FUNCTION.search(symbol)
    assert match, symbol
    assert bool(int(match[3])) == rectified
    return int(match[1]), int(match[2])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """Return a function: source in csrc/cuda -> the report of ptxas and the path of the binary. Compile in parallel."""
    if (nvcc := tool("nvcc")) is None:
        pytest.skip("nvcc is not installed")

    def run(source: str) -> tuple[str, Path]:
        names = architectures("rectified" in source)
        codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in names]
        options = ["-std=c++17", *build.NVCC_FLAGS, "-fatbin", "-Xptxas", "-v", *codes]
        return compile_once(tmp_path_factory, [nvcc, *options, build.CSRC / "cuda" / source], ".fatbin")

    sources = [f"sm80/sm80_{precision}{variant}.cu" for variant in VARIANTS for precision in INSTRUCTIONS]
    sources += [f"{folder}/{folder}_{element}.cu" for folder in ("algebra", "closed_form") for element in ELEMENTS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {source: pool.submit(run, source) for source in sources}
    return lambda source: results[source].result()


def entries(report: str) -> Iterator[tuple[str, str]]:
    """Yield (mangled name, architecture) of the kernels in a report of ptxas, none of which may spill registers."""
    assert "warning" not in report
    for part in report.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", part).groups())
        assert max(stack, stores, loads) <= (MAX_SPILL if architecture in NEWER else 0), part
        yield symbol, architecture


@functools.cache  # disassembling takes seconds
def functions(target: Path) -> list[tuple[str, str, list[str]]]:
    """Return (mangled name, architecture, instructions) of the kernels in a binary."""
    if (disassembler := tool("cuobjdump")) is None or tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    done = subprocess.run([disassembler, "-sass", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    architecture, found = "", []
    for part in re.split(r"(?=code for sm_|Function : )", done.stdout):
        if match := re.match(r"code for (sm_\w+)", part):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", part):
            words = [*map(sys.intern, re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", part))]
            # no generic loads and stores, which the compiler emits if it cannot infer the address space
            assert not [word for word in words if re.fullmatch(r"(LD|ST)(\..*)?", word)]
            found.append((match[1], architecture, words))
    return found


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.get)
every_precision = pytest.mark.parametrize("precision", INSTRUCTIONS)


@every_variant
@every_precision
def test_tiles_do_not_spill(compiled: Callable[[str], tuple[str, Path]], precision: str, variant: str) -> None:
    report, _ = compiled(f"sm80/sm80_{precision}{variant}.cu")
    seen = {(architecture, *kernel(symbol, bool(variant))) for symbol, architecture in entries(report)}
    assert seen == {(architecture, *config) for architecture in architectures(bool(variant)) for config in KERNELS}


@every_variant
@every_precision
def test_tensor_cores_and_asynchronous_copies(
    compiled: Callable[[str], tuple[str, Path]], precision: str, variant: str
) -> None:
    _, target = compiled(f"sm80/sm80_{precision}{variant}.cu")
    found = functions(target)
    assert len(found) == len(architectures(bool(variant))) * len(KERNELS)
    for symbol, _, words in found:
        _, channels = kernel(symbol, bool(variant))
        of_features, of_K = INSTRUCTIONS[precision]
        assert of_features in words and (of_K in words or not channels)
        assert "LDGSTS.E.BYPASS.128.ZFILL" in words  # 16 bytes at a time
        assert any(word.startswith("LDSM") for word in words) or precision.startswith("tf32")


def algebra_kernel(symbol: str) -> str:
    """Return the name of a kernel in csrc/cuda/algebra or csrc/cuda/closed_form."""
    match = re.search(r"algebra3runI(?:NS1_|NS0_11closed_form)\d+([A-Z][A-Za-z]+?)(?:I|E)", symbol)
    assert match, symbol
    return match[1]


every_element = pytest.mark.parametrize("element", ELEMENTS)
every_folder = pytest.mark.parametrize("folder", ["algebra", "closed_form"])


@every_element
@every_folder
def test_algebra_does_not_spill(compiled: Callable[[str], tuple[str, Path]], folder: str, element: str) -> None:
    report, _ = compiled(f"{folder}/{folder}_{element}.cu")
    found = Counter((algebra_kernel(symbol), architecture) for symbol, architecture in entries(report))
    expected = ALGEBRA if folder == "algebra" else CLOSED_FORM
    assert found == {(name, arch): count for name, count in expected.items() for arch in architectures()}


@every_element
@every_folder
def test_algebra_multiplies_on_tensor_cores(
    compiled: Callable[[str], tuple[str, Path]], folder: str, element: str
) -> None:
    _, target = compiled(f"{folder}/{folder}_{element}.cu")
    for symbol, _, words in functions(target):
        with_products = algebra_kernel(symbol) not in WITHOUT_PRODUCTS
        assert any(word.startswith("HMMA.16816.F32") for word in words) == with_products, symbol
        assert any(word.startswith("LDSM") for word in words) == with_products, symbol
        assert "LDG.E.128.CONSTANT" in words or not with_products, symbol  # 16 bytes at a time


def check_order(target: Path) -> None:
    """Since Hopper, kernels wait for earlier ones before they access global memory, see csrc/cuda/overlap.cuh."""
    for symbol, architecture, words in functions(target):
        order = [word for word in words if word in ("ACQBULK", "PREEXIT") or GLOBAL_MEMORY.match(word)]
        if architecture == "sm_80":
            assert "ACQBULK" not in order and "PREEXIT" not in order, symbol
        else:
            assert order[0] == "ACQBULK", symbol
            assert order.count("ACQBULK") == order.count("PREEXIT") == 1, symbol


@every_variant
@every_precision
def test_tiles_wait_for_earlier_kernels(
    compiled: Callable[[str], tuple[str, Path]], precision: str, variant: str
) -> None:
    check_order(compiled(f"sm80/sm80_{precision}{variant}.cu")[1])


@every_element
@every_folder
def test_algebra_waits_for_earlier_kernels(
    compiled: Callable[[str], tuple[str, Path]], folder: str, element: str
) -> None:
    """Loads of results are not those for memory that never changes; the emulation tells which loads are of results."""
    _, target = compiled(f"{folder}/{folder}_{element}.cu")
    check_order(target)
    for symbol, _, words in functions(target):
        loads = [".CONSTANT" in word for word in words if word.startswith("LDG.")]
        if (name := algebra_kernel(symbol)) in WITHOUT_INPUTS:
            assert not any(loads), symbol
        elif name in ONLY_INPUTS:
            assert all(loads), symbol
        else:
            assert any(loads), symbol
