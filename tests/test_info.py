"""``python -m srpkd.info``: versions, devices, and which backends can run on them."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys

import pytest
import torch

import srpkd
from srpkd.info import describe
from srpkd.kernels import BACKENDS, dispatch, measured


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


def test_earlier_kernels_are_named_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "stale", lambda: ["triton"])
    assert "earlier kernels" not in describe()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert "times that were measured with earlier kernels of triton" in describe()


def test_a_gpu_that_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    text = describe()
    assert "This GPU has not been measured: auto compares the times of NVIDIA H100" in text
    assert "  auto, l1     blocked, in bfloat16" in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: measured.DEVICES[0][0])
    assert "has not been measured" not in describe()


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
