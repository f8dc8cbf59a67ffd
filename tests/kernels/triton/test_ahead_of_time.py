"""The Triton backend without a GPU and without the interpreter: compilation ahead of time, and configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from srpkd.kernels import Relation, auto_backend, dispatch, native, unavailable_reason
from srpkd.kernels.triton import configurations, tiles
from srpkd.kernels.triton.configurations import ANY, MAX_SPILLED, TABLE, Configuration, autotune, configuration

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

from srpkd.kernels import triton
from srpkd.kernels.triton.compiler_report import (
    ALGEBRA,
    CAPABILITIES,
    SHARED_LIMIT,
    Case,
    cases,
    compile_case,
    variants,
)

TRITON = tuple(map(int, configurations.triton.__version__.split(".")[:2]))
ROW_L1 = Relation("row", "l1")
CASES = [case for capability in CAPABILITIES for case in cases(capability)] + list(variants((9, 0)))
INSTRUCTION = {(8, 0): "mma.sync", (8, 6): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}


def name(case: Case) -> str:
    """Return the test id of a case."""
    return " ".join(["sm_{}{}".format(*case.capability), *str(case).split()])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.core(12)
def test_compiled_ahead_of_time(case):
    """Kernels spill few registers, fit into shared memory, and use the matrix instructions of the architecture."""
    report = compile_case(case)
    assert report.shared <= SHARED_LIMIT[case.capability]
    # with Triton 3.6, the exact norms of float32 spill 96 bytes on sm_80 and 72 on sm_86; from 3.9 on, moments of
    # features of which neither channels nor pixels are adjacent spill 320 on sm_90
    exact_norms = case.kernel == "scale" and case.numbers == "highest"
    apart = TRITON >= (3, 9) and case.kernel == "moment" and case.layout == "odd"
    assert report.spilled <= (96 if exact_norms else 320 if apart else MAX_SPILLED)
    multiplies = case.kernel in ("relation", "closed_moments", "closed_scales", "closed_gradient") or (
        case.kernel in ALGEBRA and case.kernel not in ("terms", "loss", "backward") and case.relation.normalize == "row"
    )
    assert list(report.instructions) == ([INSTRUCTION[case.capability]] if multiplies else [])


# -- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", TABLE.values(), ids=map(" ".join, TABLE))
def test_every_row_of_the_table_can_be_chosen(rows):
    assert rows[-1][:2] == (ANY, ANY)
    for one, other in pairwise(rows):
        assert one[0] < other[0] or one[1] < other[1]
    chosen = [Configuration(block_m, block_n, 64, 64, warps, stages) for _, _, block_m, block_n, warps, stages in rows]
    for each in [candidate for row in chosen for candidate in configurations.candidates(row)]:
        assert each.block_m % each.block_n == 0  # no tile is partly inside the diagonal block
        assert each.block_m * each.block_n // (32 * each.warps) <= 32


def test_configurations():
    chosen = configuration((9, 0), "bfloat16", 64, 256)
    assert chosen == Configuration(block_m=128, block_n=64, block_s=64, block_t=256, warps=8, stages=3)
    assert configuration((10, 0), "bfloat16", 64, 256) == chosen
    assert configuration((9, 0), "bfloat16", 48, 1).block_s == 64
    assert configuration((9, 0), "bfloat16", 3, 1).block_t == 32
    assert configuration((9, 0), "bfloat16", 300, 1000).block_s == 64  # several blocks
    assert configuration((9, 0), "bfloat16", 64, 300).block_t == 64
    for unknown in ((8, 7), (8, 9), (12, 0), (12, 1), (99, 0)):
        assert configurations.architecture(unknown) == "sm_86"


@pytest.mark.parametrize("channels", [1, 33, 64, 100, 128, 300])
def test_equal_channels_have_equal_blocks(channels):
    """Otherwise G of student and teacher are summed in different orders, and equal features are no ties."""
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0)):
        for numbers in configurations.TERMS:
            chosen = configuration(capability, numbers, channels, channels)
            assert chosen.block_s == chosen.block_t
            assert chosen.block_t >= min(channels, 32)


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("pixels", [1, 100, 4096, 5000, 65536])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_column_splits(batch, pixels, need_grad):
    splits, columns = tiles.column_splits(batch, pixels, 64, need_grad, 128, 132)
    assert columns % 128 == 0
    assert (splits - 1) * columns < pixels <= splits * columns  # all columns, and no empty program
    if need_grad:
        assert (splits - 1) * 4 * batch * pixels * 64 <= tiles.WORKSPACE


def test_columns_are_split_to_occupy_the_device():
    assert tiles.column_splits(1, 4096, 64, True, 128, 132) == (4, 1024)  # 32 row blocks on 132 multiprocessors
    assert tiles.column_splits(16, 4096, 64, True, 128, 132) == (1, 4096)


def test_autotuning_measures_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = configuration((9, 0), "bfloat16", 64, 256)
    measured = []

    def measure(candidate: Configuration) -> float:
        measured.append(candidate)
        return 1.0 if (candidate.block_m, candidate.block_n, candidate.stages) == (64, 32, 2) else 2.0

    best = autotune("case", "hash", chosen, measure)
    assert (best.block_m, best.block_n, best.stages) == (64, 32, 2)
    assert (best.block_s, best.block_t) == (64, 256)
    assert chosen in measured
    assert len(set(measured)) == len(measured) > 4
    (file,) = tmp_path.rglob("*.json")
    assert list(json.loads(file.read_text("utf-8"))) == ["case"]
    measured.clear()
    assert autotune("case", "hash", chosen, measure) == best
    configurations.cached_winners.cache_clear()  # as in another process
    assert autotune("case", "hash", chosen, measure) == best
    assert not measured
    autotune("other", "hash", chosen, measure)
    assert measured
    assert len(json.loads(file.read_text("utf-8"))) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\0", b"\xff", b'{"case": {"block_m": 64, "block_n": 128}}', None],
    ids=["empty", "zeros", "no text", "no candidate", "not a folder"],
)
def test_autotuning_without_a_usable_file(tmp_path, monkeypatch, content):
    """A power failure has damaged the file, another version has written it, or it cannot be written: measure again."""
    chosen = configuration((9, 0), "bfloat16", 64, 256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune("case", "hash", chosen, lambda candidate: 1.0)
    (file,) = tmp_path.rglob("*.json")
    if content is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        file.write_bytes(content)
    configurations.cached_winners.cache_clear()
    measured = []
    for _ in range(2):
        autotune("case", "hash", chosen, lambda candidate: float(not measured.append(candidate)))
    assert len(set(measured)) == len(measured) > 4
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_autotuning_without_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a folder of the name "~" would be
    monkeypatch.setattr(configurations, "user_cache", lambda: None)
    chosen = configuration((9, 0), "bfloat16", 64, 256)
    assert autotune("case", "hash", chosen, lambda candidate: 1.0) in configurations.candidates(chosen)
    assert list(tmp_path.iterdir()) == []


# -- availability ----------------------------------------------------------------------------------------------------


def test_unavailable_reason(monkeypatch):
    assert "runs on NVIDIA GPUs" in unavailable_reason("triton", torch.device("cpu"))
    with pytest.raises(dispatch.BackendUnavailable, match="NVIDIA"):
        dispatch.compute_loss(torch.ones(1, 4, 2), torch.ones(1, 4, 2), ROW_L1, "triton", True)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in unavailable_reason("triton", gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in unavailable_reason("triton", gpu)
    assert auto_backend(gpu, ROW_L1) == "blocked"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable_reason("triton", gpu) is None
    monkeypatch.setattr(native, "is_built", lambda device: False)
    assert auto_backend(gpu, ROW_L1) == auto_backend(gpu, ROW_L1, torch.bfloat16) == "triton"
    assert auto_backend(gpu, ROW_L1, torch.float64) == "blocked"
    assert auto_backend(gpu, Relation("row", "l2")) == "closed_form"
    assert auto_backend(gpu, Relation("row", "l2"), torch.float64) == "closed_form"
    monkeypatch.setattr(native, "is_built", lambda device: True)
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: "not installed")
    assert auto_backend(gpu, ROW_L1) == "native"
    assert auto_backend(gpu, ROW_L1, torch.float64) == "blocked"


def test_without_a_c_compiler(monkeypatch):
    """As in PyTorch's images without development tools: auto chooses a backend that runs."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "is_built", lambda device: False)
    monkeypatch.delenv("CC", raising=False)
    for path, backend in (("", "blocked"), (os.environ["PATH"], "triton")):
        monkeypatch.setenv("PATH", path)
        triton.has_c_compiler.cache_clear()
        assert auto_backend(gpu, ROW_L1) == backend
        assert ("install gcc" in (unavailable_reason("triton", gpu) or "")) == (backend == "blocked")


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_amd_gpu(backend, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in unavailable_reason(backend, torch.device("cuda", 0))


def test_without_triton():
    """Without triton the backend gives a reason, auto chooses another backend, and losses work."""
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        import srpkd
        from srpkd.kernels import Relation, auto_backend, unavailable_reason
        gpu = torch.device("cuda", 0)
        assert "pip install triton" in unavailable_reason("triton", gpu), unavailable_reason("triton", gpu)
        assert auto_backend(gpu, Relation("row", "l1")) == "blocked"
        assert srpkd.relation_loss(torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)) > 0
    """
    subprocess.run([sys.executable, "-c", program], check=True)
