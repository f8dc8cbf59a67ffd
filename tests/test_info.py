"""``python -m srpkd.info``: versions, devices, and which backends can run on them."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from collections.abc import Callable

import pytest
import torch

import srpkd
from srpkd.arguments import check_device
from srpkd.info import describe
from srpkd.kernels import BACKENDS, cuda_device, dispatch, measured
from srpkd.training.resume import random_state, set_random_state


def test_names_versions_devices_and_backends() -> None:
    text = describe()
    assert f"srpkd {srpkd.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert "\ncpu" in text
    for name, summary in BACKENDS.items():
        reason = dispatch.unavailable_reason(name, torch.device("cpu"))
        assert (summary if reason is None else reason) in text
        assert name in text
    assert "SRPKD_BACKEND is not set" in text


def test_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.backend_module("closed_form"), "unavailable_reason", lambda device: "no float64")
    line = next(line for line in describe().splitlines() if "closed_form" in line)
    assert "no: no float64" in line


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets torch see one GPU: its name and compute capability."""

    def fake(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda_device, "gpu_of", lambda device: cuda_device.Gpu(name, capability, 40, 65_536))

    monkeypatch.setattr(torch.version, "hip", None)
    return fake


def test_earlier_kernels_are_named_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, fake_gpu: Callable[..., None]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(measured, "stale", lambda recorded: ["triton"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also on a machine with a GPU
    assert "earlier kernels" not in describe()
    fake_gpu("some GPU", (8, 9))
    assert "times that were measured with earlier kernels of triton. Run srpkd check to test" in describe()
    fake_gpu("Tesla T4", (7, 5))
    assert "earlier kernels" not in describe()


def test_a_gpu_that_is_not_recorded(fake_gpu: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    fake_gpu("some GPU", (8, 9))
    assert "This GPU has not been measured: auto compares the times of NVIDIA H100" in describe()
    fake_gpu(*measured.DEVICES[0])
    assert "has not been measured" not in describe()


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_a_gpu_without_kernels(hip: str | None, monkeypatch: pytest.MonkeyPatch, fake_gpu: Callable[..., None]) -> None:
    """auto compares no times there, and small maps are not computed in float64."""
    fake_gpu("Tesla T4", (7, 5))
    monkeypatch.setattr(torch.version, "hip", hip)
    text = describe().partition("cuda:0 (Tesla T4)")[2]
    assert "measured" not in text
    reason = "this is an AMD GPU" if hip else "compute capability 8.0 or higher, this one has 7.5"
    assert text.count(f"{reason}: use backend='auto'") == 2
    for dtype in ("float32", "bfloat16"):
        assert f"  auto, l1     blocked, in {dtype}" in text
        assert f"  auto, l2     closed_form, blocked for small maps, in {dtype}" in text


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    text = describe().partition("\nmps:0 ")[2]
    assert "  closed_form  no: it computes in float64, which this device lacks" in text
    assert "  native       no: it runs on NVIDIA GPUs" in text
    assert "  auto, l2     blocked, in float32" in text
    assert "no GPU" not in text


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts its GPUs, and raises an error for everything else."""

    def init(*_: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("init", "get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, init)
    expected = (
        "torch sees no GPU that it can use (of 2: The NVIDIA driver on your system is too old (found version 11040).)"
    )
    assert f"{expected}: everything runs on the CPU" in describe()
    with pytest.raises(ValueError, match="device='cuda': torch sees 0 GPUs; or use --device cpu"):
        check_device("cuda")
    set_random_state(random_state() | {"cuda": [torch.get_rng_state()]})  # of a run that is resumed on the CPU


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "not installed" in next(line for line in describe().splitlines() if "triton" in line)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("blocked", "SRPKD_BACKEND = blocked"), ("", "SRPKD_BACKEND is not set"), ("blokced", "did you mean 'blocked'?")],
)
def test_environment_variable(setting: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting is reported, not raised: the command exists to find it."""
    monkeypatch.setenv("SRPKD_BACKEND", setting)
    assert expected in describe()


def test_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "srpkd.info")
    monkeypatch.setattr(sys, "argv", ["info"])
    runpy.run_module("srpkd.info", run_name="__main__")
    assert capsys.readouterr().out.strip() == describe()
