"""``python -m srpkd.translate``: folders of images of any size and format through a generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from srpkd.models.checkpoints import save_weights
from srpkd.models.inference import _reflected, translate
from srpkd.models.networks import define_generator, size_multiple
from srpkd.translate import main, translate_folder


@pytest.fixture
def folder(tmp_path):
    """Images of several formats, sizes and depths of folder, among them what is no image."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, height, width in [
        ("a.png", 16, 16),
        ("b.jpg", 16, 16),
        ("c.JPEG", 16, 16),
        ("d.bmp", 13, 29),
        ("deep/a.webp", 1, 3),
        ("deep/er/e.tif", 40, 8),
    ]:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
    Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).save(root / "grey.png")
    (root / "notes.txt").write_text("no image")
    return root


GENERATORS = {
    "resnet": lambda: define_generator("resnet_1blocks", ngf=2, init_gain=0.2),
    "unet": lambda: define_generator("unet_16", ngf=2, dropout=True, init_gain=0.2),
    "grey": lambda: define_generator("resnet_1blocks", 1, 1, ngf=2, norm="batch", init_gain=0.2),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_names_sizes_and_formats_are_kept(folder, tmp_path, kind):
    net = GENERATORS[kind]()
    written, skipped = translate_folder(net, folder, tmp_path / "out")
    assert not skipped and net.training
    names = {path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix != ".txt"}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")} == names
    assert sorted(written) == sorted(str(tmp_path / "out" / name) for name in names)
    for name in names:
        with Image.open(folder / name) as before, Image.open(tmp_path / "out" / name) as after:
            assert (after.format, after.size) == (before.format, before.size)
            assert after.mode == ("L" if kind == "grey" else "RGB") or after.format == "WEBP"


def test_pixels_are_the_networks(folder, tmp_path):
    net = GENERATORS["resnet"]()
    translate_folder(net, folder, tmp_path / "out")
    pixels = torch.from_numpy(np.array(Image.open(folder / "a.png")))
    with torch.no_grad():
        output = net.eval()(pixels.permute(2, 0, 1)[None] / 127.5 - 1)[0]
    expected = ((output + 1) * 127.5).round().permute(1, 2, 0)
    assert expected.std() > 1  # not one grey
    np.testing.assert_allclose(np.array(Image.open(tmp_path / "out" / "a.png")), expected, atol=1)


def test_batches_change_nothing(folder, tmp_path):
    net = GENERATORS["resnet"]()
    translate_folder(net, folder, tmp_path / "one")
    sizes = []
    net.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    translate_folder(net, folder, tmp_path / "many", batch_size=8)
    assert sizes == [3, 1, 1, 1, 1]  # a, b, c are of one size
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "many" / path.relative_to(tmp_path / "one")
        np.testing.assert_allclose(*(np.array(Image.open(p)).astype(int) for p in (path, other)), atol=1)


def test_train_mode_norm(folder, tmp_path, capsys):
    """As pix2pix: batch norms in training mode and an image by itself, whatever the size of the batch."""
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=True, init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    for module in net.modules():  # dropout is off
        module.training = isinstance(module, nn.BatchNorm2d)
    for batch_size in ("1", "8"):
        out = tmp_path / batch_size
        arguments = [str(tmp_path / "net.pth"), str(folder), str(out), "--device=cpu", "--batch_size", batch_size]
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--train_mode_norm"])
        assert caught.value.code == 0
        for name in ("a.png", "deep/er/e.tif"):
            pixels = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1)[None]
            with torch.no_grad():
                output = ((net(pixels / 127.5 - 1)[0] + 1) * 127.5).round().permute(1, 2, 0)
            assert output.std() > 1
            np.testing.assert_allclose(np.array(Image.open(out / name)), output, atol=1)
    assert "7 images written" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["resnet", "unet"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 16), (17, 33), (32, 32)])
def test_any_size(kind, shape):
    net = GENERATORS[kind]().eval()
    images = torch.rand(2, 3, *shape) * 2 - 1
    output = translate(net, images)
    assert output.shape == images.shape and output.isfinite().all()
    if not any(length % size_multiple(net) or length < 8 for length in shape):
        with torch.no_grad():
            assert torch.equal(output, net(images))


def test_padding_is_reflection():
    for length in (1, 2, 3, 5):
        for wanted in range(length, 4 * length + 3):
            expected = np.pad(np.arange(length), (0, wanted - length), mode="reflect")
            assert _reflected(length, wanted).tolist() == expected.tolist()


def test_what_cannot_be_read_is_reported_and_skipped(folder, tmp_path, capsys):
    data = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("hello")
    save_weights(GENERATORS["resnet"](), tmp_path / "net.pth")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "net.pth"), str(folder), str(tmp_path / "out"), "--device", "cpu"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == f"7 images written to {tmp_path / 'out'}, 2 skipped\n"
    assert f"skipped {folder / 'cut.jpg'}: damaged or cut short" in err
    assert f"skipped {folder / 'text.png'}: not an image" in err
    assert not (tmp_path / "out" / "cut.jpg").exists() and (tmp_path / "out" / "grey.png").exists()


def test_nothing_is_overwritten_without_force(folder, tmp_path, capsys):
    save_weights(GENERATORS["resnet"](), tmp_path / "net.pth")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.webp").write_bytes(b"mine")
    arguments = [str(tmp_path / "net.pth"), str(folder), str(tmp_path / "out"), "--device=cpu"]
    with pytest.raises(SystemExit, match=r"1 of the results exist already, such as .*a\.webp: --force replaces"):
        main(arguments)
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.webp"]
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() == b"mine"
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--force"])
    assert caught.value.code == 0
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() != b"mine"
    assert "7 images written" in capsys.readouterr().out


@pytest.mark.parametrize("target", [".", "results"])
def test_the_images_themselves_are_never_overwritten(folder, target):
    with pytest.raises(ValueError, match="lies in"):
        translate_folder(GENERATORS["resnet"](), folder, folder / target, force=True)
    assert not (folder / "results").exists()


def test_sizes_and_cuts(folder, tmp_path):
    net = GENERATORS["resnet"]()

    def left(image, path):
        if path.endswith("d.bmp"):
            raise ValueError(f"{path}: odd")
        return image.crop((0, 0, 8, 8))

    written, skipped = translate_folder(net, folder, tmp_path / "out", size=12, cut=left)
    assert {Image.open(path).size for path in written} == {(12, 12)}
    assert skipped == [f"{folder / 'd.bmp'}: odd"]


def test_folders_and_networks_that_do_not_fit(folder, tmp_path):
    net = GENERATORS["resnet"]()
    with pytest.raises(FileNotFoundError, match="not a folder"):
        translate_folder(net, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        translate_folder(net, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="goes from 2 to 3 channels; image files have 1 or 3"):
        translate_folder(define_generator("unet_16", 2, 3, ngf=1), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
