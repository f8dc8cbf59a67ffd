"""``native`` on the CPU: long and empty sums, numbers below the normal range, and the products of other libraries."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compile_once import compile_once
from helpers import error, features, value_and_gradient
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from srpkd.kernels import Relation, native


@pytest.fixture(autouse=True)
def _built(one_thread: None) -> None:
    if (reason := native.unavailable_reason(torch.device("cpu"))) is not None:
        pytest.skip(f"native: {reason}")
    native.extension()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_error_of_long_sums(dtype: torch.dtype) -> None:
    """A kernel that adds all terms of a product one after the other has 4 to 5 times the error of eager PyTorch."""
    relation = Relation("none", "l2")
    student, teacher = features(None, batch=1, pixels=66, channels=(1023, 1023), dtype=dtype)
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")[1]
    eager = value_and_gradient(student.float(), teacher.float(), relation, "reference")[1]
    sums = torch.ops.srpkd.relation_tiles(student, teacher, None, None, "none", "l2", 1.0, False, True)
    assert error(sums[1] / 66**2, exact) <= 3 * error(eager, exact)
    if dtype == torch.float32:
        assert error(value_and_gradient(student, teacher, relation, "native")[1], exact) <= 3 * error(eager, exact)


@pytest.mark.parametrize("pixels", [300, 1100])
@pytest.mark.parametrize("strides", ["by pixel", "by channel", "every second channel"])
def test_norms_of_float16_numbers_are_not_biased(strides: str, pixels: int) -> None:
    """The last digits of squares are not random: in float sums over channels, rounding errors add up to 3e-7."""
    torch.manual_seed(0)
    student, teacher = ((torch.randn(1, pixels, channels) + 10).half() for channels in (3, 65))
    expected = value_and_gradient(student.double(), teacher.double(), Relation("cosine", "l1"), "reference")[0]
    if strides == "by channel":
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    elif strides == "every second channel":
        student, teacher = (x.repeat_interleave(2, 2)[:, :, ::2] for x in (student, teacher))
    loss = value_and_gradient(student, teacher, Relation("cosine", "l1"), "native")[0]
    assert error(loss, expected) <= 3e-6  # about 1e-7 / the mean of D


@pytest.mark.parametrize("shape", [(0, 9, 3), (2, 0, 3), (2, 9, 0)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_empty_features_in_tiles(shape: tuple[int, int, int], swapped: bool) -> None:
    student, teacher = torch.ones(shape), torch.ones(*shape[:2], 4)
    if swapped:
        student, teacher = teacher, student
    results = [torch.ops.srpkd.relation_tiles(student, teacher, None, None, "none", "l1", 1.0, False, True)]
    if shape[0] and shape[1]:
        pixels = [student, teacher]
        results.append(torch.ops.srpkd.remote_tiles(pixels, pixels, "none", "l1", 1.0, False, True))
    for loss, U, _ in results:
        assert torch.equal(loss, torch.zeros(shape[0], dtype=torch.float64))
        assert torch.equal(U, torch.zeros_like(student))
    columns = torch.zeros(shape[0], 1, 1, dtype=torch.int64)
    loss, gradient = torch.ops.srpkd.sampled_loss(student, teacher, columns, *Relation().arguments, True)
    assert torch.equal(loss, torch.zeros(shape[0]))
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [torch.ones(1, 4, 3)]}, "expected 2 tensors of the rows with normalize"),
        ({"columns": [torch.ones(1, 4, 5)] * 2}, "differ in their pixels only"),
    ],
    ids=["a missing tensor", "other channels"],
)
def test_wrong_arguments_of_remote_tiles(change: dict, message: str) -> None:
    pixels = [torch.ones(1, 4, 3), torch.ones(1, 4, 5)]
    arguments = {"rows": pixels, "columns": pixels} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.srpkd.remote_tiles(*arguments.values(), "none", "l1", 1.0, False, True)


def test_memory_of_many_channels() -> None:
    """The row norms sum moments of ranges of pixels, each with channels^2 elements."""
    student, teacher = torch.randn(1, 1100, 1500), torch.randn(1, 1100, 4)
    arguments = (student, teacher, "row", "l1", 1.0, 1e-12, False, False, "none", "tiles", False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.ops.srpkd.relation_loss_forward(*arguments)
    total = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < total < 12 * student.nbytes


def test_all_threads_flush_numbers_as_the_caller_does() -> None:
    """Otherwise results depend on which thread claims a tile."""
    student, teacher = (x * 1e-20 for x in features(None, batch=1, pixels=600, dtype=torch.float32))

    def gradient() -> Tensor:
        return torch.ops.srpkd.relation_tiles(student, teacher, None, None, "none", "l1", 1.0, False, True, 16)[1]

    torch.set_num_threads(2)
    assert gradient().count_nonzero() > 0  # products of features are about 1e-40; starts the second thread
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush numbers below the normal range to 0")
    try:
        results = [gradient() for _ in range(5)]
    finally:
        torch.set_flush_denormal(False)
    assert all(result.count_nonzero() == 0 for result in results)


def test_calls_from_several_threads_of_python() -> None:
    """Each thread has its own compiled microkernels, and its own threads of OpenMP."""

    def call(pixels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(pixels)
        student, teacher = (torch.randn(2, pixels, channels, generator=generator).to(dtype) for channels in (24, 40))
        return value_and_gradient(student, teacher, Relation("row", "l1"), "native")

    cases = list(itertools.product([40, 700, 1100], [torch.float32, torch.bfloat16]))
    expected = [call(*case) for case in cases]
    with ThreadPoolExecutor(6, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        actual = list(pool.map(call, *zip(*cases * 4, strict=True)))
    for ours, theirs in zip(actual, expected * 4, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# A product that rounds floats to bfloat16, as PyTorch's does on some processors at a lower precision.
ROUNDING_PRODUCT = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>

namespace at::cpu {
__attribute__((visibility("default")))
Tensor& addmm_out(Tensor& out, const Tensor& self, const Tensor& left, const Tensor& right, const Scalar& beta,
                  const Scalar& alpha) {
  const auto rounded = [](const Tensor& x) { return x.scalar_type() == kFloat ? x.to(kBFloat16).to(kFloat) : x; };
  return at::addmm_out(out, self, rounded(left), rounded(right), beta, alpha);
}
}  // namespace at::cpu
"""
LOSSES = """
import ctypes, json, sys, torch
rounding_product, library, features = sys.argv[1:]
if rounding_product:
    ctypes.CDLL(rounding_product, ctypes.RTLD_GLOBAL)
torch.ops.load_library(library)
student, teacher = torch.load(features)
losses = {}
for dtype in (torch.float32, torch.bfloat16):
    arguments = (student.to(dtype), teacher.to(dtype), "row", "l1", 1.0, 1e-12, False, False, "none", "tiles", False)
    losses[str(dtype)] = torch.ops.srpkd.relation_loss_forward(*arguments)[0].item()
print(json.dumps(losses))
"""


@pytest.mark.slow
@pytest.mark.core(0)
def test_row_norms_where_products_round_floats(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without microkernels and a visible BLAS, products are those of ATen, whose precision the user may lower."""
    library = Path(native.extension().__file__).read_bytes()
    if b"\0sgemm_\0" not in library or sys.platform != "linux":
        pytest.skip("the extension does not name its BLAS")
    hidden = tmp_path / "hidden.so"
    hidden.write_bytes(library.replace(b"\0sgemm_\0", b"\0hidden\0").replace(b"\0dgemm_\0", b"\0hidden\0"))
    source = tmp_path_factory.getbasetemp() / "rounding_product.cpp"
    source.write_text(ROUNDING_PRODUCT)
    folders = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    command = ["c++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", *folders, source, "-ltorch_cpu", "-lc10"]
    _, rounding_product = compile_once(tmp_path_factory, command, ".so")
    torch.manual_seed(0)
    pair = [torch.randint(-3, 8, (1, 1100, channels)).float() for channels in (24, 40)]  # their products are exact
    torch.save(pair, tmp_path / "features.pt")
    expected = value_and_gradient(*(x.double() for x in pair), Relation("row", "l1"), "reference")[0].item()
    for rounded in ("", str(rounding_product)):
        done = subprocess.run(
            [sys.executable, "-c", LOSSES, rounded, str(hidden), str(tmp_path / "features.pt")],
            env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for dtype, loss in json.loads(done.stdout).items():
            assert loss == pytest.approx(expected, rel=1e-6), (dtype, rounded)
