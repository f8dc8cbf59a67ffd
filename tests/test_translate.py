"""``python -m srpkd.translate``: the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import save_mixed
from torch import nn

from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator
from srpkd.translate import main


@pytest.fixture
def folder(tmp_path):
    return save_mixed(tmp_path / "photos")


def test_train_mode_norm(folder, tmp_path, capsys):
    """As in pix2pix, each image gets the output of batch norms in training mode on this image alone."""
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=True, init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    for module in net.modules():  # but not dropout
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


def test_unreadable_images_are_reported_and_skipped(folder, tmp_path, capsys):
    data = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("hello")
    save_weights(define_generator("resnet_1blocks", ngf=2, init_gain=0.2), tmp_path / "net.pth")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "net.pth"), str(folder), str(tmp_path / "out"), "--device", "cpu"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == f"7 images written to {tmp_path / 'out'}, 2 skipped\n"
    assert f"skipped {folder / 'cut.jpg'}: damaged or truncated" in err
    assert f"skipped {folder / 'text.png'}: not an image" in err
    assert not (tmp_path / "out" / "cut.jpg").exists() and (tmp_path / "out" / "grey.png").exists()


def test_results_are_overwritten_only_with_force(folder, tmp_path, capsys):
    save_weights(define_generator("resnet_1blocks", ngf=2, init_gain=0.2), tmp_path / "net.pth")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.webp").write_bytes(b"mine")
    arguments = [str(tmp_path / "net.pth"), str(folder), str(tmp_path / "out"), "--device=cpu"]
    with pytest.raises(SystemExit, match=r"1 of the results exist already, such as .*a\.webp: use --force"):
        main(arguments)
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.webp"]
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() == b"mine"
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--force"])
    assert caught.value.code == 0
    assert (tmp_path / "out" / "deep" / "a.webp").read_bytes() != b"mine"
    assert "7 images written" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"antialias": "both"}, {"antialias": "down"}, {"norm": "none"}], ids=str)
def test_generators_of_cut(tmp_path, options):
    net = define_generator("resnet_2blocks", ngf=2, init_gain=0.3, **options).eval()
    torch.save(net.state_dict(), tmp_path / "latest_net_G.pth")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    for name, image in {"fits": pixels, "padded": pixels[:19, :30]}.items():
        Image.fromarray(image).save(tmp_path / "photos" / f"{name}.png")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "latest_net_G.pth"), str(tmp_path / "photos"), str(tmp_path / "out"), "--device=cpu"])
    assert caught.value.code == 0
    with torch.no_grad():
        output = net(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    expected = ((output + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert expected.std() > 1
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "fits.png")), expected)
    assert Image.open(tmp_path / "out" / "padded.png").size == (30, 19)
