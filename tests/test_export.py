"""``python -m srpkd.export``: the command line."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from sample_images import noise, save_all

from srpkd.export import main
from srpkd.models.checkpoints import save_weights
from srpkd.models.exporters import onnx_runner, pt2_runner
from srpkd.models.networks import define_generator

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx  # noqa: E402

SMALL = {"netG": "resnet_1blocks", "ngf": 2, "init_gain": 0.2}


@pytest.fixture
def weights(tmp_path):
    save_weights(define_generator(**SMALL), tmp_path / "latest_net_G.pth")
    return tmp_path / "latest_net_G.pth"


def test_command_line(weights, capsys):
    main([str(weights)])
    target = weights.with_suffix(".onnx")
    out = capsys.readouterr().out
    found = re.fullmatch(
        rf"{re.escape(str(target))}: ([\d,]+) bytes; any batch, height and width multiples of 4 from 8; "
        r"outputs differ from PyTorch's by at most (\S+) \(allowed: 0\.001\)\n",
        out,
    )
    assert int(found[1].replace(",", "")) == target.stat().st_size and float(found[2]) < 1e-4
    assert sorted(path.name for path in weights.parent.iterdir()) == ["latest_net_G.onnx", "latest_net_G.pth"]
    target.write_text("mine")
    with pytest.raises(SystemExit, match=r"latest_net_G\.onnx exists: use --force to replace it"):
        main([str(weights)])
    assert target.read_text("utf-8") == "mine"
    main([str(weights), "--force"])
    assert target.stat().st_size > 1000
    other = weights.with_name("other.pt2")
    other.write_text("mine")
    main([str(weights), "--force", "--format", "pt2", "--output", str(other)])
    assert other.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "images"), [(5, "2 images"), (1, r"1 images \(the one that calibrated it\)")], ids=["several", "one"]
)
@pytest.mark.core(1)
def test_int8(weights, tmp_path, capsys, count, images):
    photos = save_all(tmp_path / "photos", noise(count, (17, 21, 3)))
    main([str(weights), "--int8", "--calibration", str(photos)])
    line = capsys.readouterr().out.splitlines()[1]
    small = weights.with_name("latest_net_G.int8.onnx")
    assert line.startswith(f"{small}: {small.stat().st_size:,} bytes")
    mean, minimum = map(
        float, re.search(rf"PSNR to float32 (\S+) dB on average, (\S+) dB at worst, over {images}", line).groups()
    )
    assert 15 < minimum <= mean < 80


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.core(0)
def test_opset(weights, tmp_path, opset):
    """The written file has this opset; the comparison with PyTorch is part of every export."""
    photos = save_all(tmp_path / "photos", noise(2, (17, 21, 3)))
    main([str(weights), "--opset", str(opset), "--int8", "--calibration", str(photos)])
    for name in ("latest_net_G.onnx", "latest_net_G.int8.onnx"):
        model = onnx.load(weights.with_name(name))
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]


@pytest.mark.slow
@pytest.mark.parametrize(("netG", "format"), [("resnet_1blocks", "onnx"), ("unet_16", "pt2")])
@pytest.mark.core(1)
def test_train_mode_norm(tmp_path, netG, format):
    """Each image gets the output of batch norms in training mode on this image alone; without the flag it does not."""
    net = define_generator(netG, ngf=2, norm="batch", init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    images = torch.rand(3, 3, 32, 48) * torch.tensor([0.1, 1, 2]).view(3, 1, 1, 1)
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in images]).numpy()
    for flags in (["--train_mode_norm"], ["--force"]):
        main([str(tmp_path / "net.pth"), "--format", format, *flags])
        run = {"onnx": onnx_runner, "pt2": pt2_runner}[format]((tmp_path / f"net.{format}").read_bytes())
        difference = np.abs(run(images.numpy()) - alone).max()
        assert difference < 1e-4 if flags == ["--train_mode_norm"] else difference > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 and --calibration FOLDER.* must be given together"),
        (["--calibration", "x"], "must be given together"),
        (["--int8", "--calibration", "nowhere"], "--calibration nowhere: expected a folder of images"),
        (["--opset", "18", "--format", "pt2"], "only ONNX has operator sets, use --format onnx"),
        (["--opset", "7"], r"opset=7: torch \S+ writes this generator with opset 18"),
        (["--output", "x.pt2"], "x.pt2 with format='onnx': use --format pt2, or give a name that ends in .onnx"),
        (["--output", "x.onnx", "--format", "pt2"], "use --format onnx, or give a name that ends in .pt2"),
        (["--output", "x.pth"], "x.pth with format='onnx': give a name that ends in .onnx"),
        (["--int8", "--calibration", "x", "--format", "pt2"], "8-bit models are ONNX, use --format onnx"),
    ],
)
def test_contradictory_options(weights, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([str(weights), *arguments])
    assert [path.name for path in weights.parent.iterdir()] == ["latest_net_G.pth"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(weights, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"needs {package} .*: pip install \"srpkd\[export\]\""):
        main([str(weights)])
