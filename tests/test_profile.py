"""``python -m srpkd.profile``: what a generator costs. That something is timed is tested, never how fast it is."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from srpkd.models.checkpoints import save_weights
from srpkd.models.complexity import count_macs, count_parameters
from srpkd.models.latency import measure_latency, profile_network
from srpkd.models.networks import define_generator
from srpkd.profile import main


@pytest.fixture
def weights(tmp_path):
    paths = {}
    for name, netG, ngf in [("teacher", "resnet_2blocks", 4), ("student", "resnet_1blocks", 2)]:
        paths[name] = tmp_path / f"{name}.pth"
        save_weights(define_generator(netG, ngf=ngf), paths[name])
    return paths


@pytest.mark.slow
def test_table_and_json(weights, tmp_path, capsys, one_thread):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    arguments = ["--size=16", "--modes", "eager", "onnx", "--repeats=4", "--device=cpu"]
    main([*map(str, weights.values()), *arguments, "--json", str(tmp_path / "costs.json")])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "costs.json").read_text())
    assert (result["size"], result["batch_size"], result["threads"]) == (16, 1, torch.get_num_threads())
    for name, (netG, ngf), network in zip(
        weights, [("resnet_2blocks", 4), ("resnet_1blocks", 2)], result["networks"], strict=True
    ):
        net = define_generator(netG, ngf=ngf)
        assert network["parameters"] == count_parameters(net)
        assert network["macs"] == count_macs(net, (1, 3, 16, 16))
        assert network["macs_input_grid"] == count_macs(net, (1, 3, 16, 16), "input") < network["macs"]
        assert network["bytes"] == weights[name].stat().st_size
        latency = {(entry["mode"], entry["dtype"]): entry for entry in network["latency"]}
        assert list(latency) == [(mode, dtype) for mode in ("eager", "onnx") for dtype in ("fp32", "bf16")]
        for key, entry in latency.items():
            if key == ("onnx", "bf16"):
                assert entry["why_not"] == "onnxruntime has no bf16 convolutions on the CPU"
            else:
                assert 0 < entry["p50_ms"] <= entry["p95_ms"] and entry["calls"] == 4, entry
                assert entry["images_per_second"] > 0
                assert f"{entry['p50_ms']:,.2f}" in out
        assert f"{network['parameters']:,}" in out
    assert "onnx bf16: onnxruntime has no bf16 convolutions" in out
    assert "Batches of 1, 16 x 16" in out


@pytest.mark.slow
def test_compiled(one_thread):
    found = profile_network(torch.nn.Conv2d(3, 2, 1), (1, 3, 8, 8), modes=["compiled"], repeats=3)["latency"]
    assert [entry["dtype"] for entry in found] == ["fp32", "bf16"]
    assert all(entry["p50_ms"] > 0 for entry in found), found


def test_times_are_those_of_the_calls(monkeypatch):
    """Durations 1 .. 5 s by a clock of our own; the warm-up's 100 s do not count."""
    durations = iter([100.0] * 3 + [1.0, 2.0, 3.0, 4.0, 5.0])
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(durations)

    found = measure_latency(call, images=2, repeats=5, seconds=1e9)
    assert found == {"p50_ms": 3000, "p95_ms": pytest.approx(4800), "images_per_second": 10 / 15, "calls": 5}


def test_time_is_limited_and_three_calls_are_made(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert measure_latency(lambda: now.__setitem__(0, now[0] + 10), 1, repeats=100, seconds=0)["calls"] == 3
    assert measure_latency(lambda: now.__setitem__(0, now[0] + 10), 1, repeats=100, seconds=45)["calls"] == 5


def test_nothing_timed_and_the_network_left_alone():
    net = define_generator("unet_16", ngf=2, dropout=True)
    result = profile_network(net, (1, 3, 16, 16), modes=[])
    assert result["latency"] == [] and net.training
    found = profile_network(net, (2, 3, 16, 16), modes=["eager"], repeats=3)
    assert net.training and next(net.parameters()).dtype == torch.float32
    assert found["macs"] == result["macs"]  # of one image
    assert [entry["dtype"] for entry in found["latency"]] == ["fp32", "bf16"]


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)

    def no_compiler(_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = profile_network(define_generator("resnet_1blocks", ngf=1), (1, 3, 16, 16), modes=["compiled", "onnx"])[
        "latency"
    ]
    assert found[0] == {"mode": "compiled", "dtype": "fp32", "device": "cpu", "why_not": "no C++ compiler"}
    assert "pip install 'srpkd[export]'" in found[2]["why_not"]


def test_counting_alone(weights, capsys):
    main([str(weights["teacher"]), "--modes"])
    out = capsys.readouterr().out
    assert "teacher.pth" in out and "GMACs" in out and "p50 ms" not in out


def test_sizes_that_do_not_fit(tmp_path):
    save_weights(define_generator("unet_32", ngf=1), tmp_path / "net.pth")
    with pytest.raises(SystemExit, match=r"--size 40: .*net\.pth takes multiples of 32"):
        main([str(tmp_path / "net.pth"), "--size=40"])
    with pytest.raises(SystemExit, match="does not exist"):
        main([str(tmp_path / "nett.pth")])
