"""``python -m srpkd.export``: what runs elsewhere gives the same pictures."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from srpkd.export import export, main
from srpkd.metrics.pixels import psnr
from srpkd.models.checkpoints import save_weights
from srpkd.models.exporters import onnx_runner, parity, pt2_runner, to_onnx
from srpkd.models.networks import define_generator

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")

SMALL = {"netG": "resnet_1blocks", "ngf": 2, "init_gain": 0.2}


@pytest.fixture
def weights(tmp_path):
    save_weights(define_generator(**SMALL), tmp_path / "latest_net_G.pth")
    return tmp_path / "latest_net_G.pth"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (17 + index, 21, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "options",
    [
        {"netG": "resnet_1blocks", "norm": "batch", "input_nc": 1, "dropout": True},
        {"netG": "unet_32", "output_nc": 1, "dropout": True},
    ],
    ids=str,
)
def test_onnx_for_any_batch_and_size(options):
    net = define_generator(**{"ngf": 2, "init_gain": 0.2} | options)
    run = onnx_runner(to_onnx(net))
    assert net.training  # the network itself is left alone
    net.eval()
    for shape in [(1, 32, 32), (2, 64, 96), (5, 32, 128)]:
        images = torch.rand(shape[0], options.get("input_nc", 3), *shape[1:]) * 2 - 1
        with torch.no_grad():
            expected = net(images)
        assert expected.std() > 1e-3
        np.testing.assert_allclose(run(images.numpy()), expected, atol=1e-5)
    assert parity(net, run) < 1e-5


def test_command_line(weights, capsys):
    main([str(weights)])
    target = weights.with_suffix(".onnx")
    out = capsys.readouterr().out
    found = re.fullmatch(
        rf"{re.escape(str(target))}: ([\d,]+) bytes; any batch, height and width multiples of 4; "
        r"outputs differ from PyTorch's by at most (\S+) \(allowed: 0\.001\)\n",
        out,
    )
    assert int(found[1].replace(",", "")) == target.stat().st_size and float(found[2]) < 1e-4
    assert sorted(path.name for path in weights.parent.iterdir()) == ["latest_net_G.onnx", "latest_net_G.pth"]
    target.write_text("mine")
    with pytest.raises(SystemExit, match=r"latest_net_G\.onnx exists: --force replaces it"):
        main([str(weights)])
    assert target.read_text() == "mine"
    main([str(weights), "--force", "--format", "pt2", "--output", str(target)])
    assert target.stat().st_size > 1000


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("netG", ["resnet_1blocks", "unet_16"])
def test_train_mode_norm(tmp_path, netG, kind):
    """Each image of a batch is what batch norms in training mode make of it alone; not so without the flag."""
    net = define_generator(netG, ngf=2, norm="batch", init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    images = torch.rand(3, 3, 32, 48) * torch.tensor([0.1, 1, 2]).view(3, 1, 1, 1)
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in images]).numpy()
    for flags in (["--train_mode_norm"], ["--force"]):
        main([str(tmp_path / "net.pth"), "--format", kind, *flags])
        run = {"onnx": onnx_runner, "pt2": pt2_runner}[kind]((tmp_path / f"net.{kind}").read_bytes())
        difference = np.abs(run(images.numpy()) - alone).max()
        assert difference < 1e-4 if flags == ["--train_mode_norm"] else difference > 0.01


def test_pt2(weights, tmp_path):
    (line,) = export(weights, tmp_path / "out" / "net.pt2", kind="pt2")
    assert "differ from PyTorch's by at most" in line
    images = torch.rand(3, 3, 16, 24)
    output = torch.export.load(tmp_path / "out" / "net.pt2").module()(images)
    net = define_generator(**SMALL)
    net.load_state_dict(torch.load(weights, weights_only=True))
    torch.testing.assert_close(output, net.eval()(images), rtol=0, atol=1e-5)


def test_a_model_that_differs_is_not_written(weights, tmp_path):
    with pytest.raises(ValueError, match=r"differs from PyTorch by .*, more than 0$"):
        export(weights, tmp_path / "net.onnx", tolerance=0)
    assert not (tmp_path / "net.onnx").exists()
    net = define_generator(**SMALL)
    with torch.no_grad():
        assert parity(net, lambda images: net.eval()(torch.from_numpy(images)).numpy() + 0.5) == pytest.approx(0.5)
    assert parity(net, lambda images: images[:, :, :4]) == float("inf")


def test_int8_says_what_it_costs(weights, photos, capsys):
    main([str(weights), "--int8", "--calibration", str(photos)])
    line = capsys.readouterr().out.splitlines()[1]
    small = weights.with_name("latest_net_G.int8.onnx")
    mean, least = map(
        float, re.search(r"PSNR to float32 (\S+) dB on average, (\S+) dB at worst, over 2 images", line).groups()
    )
    assert line.startswith(f"{small}: {small.stat().st_size:,} bytes")
    exact, rough = (onnx_runner(path.read_bytes()) for path in (weights.with_suffix(".onnx"), small))
    scores = []
    for index in (1, 3):  # the others were calibrated with
        pixels = np.array(Image.open(photos / f"{index}.png")).astype(np.float32) / 127.5 - 1
        height = pixels.shape[0]
        padded = np.pad(pixels, ((0, -height % 4), (0, 3), (0, 0)), mode="reflect").transpose(2, 0, 1)[None]
        scores.append(psnr(*(torch.from_numpy(run(padded)) for run in (rough, exact))))
    assert (mean, least) == (pytest.approx(np.mean(scores), abs=0.01), pytest.approx(min(scores), abs=0.01))
    assert 15 < least < 80  # near, and not the same


def test_int8_is_smaller(photos, tmp_path):
    save_weights(define_generator("resnet_2blocks", ngf=16), tmp_path / "net.pth")
    export(tmp_path / "net.pth", calibration=photos)
    assert (tmp_path / "net.int8.onnx").stat().st_size < (tmp_path / "net.onnx").stat().st_size / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 and --calibration FOLDER.* belong together"),
        (["--calibration", "x"], "belong together"),
        (["--int8", "--calibration", "nowhere"], "--calibration nowhere: expected a folder of images"),
        (["--int8", "--calibration", "x", "--format", "pt2"], "int8 is made of ONNX"),
    ],
)
def test_options_that_do_not_fit(weights, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([str(weights), *arguments])
    assert [path.name for path in weights.parent.iterdir()] == ["latest_net_G.pth"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra(weights, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"needs {package} .*: pip install 'srpkd\[export\]'"):
        main([str(weights)])


def test_networks_of_others_are_refused():
    with pytest.raises(TypeError, match="made by define_generator"):
        to_onnx(nn.Conv2d(3, 3, 1))
