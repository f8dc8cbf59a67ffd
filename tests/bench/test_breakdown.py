"""The breakdown of a call into kernels."""

from __future__ import annotations

import pytest
import torch
from bench_helpers import parse

from bench import breakdown
from srpkd.checking.cases import Case
from srpkd.kernels import unavailable_reason

NAMES = {
    "void srpkd::cuda::(anonymous namespace)::moments<(int)3, float>(Inputs<int>)": "moments",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, float)": (
        "vectorized_elementwise_kernel"
    ),
    "void srpkd::cuda::algebra::run<srpkd::cuda::algebra::RowNorms<float, true> >(RowNorms<float>)": "RowNorms",
    "void algebra::run<algebra::FinishMoments>(T1::Arguments)": "FinishMoments",
    "relation_kernel": "relation_kernel",
    "Memset (Device)": "Memset",
}


@pytest.mark.parametrize("name", NAMES)
def test_short_names(name):
    assert breakdown.short_name(name) == NAMES[name]


def test_default_cases():
    options = parse(breakdown)
    assert options.pixels == [4096] and options.batch == [1, 16]


def test_equal_bits():
    loss, gradient = torch.ones(()), torch.tensor([1.0, 2.0])
    assert breakdown.equal((loss, gradient), (loss.clone(), gradient.clone()))
    assert breakdown.equal((loss, None), (loss.clone(), None))
    assert not breakdown.equal((loss, gradient), (loss, gradient + 1e-7))
    assert not breakdown.equal((loss, gradient), (loss, None))


def test_what_pytorch_needs_of_the_host(monkeypatch):
    calls = []

    def host_seconds(call, device):
        calls.append(call())
        return 1.25e-6 * len(calls)

    monkeypatch.setattr(breakdown.measure, "host_seconds", host_seconds)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    line = breakdown.host_baseline(Case(16, (2, 3), 1, "bfloat16", threads=1), "cpu")
    assert line == "PyTorch: host 1.2 us for a sum and its gradient, 2.5 us for a launch"
    (_, gradient), launch = calls
    assert torch.equal(gradient, torch.ones_like(gradient)) and launch is None


@pytest.mark.gpu
def test_what_pytorch_needs_of_a_gpus_host():
    line = breakdown.host_baseline(Case(256, (16, 32), 1, "bfloat16", device="cuda", threads=1), "cuda")
    assert line.startswith("PyTorch: host ") and line.endswith(" us for a launch")


@pytest.mark.gpu
def test_kernels_of_a_call():
    if (reason := unavailable_reason("native", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    case = Case(256, (16, 32), 1, "bfloat16", device="cuda", threads=1)
    title, overlapped, *kernels = breakdown.lines("native", case, "cuda")
    assert title.startswith("native: GPU ") and "host " in title
    assert "SRPKD_CUDA_OVERLAP=1: GPU " in overlapped and "the same bits" in overlapped
    assert any("tiles" in line for line in kernels)
