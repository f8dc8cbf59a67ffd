"""Profiles of networks. That something is timed is tested, not how fast it is."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from srpkd.models.checkpoints import save_weights
from srpkd.models.latency import measure_latency, profile_generators, profile_network
from srpkd.models.networks import define_generator


@pytest.mark.slow
def test_compiled(one_thread):
    found = profile_network(torch.nn.Conv2d(3, 2, 1), (1, 3, 8, 8), modes=["compiled"], repeats=3)["latency"]
    assert [entry["dtype"] for entry in found] == ["fp32", "bf16"]
    assert all(entry["p50_ms"] > 0 for entry in found), found


def test_latencies_are_those_of_the_calls(monkeypatch):
    """A fake clock: calls of 1 .. 5 s, after a warm-up of 100 s per call, which does not count."""
    durations = iter([100.0] * 3 + [1.0, 2.0, 3.0, 4.0, 5.0])
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(durations)

    found = measure_latency(call, images=2, repeats=5, seconds=1e9)
    assert found == {"p50_ms": 3000, "p95_ms": pytest.approx(4800), "images_per_second": 10 / 15, "calls": 5}


def test_time_limit_and_minimum_of_three_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert measure_latency(lambda: now.__setitem__(0, now[0] + 10), 1, repeats=100, seconds=0)["calls"] == 3
    assert measure_latency(lambda: now.__setitem__(0, now[0] + 10), 1, repeats=100, seconds=45)["calls"] == 5


def test_network_is_unchanged():
    net = define_generator("unet_16", ngf=2, dropout=True)
    result = profile_network(net, (1, 3, 16, 16), modes=[])
    assert result["latency"] == [] and net.training
    passes = set()
    net.register_forward_hook(lambda net, images, _: passes.add((len(images[0]), images[0].dtype, net.training)))
    timed = []
    found = profile_network(net, (2, 3, 16, 16), modes=["eager"], repeats=3, on_timing=timed.append)
    assert timed == ["eager fp32", "eager bf16"]
    assert passes >= {(2, torch.float32, False), (2, torch.bfloat16, False)} and (2, torch.float32, True) not in passes
    assert all(entry["p50_ms"] > 0 for entry in found["latency"])
    assert net.training and next(net.parameters()).dtype == torch.float32
    assert found["macs"] == result["macs"]  # of one image
    assert [entry["dtype"] for entry in found["latency"]] == ["fp32", "bf16"]


def test_reasons_why_a_mode_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)

    def no_compiler(_):
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: C++ compile error\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = profile_network(define_generator("resnet_1blocks", ngf=1), (1, 3, 16, 16), modes=["compiled", "onnx"])[
        "latency"
    ]
    reason = "backend='inductor' raised: CppCompileError: C++ compile error"
    assert found[0] == {"mode": "compiled", "dtype": "fp32", "device": "cpu", "unavailable_reason": reason}
    assert 'pip install "srpkd[export]"' in found[2]["unavailable_reason"]


def test_profiles_of_files(tmp_path):
    paths = [str(tmp_path / name) for name in ("resnet.pth", "unet.pth")]
    for path, netG in zip(paths, ("resnet_1blocks", "unet_32")):
        save_weights(define_generator(netG, ngf=1), path)
    result = profile_generators(paths, size=64, batch_size=2, modes=["eager"], repeats=3)
    assert (result["size"], result["batch_size"]) == (64, 2)
    assert [network["weights"] for network in result["networks"]] == paths
    assert all(len(network["latency"]) == 2 for network in result["networks"])
    with pytest.raises(ValueError, match=r"size=48: .*unet\.pth needs a multiple of 32"):
        profile_generators(paths, size=48)
    with pytest.raises(ValueError, match="size=4: expected at least 8 pixels per side"):
        profile_generators(paths, size=4)
