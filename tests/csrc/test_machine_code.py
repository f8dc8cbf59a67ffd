"""The machine code of the CUDA kernels: no register spills, and the expected instructions. Needs no GPU.

The code is that of the installed extension. For architectures that it lacks, a few sources are compiled here.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter

import pytest
from compile_once import compile_once
from compiled_kernels import Kernel, extension_with_cuda, kernels_in

from bench.machine_code import tool
from srpkd.kernels import build

NEWER = ("sm_100", "sm_120")
OTHERS = ("sm_80", *NEWER)  # if nvcc supports them, and the extension has none for them
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
    "Moments": 2, "FinishMoments": 2, "RowNorms": 4, "PixelNorms": 2, "WeightedMoment": 4, "FinishWeightedMoment": 2,
    "Gradient": 8, "Backward": 2, "together": 6,
}  # fmt: skip
CLOSED_FORM = {
    "Moments": 8, "SumMoments": 4, "RowScales": 2, "ScaledMoments": 4, "Gradient": 8, "PixelNorms": 2, "together": 4
}  # fmt: skip
ELEMENTS = ("bf16", "fp16", "float")
WITHOUT_PRODUCTS = ("FinishMoments", "FinishWeightedMoment", "PixelNorms", "SumMoments", "Backward")
# they read only what earlier kernels of the call have written
WITHOUT_INPUTS = ("FinishMoments", "FinishWeightedMoment", "SumMoments")
ONLY_INPUTS = ("PixelNorms", "Backward")
GLOBAL_MEMORY = re.compile(r"(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMALDG)\b")

pytestmark = pytest.mark.slow


def built(source: str) -> tuple[Kernel, ...]:
    """Return the kernels of a source in csrc/cuda in the installed extension."""
    return kernels_in(extension_with_cuda(), source)


def architectures(kernels: tuple[Kernel, ...]) -> set[str]:
    return {kernel.architecture for kernel in kernels}


def check_code(kernels: tuple[Kernel, ...]) -> None:
    """No kernel spills, or has generic loads and stores, which come from unknown address spaces."""
    assert kernels
    for kernel in kernels:
        assert kernel.stack <= (MAX_SPILL if kernel.architecture in NEWER else 0), kernel.symbol
        generic = [word for word in kernel.words if re.fullmatch(r"(LD|ST)(\..*)?", word)]
        # the barrier of the grid waits for a counter
        assert set(generic) <= ({"LD.E.STRONG.GPU"} if "run_together" in kernel.symbol else set()), kernel.symbol


def tile_config(symbol: str, rectified: bool) -> tuple[int, int]:
    """Return whether the pixels of a kernel of the tiles are adjacent (0 or 1), and its channels of U."""
    match = FUNCTION.search(symbol)
    assert match, symbol
    assert bool(int(match[3])) == rectified
    return int(match[1]), int(match[2])


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.get)
every_precision = pytest.mark.parametrize("precision", INSTRUCTIONS)


@every_variant
@every_precision
@pytest.mark.core(2)
def test_tiles(precision: str, variant: str) -> None:
    found = built(f"sm80_{precision}{variant}")
    check_code(found)
    seen = [(kernel.architecture, *tile_config(kernel.symbol, bool(variant))) for kernel in found]
    assert sorted(seen) == sorted((name, *config) for name in architectures(found) for config in KERNELS)
    for kernel in found:
        _, channels = tile_config(kernel.symbol, bool(variant))
        of_features, of_K = INSTRUCTIONS[precision]
        assert of_features in kernel.words and (of_K in kernel.words or not channels)
        assert "LDGSTS.E.BYPASS.128.ZFILL" in kernel.words  # 16 bytes at a time
        assert any(word.startswith("LDSM") for word in kernel.words) or precision.startswith("tf32")
        check_order(kernel)


def algebra_kernel(symbol: str) -> str:
    """Return the name of a kernel in csrc/cuda/algebra or csrc/cuda/closed_form; "together" for several in one."""
    match = re.search(
        r"algebra(?:3runI(?:NS1_|NS0_11closed_form)\d+([A-Z][A-Za-z]+?)(?:I|E)|12run_(together)I)", symbol
    )
    assert match, symbol
    return match[1] or match[2]


def check_order(kernel: Kernel) -> None:
    """Since Hopper, kernels wait for earlier ones before they access global memory, see csrc/cuda/overlap.cuh.

    Cooperative launches start when all before them have ended.
    """
    order = [word for word in kernel.words if word in ("ACQBULK", "PREEXIT") or GLOBAL_MEMORY.match(word)]
    if kernel.architecture.startswith("sm_8") or "run_together" in kernel.symbol:
        assert "ACQBULK" not in order and "PREEXIT" not in order, kernel.symbol
    else:
        assert order[0] == "ACQBULK", kernel.symbol
        assert order.count("ACQBULK") == order.count("PREEXIT") == 1, kernel.symbol


def check_loads(kernel: Kernel) -> None:
    """Loads of results are not those for memory that never changes; the emulation tells which loads are of results."""
    loads = [".CONSTANT" in word for word in kernel.words if word.startswith("LDG.")]
    if (name := algebra_kernel(kernel.symbol)) in WITHOUT_INPUTS:
        assert not any(loads), kernel.symbol
    elif name in ONLY_INPUTS:
        assert all(loads), kernel.symbol
    else:
        assert any(loads), kernel.symbol


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("folder", ["algebra", "closed_form"])
@pytest.mark.core(2)
def test_algebra(folder: str, element: str) -> None:
    found = built(f"{folder}_{element}")
    check_code(found)
    counts = Counter((algebra_kernel(kernel.symbol), kernel.architecture) for kernel in found)
    expected = ALGEBRA if folder == "algebra" else CLOSED_FORM
    assert counts == {(name, arch): count for name, count in expected.items() for arch in architectures(found)}
    for kernel in found:
        with_products = algebra_kernel(kernel.symbol) not in WITHOUT_PRODUCTS
        assert any(word.startswith("HMMA.16816.F32") for word in kernel.words) == with_products, kernel.symbol
        assert any(word.startswith("LDSM") for word in kernel.words) == with_products, kernel.symbol
        assert "LDG.E.128.CONSTANT" in kernel.words or not with_products, kernel.symbol  # 16 bytes at a time
        check_order(kernel)
        check_loads(kernel)


@pytest.mark.parametrize(
    "source", ["sm80/sm80_tf32x3", pytest.param("algebra/algebra_bf16", marks=pytest.mark.core(0))]
)
def test_other_gpus(tmp_path_factory: pytest.TempPathFactory, source: str) -> None:
    """Kernels compile without warnings, the tiles with most registers among them, and those of newer GPUs wait."""
    if (nvcc := tool("nvcc")) is None:
        pytest.skip("nvcc is not installed")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    compiled = architectures(built(source.rpartition("/")[2]))
    if not (names := [name for name in OTHERS if name in listed and name not in compiled]):
        pytest.skip(f"nvcc does not know {' and '.join(OTHERS)}, or the extension has their code")
    codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in names]
    options = ["-std=c++17", *build.NVCC_FLAGS, "-fatbin", *codes]
    report, target = compile_once(tmp_path_factory, [nvcc, *options, build.CSRC / "cuda" / f"{source}.cu"], ".fatbin")
    assert "warning" not in report
    found = kernels_in(target, "")
    check_code(found)
    assert architectures(found) == set(names)
    for kernel in found:
        check_order(kernel)
