"""The emulation of sm_90a: wgmma in every layout, and a pipeline with mistakes that the emulation must report.

Where there is a Hopper GPU, the same kernels must give the same results there.

The layouts are those that were confirmed on an H100: with the 128-byte swizzle, a k-major operand has a stride of 1024
bytes between groups of eight rows, and the next 16 values of k are 32 bytes further; an operand of the other major has
a stride of 1024 bytes between groups of eight values of k, and the next 64 rows are `leading` bytes further, which is
the size of a panel.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulated_kernels import pointer
from torch import Tensor

from srpkd.kernels import build

K_MAJOR, MN_MAJOR, IN_REGISTERS = 0, 1, -1
BLOCK = 128  # pixels
# in the order of enum Fault in hopper_kernels.cuh, with what the emulation reports; None: the results are wrong
FAULTS = {
    "none": "",
    "no_proxy_fence": "without fence_async_proxy()",
    "no_full_wait": "shared memory read",
    "early_release": "written without a barrier after it was read",
    "too_many_bytes": "16 bytes missing",
    "too_few_bytes": "",  # any of several
    "wrong_parity": "",  # any of several
    "early_turn": "without a barrier after it was written",
    "no_barrier_fence": "without fence_barrier_initialization()",
    "no_wait_for_products": None,
    "no_hold": None,
    "no_register_fence": "without fence_registers()",
    "operand_overwritten": "registers of an operand were written",
    "no_warp_sync": "read without a barrier after it was written",
    "no_wait_for_K": "written without a barrier after it was read",
    "staging_overwritten": "written without a barrier after it was read, at",
    "no_staging_barrier": "shared memory read",
    "no_staging_fence": "without fence_async_proxy()",
    "early_order": "bulk copy: global memory written without an order after it was written",
    "no_order": "bulk copy: global memory written without an order after it was written",
    "waits_for_later_block": "have not started",
    "no_acquire_fence": "without fence_async_proxy_global()",
    "register_deadlock": "registers, of which",
    "missing_arrival": "named barrier 1, at which 96 of 128 threads have arrived",
}
SEEDS = range(1, 10)  # every order of the warps with every delay of asynchronous work


def with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    library.product.restype = library.pipeline.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return with_types(compile_emulation("hopper_library.cpp", optimization="-O2"))


def compile_for_gpu(target: Path) -> str:
    """Compile the kernels for sm_90a and return the report of ptxas."""
    if (home := build.cuda_home()) is None:
        pytest.skip("nvcc is not installed")
    source = Path(__file__).parent / "cuda_emulation" / "hopper_gpu.cu"
    options = ["-std=c++17", *build.NVCC_FLAGS, "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a"]
    command = [home / "bin" / "nvcc", *options, "-shared", "-Xcompiler", "-fPIC", "-o", target, source]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session", params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Return the library whose kernels run on the host, or the one whose kernels run on the GPU."""
    if request.param == "emulation":
        return request.getfixturevalue("library")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU does not have compute capability 9.0")
    target = tmp_path_factory.mktemp("hopper") / "library.so"
    compile_for_gpu(target)
    return with_types(ctypes.CDLL(str(target)))


@pytest.mark.slow
@pytest.mark.core(0)
def test_device_code(tmp_path: Path) -> None:
    """The kernels compile for sm_90a without spills, and ptxas keeps their products asynchronous."""
    report = compile_for_gpu(tmp_path / "library.so")
    assert report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 3
    assert "warning" not in report and "serialized" not in report


# --- one product ------------------------------------------------------------------------------------------------------


class Operand(NamedTuple):
    major: int
    leading: int
    stride: int
    step: int  # bytes to the next 16 values of k


def layout(major: int, lines: int) -> Operand:
    """Return the layout of an operand whose panels of 64 elements have this number of lines of 128 bytes."""
    return Operand(major, 128 * lines, 1024, 2048) if major == MN_MAJOR else Operand(major, 16, 1024, 32)


def multiply(
    library: ctypes.CDLL, a: Tensor, b: Tensor, left: Operand, right: Operand, tma: bool, seed: int
) -> tuple[str, Tensor]:
    """Return the error message of the emulation and a (64, k) times b (k, n), computed by one warpgroup."""
    n = b.shape[1]
    stored = a.T.contiguous() if left.major == MN_MAJOR else a, b if right.major == MN_MAJOR else b.T.contiguous()
    result = torch.full((64, n), torch.nan)
    message = library.product(
        a.dtype == torch.float16, pointer(stored[0]), pointer(stored[1]), pointer(result),
        (ctypes.c_int * 8)(*left, *right), a.shape[1], n, tma, ctypes.c_uint64(seed),
    )  # fmt: skip
    return message.decode(), result


def operands(dtype: torch.dtype, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrices of small integers, and their exact product."""
    a, b = torch.randint(-4, 5, (64, k)).to(dtype), torch.randint(-4, 5, (k, n)).to(dtype)
    return a, b, a.float() @ b.float()


@pytest.mark.parametrize("tma", [False, True], ids=["stores", "tma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("right", [K_MAJOR, MN_MAJOR], ids=["k", "mn"])
@pytest.mark.parametrize("left", [IN_REGISTERS, K_MAJOR, MN_MAJOR], ids=["registers", "k", "mn"])
@pytest.mark.core(8)
def test_products_in_every_layout(machine: ctypes.CDLL, left: int, right: int, dtype: torch.dtype, tma: bool) -> None:
    for k, n, seed in itertools.product((64, 128), (64, 128), (0, 1)):
        a, b, expected = operands(dtype, k, n)
        message, result = multiply(machine, a, b, layout(left, k), layout(right, k), tma, seed)
        assert message == ""
        assert torch.equal(result, expected)


@pytest.mark.parametrize("field", ["leading", "stride", "step"])
@pytest.mark.parametrize("major", [K_MAJOR, MN_MAJOR], ids=["k", "mn"])
def test_wrong_descriptors_are_noticed(library: ctypes.CDLL, major: int, field: str) -> None:
    """Products are wrong or addresses invalid; only the leading offset of a k-major operand has no effect."""
    a, b, expected = operands(torch.bfloat16, 128, 128)
    right = layout(major, 128)
    message, result = multiply(
        library, a, b, layout(K_MAJOR, 128), right._replace(**{field: getattr(right, field) // 2}), False, 0
    )
    assert (message == "" and torch.equal(result, expected)) == (field == "leading" and major == K_MAJOR)


# --- a pipeline -------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    message: str
    rows: Tensor  # (tiles, 128, 64)
    columns: Tensor
    trace: Tensor


def run(library: ctypes.CDLL, features: Tensor, fault: str = "none", resident: int = 2, seed: int = 0) -> Result:
    """Run the pipeline of hopper_kernels.cuh on features (C, N)."""
    channels, pixels = features.shape
    tiles = -(-pixels // BLOCK)
    rows, columns = torch.full((tiles, BLOCK, 64), torch.nan), torch.zeros(tiles, 2, 8, 4, 8, 4, 2, 2)
    additions, trace = torch.zeros(tiles, dtype=torch.int32), torch.zeros(tiles)
    message = library.pipeline(
        pointer(features), ctypes.c_int64(2 * features.numel()), pointer(rows), pointer(columns), pointer(additions),
        pointer(trace), tiles, pixels, channels, resident, list(FAULTS).index(fault), ctypes.c_uint64(seed),
    )  # fmt: skip
    # halves, groups of 8 pixels, warps, lane // 4, lane % 4, and the registers: 8 channels apart, adjacent pixels
    columns = columns.permute(0, 1, 2, 5, 7, 3, 6, 4).reshape(tiles, BLOCK, 64)
    return Result(message.decode(), rows, columns, trace)


def expected_sums(features: Tensor) -> Tensor:
    channels, pixels = features.shape
    tiles = -(-pixels // BLOCK)
    q = torch.zeros(64, tiles * BLOCK, dtype=torch.float64)
    q[:channels, :pixels] = features.double()
    K = (q.T @ q).to(torch.bfloat16).double()
    return (K @ q.T).view(tiles, BLOCK, 64)


def integers(channels: int, pixels: int) -> Tensor:
    """Return features of which every sum is exact, in any order."""
    return torch.randint(-2, 3, (channels, pixels)).to(torch.bfloat16)


def is_right(result: Result, expected: Tensor) -> bool:
    trace = 0
    for turn in range(2 * len(expected)):
        trace = 3 * trace + turn % 2 + 1
    sums = torch.equal(result.rows.double(), expected) and torch.equal(result.columns.double(), expected)
    return sums and bool((result.trace == trace).all())


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_pipeline(machine: ctypes.CDLL, seed: int) -> None:
    """Results are right in any order of execution, whether or not all blocks are resident."""
    features = integers(64, 3 * BLOCK)
    result = run(machine, features, resident=1 + seed % 3, seed=seed)
    assert result.message == ""
    assert is_right(result, expected_sums(features))


@pytest.mark.parametrize("shape", [(8, 200), (40, 264), (64, 8)], ids=str)
def test_loads_outside_a_tensor_are_zero(machine: ctypes.CDLL, shape: tuple[int, int]) -> None:
    features = integers(*shape)
    result = run(machine, features, seed=3)
    assert result.message == ""
    assert is_right(result, expected_sums(features))


def test_maps_that_tma_does_not_support(library: ctypes.CDLL) -> None:
    assert "a stride is not a positive multiple of 16 bytes" in run(library, integers(64, 100)).message
    assert "not a multiple of 16 bytes" in run(library, integers(65, 128).flatten()[1:-127].view(64, 128)).message


def test_ordered_additions_are_deterministic(machine: ctypes.CDLL) -> None:
    features = torch.randn(64, 3 * BLOCK).to(torch.bfloat16)
    results = [run(machine, features, resident=1 + seed % 3, seed=seed) for seed in range(8)]
    assert all(torch.equal(result.columns, results[0].columns) for result in results)
    expected = expected_sums(features)
    assert (results[0].columns - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
@pytest.mark.core(8)
def test_mistakes_are_detected(library: ctypes.CDLL, fault: str) -> None:
    """Each mistake is reported, or makes the results wrong, for every schedule."""
    features = integers(64, 3 * BLOCK)
    expected = expected_sums(features)
    messages = []
    for seed in SEEDS:
        # a block that waits for a later one needs it to be resident
        resident = 2 if fault == "waits_for_later_block" else 1 + seed % 3
        result = run(library, features, fault, resident, seed)
        assert result.message or not is_right(result, expected)
        messages.append(result.message)
    if FAULTS[fault] is None:
        assert not any(messages)
    else:
        assert all(messages) and any(FAULTS[fault] in message for message in messages)
