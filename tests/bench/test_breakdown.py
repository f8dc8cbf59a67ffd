"""The breakdown of a call into kernels."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from bench_helpers import parse
from torch.autograd import DeviceType

from bench import breakdown
from bench.providers import PROVIDERS
from srpkd.checking.cases import Case
from srpkd.checking.kernels import CannotRun, Provider
from srpkd.kernels import unavailable_reason

NAMES = {
    "void srpkd::cuda::(anonymous namespace)::moments<(int)3, float>(Inputs<int>)": "moments",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, float)": (
        "vectorized_elementwise_kernel"
    ),
    "void srpkd::cuda::algebra::run<srpkd::cuda::algebra::RowNorms<float, true> >(RowNorms<float>)": "RowNorms",
    "void algebra::run<algebra::PlainKernel>(T1::Arguments)": "PlainKernel",
    "void srpkd::cuda::algebra::run_together<srpkd::cuda::algebra::WeightedMoment<srpkd::cuda::BFloat16, (bool)1, "
    "srpkd::cuda::sm90::SumsOfSegments>, srpkd::cuda::algebra::FinishWeightedMoment<(int)128, "
    "srpkd::cuda::sm90::SumsOfSegments>, srpkd::cuda::algebra::Gradient<srpkd::cuda::BFloat16, (bool)1, (int)2, "
    "srpkd::cuda::sm90::SumsOfSegments> >(srpkd::cuda::algebra::Together<T1...>)": (
        "WeightedMoment + FinishWeightedMoment + Gradient"
    ),
    "relation_kernel": "relation_kernel",
    "Memset (Device)": "Memset",
}


@pytest.mark.parametrize("name", NAMES)
def test_short_names(name):
    assert breakdown.short_name(name) == NAMES[name]


def test_default_cases():
    options = parse(breakdown, "--channels", "4/6")
    assert options.pixels == [4096] and options.batch == [1, 16] and options.dtype == ["bfloat16"]
    assert options.channels == [(4, 6)]


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


@pytest.fixture
def _gpu(monkeypatch):
    """Stands in for what only a GPU can do."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(breakdown.measure, "gpu_seconds", lambda call, device: None)
    monkeypatch.setattr(breakdown.measure, "host_seconds", lambda call, device: 3e-6)
    events = [
        SimpleNamespace(device_type=kind, name=name, device_time=float(time))
        for kind, name, count in ((DeviceType.CUDA, "moments", 1), (DeviceType.CUDA, "sums<4>", 2), (None, "host", 1))
        for time in range(count * breakdown.CALLS)
    ]
    profiled = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(breakdown, "profile", lambda activities: nullcontext(profiled))


@pytest.mark.usefixtures("_gpu")
def test_lines_of_a_call():
    case = Case(48, (4, 6), 1, distance="l2")
    title, *others = breakdown.lines("closed_form", case, "cpu")
    assert title.startswith("closed_form: host 3.0 us, 3 launches, first call 0.")
    assert others == [
        "  with SRPKD_CUDA_OVERLAP=1: host 3.0 us, the same bits",
        "  with SRPKD_CUDA_TOGETHER=0: host 3.0 us, the same bits",
        "       19.0 us  2 x sums",
        "        4.5 us  1 x moments",
    ]
    assert breakdown.lines("blocked", case, "cpu")[1:] == others[2:]


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("variable", breakdown.OTHER_LAUNCHES)
def test_other_results_with_other_launches(monkeypatch, variable):
    precisions = set()

    def loss(student, teacher):
        precisions.add(torch.get_float32_matmul_precision())
        return student.sum() * (2 if variable in os.environ else 1)

    monkeypatch.setitem(PROVIDERS, "closed_form", Provider(lambda case: loss))
    case = Case(48, (4, 6), 1, precision="medium")
    _, *found = breakdown.lines("closed_form", case, "cpu")[:3]
    for line, other in zip(found, breakdown.OTHER_LAUNCHES):
        assert f" with {other}=" in line and line.endswith("OTHER RESULTS" if other == variable else "the same bits")
    assert precisions == {"medium"}


@pytest.mark.usefixtures("_gpu")
def test_a_provider_that_cannot_run_does_not_hide_others(monkeypatch, capsys):
    def raising(error):
        def loss(student, teacher):
            raise error

        return Provider(lambda case: loss)

    monkeypatch.setitem(PROVIDERS, "native", raising(CannotRun("too wide")))
    monkeypatch.setitem(PROVIDERS, "triton", raising(RuntimeError("an illegal\naccess")))
    monkeypatch.setattr(breakdown.cases, "device_of", lambda options: "cuda")
    monkeypatch.setattr(breakdown.cases, "selected", lambda options: [Case(48, (4, 6), 1)])
    breakdown.run(parse(breakdown, "--providers", "closed_form", "native", "triton", "blocked"))
    first, baseline, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("N=48 C=4/6 B=1") and baseline.startswith("  PyTorch: host 3.0 us")
    assert lines[0] == "  closed_form: closed_form supports the distances l2, received l1"
    assert lines[1:3] == ["  native: too wide", "  triton: RuntimeError: an illegal access"]
    assert lines[3].startswith("  blocked: host 3.0 us, 3 launches")


@pytest.mark.gpu
def test_what_pytorch_needs_of_a_gpus_host():
    line = breakdown.host_baseline(Case(256, (16, 32), 1, "bfloat16", device="cuda", threads=1), "cuda")
    assert line.startswith("PyTorch: host ") and line.endswith(" us for a launch")


@pytest.mark.gpu
def test_kernels_of_a_call():
    if (reason := unavailable_reason("native", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    case = Case(256, (16, 32), 1, "bfloat16", device="cuda", threads=1)
    title, overlapped, apart, *kernels = breakdown.lines("native", case, "cuda")
    assert title.startswith("native: GPU ") and "host " in title
    for line, setting in ((overlapped, "SRPKD_CUDA_OVERLAP=1"), (apart, "SRPKD_CUDA_TOGETHER=0")):
        assert f"{setting}: GPU " in line and "the same bits" in line
    assert any("tiles" in line for line in kernels)
