"""``python -m srpkd.translate``: the command line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sample_images import save_deep, save_mixed
from torch import nn

from srpkd.data.images import open_image
from srpkd.models import inference
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator
from srpkd.translate import main

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def folder(tmp_path):
    return save_mixed(tmp_path / "photos")


def run(tmp_path, folder, *options, net=None, out="out"):
    """Translate a folder and return the exit status, or the error message."""
    save_weights(net or define_generator("resnet_1blocks", ngf=2, init_gain=0.2), tmp_path / "net.pth")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "net.pth"), str(folder), str(tmp_path / out), "--device=cpu", *options])
    return caught.value.code


def test_train_mode_norm(folder, tmp_path, capsys):
    """As in pix2pix, each image gets the output of batch norms in training mode on this image alone."""
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=True, init_gain=0.2)
    for module in net.modules():  # but not dropout
        module.training = isinstance(module, nn.BatchNorm2d)
    for batch_size in ("1", "8"):
        assert run(tmp_path, folder, "--batch_size", batch_size, "--train_mode_norm", net=net, out=batch_size) == 0
        for name in ("a.png", "deep/er/e.tif"):
            pixels = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1)[None]
            with torch.no_grad():
                output = ((net(pixels / 127.5 - 1)[0] + 1) * 127.5).round().permute(1, 2, 0)
            assert output.std() > 1
            np.testing.assert_allclose(np.array(Image.open(tmp_path / batch_size / name)), output, atol=1)
    assert "7 images written" in capsys.readouterr().out


def test_unreadable_images_are_reported_and_skipped(folder, tmp_path, capsys):
    data = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("hello")
    assert run(tmp_path, folder) == 1
    out, err = capsys.readouterr()
    assert out == f"7 images written to {tmp_path / 'out'}, 2 skipped, 1 other file (1 .txt) left out\n"
    assert f"skipped {folder / 'cut.jpg'}: damaged or truncated" in err
    assert f"skipped {folder / 'text.png'}: not an image" in err
    assert not (tmp_path / "out" / "cut.jpg").exists() and (tmp_path / "out" / "grey.png").exists()


def test_results_are_overwritten_only_with_force(folder, tmp_path, capsys):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.webp").write_bytes(b"mine")
    message = r"1 of the results exist already, such as .*a\.webp: use --skip_existing"
    assert re.search(message, run(tmp_path, folder))
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.webp"]
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() == b"mine"
    assert run(tmp_path, folder, "--force") == 0
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() != b"mine"
    assert "7 images written" in capsys.readouterr().out


def test_an_interrupted_translation_continues_with_skip_existing(folder, tmp_path, monkeypatch, capsys):
    write, written = inference.write_file, []

    def interrupted(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    monkeypatch.setattr(inference, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, folder, "--skip_existing")
    first = written.copy()
    written.clear()
    monkeypatch.setattr(inference, "write_file", lambda *arguments: written.append(write(*arguments)))
    assert run(tmp_path, folder, "--skip_existing") == 0
    assert len(written) == 4 and not set(written) & set(first)
    assert "note: 3 results exist already: their images were left out" in capsys.readouterr().err
    assert run(tmp_path, folder, "--skip_existing") == 0
    assert capsys.readouterr().out.startswith("0 images written")


@pytest.fixture
def identity(monkeypatch):
    monkeypatch.setattr("srpkd.models.inference.translate", lambda net, images: images)


@pytest.mark.parametrize("name", ["0.png", "0.tif", "grey.png", "float.tif", "0.ppm"])
def test_depth_is_kept_end_to_end(tmp_path, identity, capsys, name):
    """A generator that returns its input gives a file of the same depth and the same numbers."""
    ramp = np.linspace(2000, 40000, 16 * 16).reshape(16, 16, 1).astype(np.uint16)
    pixels = ramp if name == "grey.png" else np.concatenate([ramp, ramp[::-1], 65535 - ramp], 2)
    pixels = (0.7 * pixels / 65535).astype(np.float32) if name == "float.tif" else pixels
    path = tmp_path / "photos" / name
    if name == "0.ppm":
        path.parent.mkdir()
        path.write_bytes(b"P6 16 16 65535\n" + pixels.astype(">u2").tobytes())
    else:
        save_deep(path, pixels, **({"iccprofile": PROFILE} if name.endswith("tif") else {}))
    assert run(tmp_path, path.parent) == 0
    with open_image(path) as before, open_image(tmp_path / "out" / name) as after:
        torch.testing.assert_close(after.read(), before.read(), atol=1e-7 if name == "float.tif" else 0, rtol=0)
        assert before.icc_profile == after.icc_profile == (PROFILE if name.endswith("tif") else None)
    assert capsys.readouterr().out == f"1 images written to {tmp_path / 'out'}\n"


def test_values_outside_of_0_to_1_are_skipped(tmp_path, identity, capsys):
    save_deep(tmp_path / "photos" / "0.tif", np.full((16, 16, 1), 40.0))
    assert run(tmp_path, tmp_path / "photos") == 1
    out, err = capsys.readouterr()
    assert "0 images written" in out and ", 1 skipped" in out
    assert "0.tif: values from 40 to 40; expected 8 or 16 bits per channel, or floats from 0 to 1" in err


def test_phone_photos(tmp_path, identity, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(photos / "phone.jpg", exif=exif, icc_profile=PROFILE, quality=95)
    alpha = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20))
    cut = image.copy()
    cut.putalpha(alpha)
    cut.save(photos / "alpha.png", exif=exif)
    (photos / "wrong.jpg").write_bytes((photos / "alpha.png").read_bytes())
    image.save(photos / "pages.tif", save_all=True, append_images=[image.rotate(180)])
    (photos / "x.heic").touch()
    assert run(tmp_path, photos) == 0
    out, err = capsys.readouterr()
    assert out == f"4 images written to {tmp_path / 'out'}, 1 other file (1 .heic) left out\n"
    assert "note: 1 image: without the alpha channel (JPEG has none), such as" in err
    assert "note: 1 image: only the first page or frame of an image with several (use --all_frames" in err
    with Image.open(tmp_path / "out" / "phone.jpg") as result:
        assert result.size == (12, 20) and result.info["icc_profile"] == PROFILE and not result.getexif().get(0x0112)
        upright = np.array(Image.open(photos / "phone.jpg").transpose(Image.Transpose.ROTATE_270)).astype(int)
        assert np.abs(np.array(result) - upright).mean() < 12
    with Image.open(tmp_path / "out" / "alpha.png") as result:
        expected = cut.transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(np.array(result), np.array(expected))
    with Image.open(tmp_path / "out" / "pages.tif") as result:
        assert result.n_frames == 1


@pytest.mark.parametrize("name", ["0.tif", "0.gif", "0.webp", "0.png"])
def test_all_frames(tmp_path, identity, capsys, name):
    (tmp_path / "photos").mkdir()
    arrays = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, arrays)
    options = {"lossless": True} if name == "0.webp" else {}
    options |= {"save_all": True, "append_images": others, "duration": [90, 50, 70], "loop": 3}
    first.save(tmp_path / "photos" / name, **options)
    assert run(tmp_path, tmp_path / "photos", "--all_frames", "--batch_size", "2") == 0
    assert not capsys.readouterr().err.count("note:")
    with Image.open(tmp_path / "photos" / name) as before, Image.open(tmp_path / "out" / name) as after:
        assert after.n_frames == 3
        assert before.info.get("loop") == after.info.get("loop") == (None if name == "0.tif" else 3)
        for frame in range(3):
            before.seek(frame)
            after.seek(frame)
            assert before.info.get("duration") == after.info.get("duration")
            if name != "0.gif":
                np.testing.assert_array_equal(np.array(after.convert("RGB")), np.array(before.convert("RGB")))


@pytest.mark.parametrize("options", [{"antialias": "both"}, {"antialias": "down"}, {"norm": "none"}], ids=str)
def test_generators_of_cut(tmp_path, options):
    net = define_generator("resnet_2blocks", ngf=2, init_gain=0.3, **options).eval()
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    for name, image in {"fits": pixels, "padded": pixels[:19, :30]}.items():
        Image.fromarray(image).save(tmp_path / "photos" / f"{name}.png")
    assert run(tmp_path, tmp_path / "photos", net=net) == 0
    with torch.no_grad():
        output = net(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    expected = ((output + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert expected.std() > 1
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "fits.png")), expected)
    assert Image.open(tmp_path / "out" / "padded.png").size == (30, 19)
