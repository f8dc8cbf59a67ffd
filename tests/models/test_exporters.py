"""Exported models compute what PyTorch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import save_deep
from wrong_files import full_disk

from srpkd.data.images import DataError
from srpkd.files import WriteError
from srpkd.finite import NonFiniteError
from srpkd.metrics.pixels import psnr
from srpkd.models import exporters
from srpkd.models.checkpoints import save_weights
from srpkd.models.exporters import (
    _calibration_images,
    export_generator,
    max_difference,
    onnx_runner,
    quantize,
    to_onnx,
)
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
        {"netG": "resnet_1blocks", "antialias": "both"},
        {"netG": "resnet_2blocks", "antialias": "down", "norm": "none"},
        {"netG": "resnet_2blocks", "antialias": "up", "norm": "batch"},
    ],
    ids=str,
)
@pytest.mark.core(1)
def test_onnx_for_any_batch_and_size(options):
    net = define_generator(**{"ngf": 2, "init_gain": 0.2} | options)
    run = onnx_runner(to_onnx(net))
    assert net.training  # the network is unchanged
    net.eval()
    for shape in [(1, 32, 32), (2, 64, 96), (5, 32, 128)]:
        images = torch.rand(shape[0], options.get("input_nc", 3), *shape[1:]) * 2 - 1
        with torch.no_grad():
            expected = net(images)
        assert expected.std() > 1e-3
        np.testing.assert_allclose(run(images.numpy()), expected, atol=1e-5)
    assert max_difference(net, run) < 1e-5


@pytest.mark.parametrize("options", [{}, {"antialias": "both"}, {"norm": "none"}], ids=str)
@pytest.mark.core(1)
def test_pt2(tmp_path, options):
    weights = tmp_path / "latest_net_G.pth"
    save_weights(define_generator(**SMALL | options), weights)
    (exported,) = export_generator(weights, tmp_path / "out" / "net.pt2", format="pt2")
    assert exported.path == tmp_path / "out" / "net.pt2" and exported.size == exported.path.stat().st_size
    assert exported.difference < 1e-5 and exported.size_multiple == 4
    images = torch.rand(3, 3, 16, 24)
    output = torch.export.load(tmp_path / "out" / "net.pt2").module()(images)
    net = define_generator(**SMALL | options)
    net.load_state_dict(torch.load(weights, weights_only=True))
    torch.testing.assert_close(output, net.eval()(images), rtol=0, atol=1e-5)


def test_model_with_too_large_a_difference_is_not_written(weights, tmp_path):
    with pytest.raises(
        ValueError, match=r"differ from PyTorch's by .*, more than the tolerance 0: nothing was written"
    ):
        export_generator(weights, tmp_path / "net.onnx", tolerance=0)
    assert not (tmp_path / "net.onnx").exists()
    net = define_generator(**SMALL)
    with torch.no_grad():
        assert max_difference(net, lambda images: net.eval()(torch.from_numpy(images)).numpy() + 0.5) == pytest.approx(
            0.5
        )
    assert max_difference(net, lambda images: images[:, :, :4]) == float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.core(0)
def test_outputs_that_are_not_finite(weights, photos, monkeypatch, value):
    """A comparison of NaN with NaN must not report a difference of 0."""
    net = define_generator(**SMALL)
    with pytest.raises(NonFiniteError, match="the exported model's output for random images is not finite"):
        max_difference(net, lambda images: np.full_like(images, value))
    with torch.no_grad():
        net.model[1].weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="the generator's output for random images is not finite"):
        max_difference(net, onnx_runner(to_onnx(net)))
    monkeypatch.setattr(exporters, "quantize", lambda *_: b"")
    runner = exporters.onnx_runner
    monkeypatch.setattr(
        exporters, "onnx_runner", lambda model: runner(model) if model else lambda images: np.full_like(images, value)
    )
    with pytest.raises(NonFiniteError, match="the 8-bit model's output for a calibration image is not finite"):
        export_generator(weights, calibration=photos)
    assert not list(weights.parent.glob("*.onnx"))


@pytest.mark.parametrize("netG", ["resnet_1blocks", "unet_16"])
@pytest.mark.core(0)
def test_smallest_size(tmp_path, netG):
    """Images of the stated smallest size work, and the next smaller multiple does not."""
    net = define_generator(netG, ngf=2).eval()
    save_weights(net, tmp_path / "net.pth")
    (exported,) = export_generator(tmp_path / "net.pth")
    run, side = onnx_runner(exported.path.read_bytes()), exported.smallest_size
    assert side == {"resnet_1blocks": 8, "unet_16": 16}[netG]
    assert run(np.zeros((1, 3, side, side), np.float32)).shape == (1, 3, side, side)
    smaller = side - exported.size_multiple
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|RUNTIME_EXCEPTION|FAIL"):
        run(np.zeros((1, 3, side, smaller), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("antialias", ["none", "both"])
@pytest.mark.core(0)
def test_int8_error(weights, photos, antialias):
    save_weights(define_generator(**SMALL, antialias=antialias), weights)
    model, quantized = export_generator(weights, calibration=photos)
    assert (model.path, quantized.path) == (weights.with_suffix(".onnx"), weights.with_name("latest_net_G.int8.onnx"))
    assert quantized.size == quantized.path.stat().st_size and quantized.difference is None
    exact, rounded = (onnx_runner(file.path.read_bytes()) for file in (model, quantized))
    scores = []
    for index in (1, 3):  # the other images calibrate the model
        pixels = np.array(Image.open(photos / f"{index}.png")).astype(np.float32) / 127.5 - 1
        height = pixels.shape[0]
        padded = np.pad(pixels, ((0, -height % 4), (0, 3), (0, 0)), mode="reflect").transpose(2, 0, 1)[None]
        scores.append(psnr(*(torch.from_numpy(run(padded)) for run in (rounded, exact))))
    error = quantized.quantization
    assert (error.mean, error.minimum) == (pytest.approx(np.mean(scores)), pytest.approx(min(scores)))
    assert error.images == 2 and error.held_out
    assert 15 < error.minimum < 80  # close, but not equal


def test_calibration_images_of_16_bits(tmp_path):
    ramp = np.linspace(2000, 40000, 256).reshape(16, 16, 1).astype(np.uint16)
    save_deep(tmp_path / "photos" / "0.png", ramp)
    (images,) = _calibration_images(tmp_path / "photos", define_generator("resnet_1blocks", ngf=1))
    np.testing.assert_allclose(images[0].permute(1, 2, 0), np.repeat(ramp, 3, 2) / 32767.5 - 1, atol=2e-7)


def test_calibration_images_are_read_one_at_a_time(photos, monkeypatch):
    """64 photos of 6000 x 4000 pixels would take 18 GB."""
    found = _calibration_images(photos, define_generator("resnet_1blocks", ngf=1))
    read, opened = exporters.read_image, []
    monkeypatch.setattr(exporters, "read_image", lambda path: opened.append(path) or read(path))
    for number, _ in enumerate(found, 1):
        assert len(opened) == number
    assert number == len(found) == 5
    monkeypatch.setattr(exporters, "CALIBRATION_IMAGES", 2)
    few = _calibration_images(photos, define_generator("resnet_1blocks", ngf=1))
    assert few.paths == [str(photos / name) for name in ("0.png", "2.png")]  # evenly spaced


def test_calibration_images_that_cannot_be_read(weights, photos):
    """All of them in one message, before the model is exported."""
    names = ("a.png", "b.png", "c.png")
    (photos / "a.png").write_bytes((photos / "0.png").read_bytes()[:50])
    (photos / "b.png").touch()
    (photos / "c.png").symlink_to("nowhere")
    with pytest.raises(DataError, match="photos: 3 of 8 images cannot be read: fix or remove them") as caught:
        export_generator(weights, calibration=photos)
    reasons = ("damaged or truncated", "not an image", "No such file or directory")
    for name, reason, problem in zip(names, reasons, caught.value.problems, strict=True):
        assert problem.startswith(f"{photos / name}: {reason}")
    assert not list(weights.parent.glob("*.onnx"))


def test_full_disk_of_temporary_files():
    with full_disk(10), pytest.raises(WriteError, match=r"cannot be written: File too large; make room on that disk"):
        quantize(b"a model, of which only a part can be written", [])


@pytest.mark.slow
@pytest.mark.core(0)
def test_int8_is_smaller(photos, tmp_path):
    save_weights(define_generator("resnet_2blocks", ngf=16), tmp_path / "net.pth")
    export_generator(tmp_path / "net.pth", tmp_path / "net-1.5", calibration=photos)
    assert (tmp_path / "net-1.5.int8.onnx").stat().st_size < (tmp_path / "net-1.5").stat().st_size / 2
