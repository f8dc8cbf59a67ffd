"""Devices other than the CPU and NVIDIA GPUs: their names, and errors of those that this machine does not have."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest
import torch

from srpkd import devices
from srpkd.arguments import check_device
from srpkd.models import latency
from srpkd.training import distributed

MPS = torch.device("mps")


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was waited for, on a machine with a device of type mps."""
    found: list[str] = []
    module = SimpleNamespace(synchronize=lambda: found.append("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: found.append(str(device)))
    return found


def test_names(monkeypatch: pytest.MonkeyPatch, waited: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert devices.device_name(torch.device("cpu")) == platform.machine()
    assert devices.device_name(MPS) == devices.describe_device(MPS) == "mps"
    monkeypatch.undo()
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Arc")
    assert devices.device_name(torch.device("xpu")) == devices.describe_device(torch.device("xpu")) == "Arc"
    assert devices.describe_device(torch.device("cpu")).startswith("cpu, ")


def test_a_timed_call_waits_for_its_device(monkeypatch: pytest.MonkeyPatch, waited: list[str]) -> None:
    for device in (MPS, torch.device("cuda", 1), torch.device("cpu")):
        devices.synchronize(device)
    assert waited == ["mps", "cuda:1"]
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *_: net)
    monkeypatch.setattr(torch.Tensor, "to", lambda images, *_: images)
    latency._forward_call(torch.nn.Identity(), torch.ones(1), "eager", "fp32", MPS)()
    assert waited == ["mps", "cuda:1", "mps"]


@pytest.mark.parametrize("name", ["mps", "xpu", "hpu"])
def test_a_device_that_this_machine_does_not_have(name: str) -> None:
    """Torch raises errors of many types, also when the device is used only after images were read."""
    if getattr(getattr(torch, name, None), "is_available", bool)():
        pytest.skip(f"this machine has {name}")
    message = rf"device='{name}': torch cannot use it here \(.*\); use --device cpu"
    with pytest.raises(ValueError, match=message) as caught:
        check_device(name)
    assert len(str(caught.value)) < 200  # torch lists all of its backends


def test_one_process_uses_its_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory takes memory of the current GPU, which may be in use by others."""
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cuda", "cpu"):
        with distributed.process_group(torch.device(device)):
            pass
    assert chosen == [torch.device("cuda:1")]


def test_the_second_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:2': torch sees 2 GPUs; or use --device cpu"):
        check_device("cuda:2")
