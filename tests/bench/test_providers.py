"""The providers of the benchmark."""

from __future__ import annotations

import os

import pytest
import torch

from bench.providers import DEFAULT, PROVIDERS
from srpkd.checking import kernels
from srpkd.checking.cases import Case
from srpkd.checking.kernels import KERNEL_VARIABLE, CannotRun, Provider

GPU = Case(pixels=8, channels=(2, 3), device="cuda")


def test_kernels_are_selected_by_name_only(monkeypatch):
    assert set(PROVIDERS) - set(DEFAULT) == {"native-sm80", "native-sm90"}
    seen = []

    def make(case):
        return lambda student, teacher: seen.append(os.environ[KERNEL_VARIABLE]) or student.sum()

    monkeypatch.setattr(kernels, "_backend", lambda name: Provider(make))
    monkeypatch.setenv(KERNEL_VARIABLE, "mine")
    student, teacher = torch.ones(1, 2), torch.ones(1, 2)
    for kernel in ("sm80", "sm90"):
        provider = kernels._cuda_kernel(kernel, (9,))
        assert provider.make(GPU)(student, teacher) == 2
        assert os.environ[KERNEL_VARIABLE] == "mine"
    monkeypatch.delenv(KERNEL_VARIABLE)
    provider.make(GPU)(student, teacher)
    assert KERNEL_VARIABLE not in os.environ
    assert seen == ["sm80", "sm90", "sm90"]


def test_kernels_need_their_gpu(monkeypatch):
    assert "is a CUDA kernel" in PROVIDERS["native-sm90"].unavailable_reason(Case())
    monkeypatch.setattr(kernels, "_backend", lambda name: Provider(lambda case: None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert kernels._cuda_kernel("sm80", (8, 9)).unavailable_reason(GPU) is None
    assert kernels._cuda_kernel("sm90", (9,)).unavailable_reason(GPU) == "sm90 does not run on compute capability 8.6"


def test_a_kernel_declares_what_it_does_not_cover(monkeypatch):
    def make_raising(error):
        def make(case):
            def loss(student, teacher):
                raise error

            return loss

        monkeypatch.setattr(kernels, "_backend", lambda name: Provider(make))
        return kernels._cuda_kernel("sm90", (9,)).make(GPU)

    with pytest.raises(CannotRun, match="does not cover 300 channels"):
        make_raising(RuntimeError(f"{KERNEL_VARIABLE}=sm90 does not cover\n 300 channels"))(None, None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_raising(RuntimeError("illegal memory access"))(None, None)


def test_work_that_is_timed():
    """Without a gradient, none is prepared."""
    student, seen = torch.ones(1, 2, dtype=torch.float16), []

    def loss(student, teacher):
        seen.append((student.requires_grad, torch.is_grad_enabled()))
        return student.sum()

    assert kernels.evaluate(loss, student, student, Case(mode="forward")) == (2, None)
    value, gradient = kernels.evaluate(loss, student, student, Case(dtype="float16"))
    assert value == 2 and not value.requires_grad and (gradient == 2**15).all()
    assert seen == [(False, False), (True, True)]


def test_dtypes_by_device(monkeypatch):
    double = Case(dtype="float64", device="cuda")
    for name in ("native", "triton", "blocked"):
        monkeypatch.setattr(kernels, "unavailable_reason", lambda name, device: None)
        reason = PROVIDERS[name].unavailable_reason(double)
        assert (reason is None) == (name == "blocked"), reason
    assert PROVIDERS["native"].unavailable_reason(Case(dtype="float64")) is None
