"""``python -m srpkd.profile``: tables and JSON."""

from __future__ import annotations

import json

import pytest
import torch

from srpkd.models.checkpoints import save_weights
from srpkd.models.complexity import count_macs, count_parameters
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
    result = json.loads((tmp_path / "costs.json").read_text("utf-8"))
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
                assert entry["unavailable_reason"] == "onnxruntime has no bf16 convolutions on the CPU"
            else:
                assert 0 < entry["p50_ms"] <= entry["p95_ms"] and entry["calls"] == 4, entry
                assert entry["images_per_second"] > 0
                assert f"{entry['p50_ms']:,.2f}" in out
        assert f"{network['parameters']:,}" in out
    assert "onnx bf16: onnxruntime has no bf16 convolutions" in out
    assert "Batches of 1, 16 x 16" in out


def test_counts_without_timing(weights, capsys):
    main([str(weights["teacher"]), "--modes"])
    out = capsys.readouterr().out
    assert "teacher.pth" in out and "GMACs" in out and "p50 ms" not in out
    net = define_generator("resnet_2blocks", ngf=4)
    for grid in ("output", "input"):
        assert f"{count_macs(net, (1, 3, 256, 256), grid) / 1e9:,.2f}" in out.split()
