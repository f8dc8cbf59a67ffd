"""``python -m srpkd.evaluate``: each metric by the command line."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sample_images import noise, save, save_all, save_deep, save_sets
from torch import nn

from srpkd.data.images import DataError
from srpkd.data.listing import image_files
from srpkd.data.synthetic import generate_scenes
from srpkd.evaluate import evaluate, main, parser
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator

pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")


@pytest.fixture
def folders(tmp_path):
    return save_sets(tmp_path)


def run(*arguments):
    return {row["metric"]: row["value"] for row in evaluate(parser().parse_args(list(map(str, arguments))))["rows"]}


@pytest.mark.slow
@pytest.mark.core(0)
def test_fid_and_kid_with_inception(folders, tmp_path, monkeypatch, capsys, one_thread):
    """The real network in the whole command, with random weights instead of the downloaded ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.save({}, tmp_path / "none.pth")
    with monkeypatch.context() as patch:
        patch.setattr(Inception, "load_state_dict", lambda *_: None)
        network = Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "none.pth")
    save_weights(network, tmp_path / "weights.pth")
    for folder in ("generated", "real", "train"):  # two images each: Inception is large
        for path in sorted(folders[folder].iterdir())[2:]:
            path.unlink()
    arguments = [str(folders["generated"]), str(folders["real"]), "--real_train", str(folders["train"])]
    main([*arguments, "--inception_weights", str(tmp_path / "weights.pth"), "--json", str(tmp_path / "x" / "out.json"),
          "--device=cpu"])  # fmt: skip
    rows = json.loads((tmp_path / "x" / "out.json").read_text("utf-8"))["rows"]
    assert [(row["metric"], row["against"]) for row in rows] == [
        (metric, against) for against in ("test", "train + test") for metric in ("FID", "KID", "KID std")
    ]
    assert all(np.isfinite(row["value"]) and row["images"] == 2 for row in rows)
    assert rows[0]["value"] != rows[3]["value"]
    out = capsys.readouterr().out
    assert (
        f"{rows[0]['value']:.4f}" in out
        and "biased upwards" in out
        and "KID against train + test: mean and standard deviation of 100 subsets of 2 " in out
    )


@pytest.mark.parametrize(("package", "metric"), [("torch_fidelity", "fid"), ("torchmetrics.functional.image", "ssim")])
def test_missing_packages(folders, monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r"error: .* needs torch.*: pip install \"srpkd\[metrics\]\""):
        main([str(folders["generated"]), str(folders["generated"]), "--metrics", metric])


def test_psnr_of_images_paired_by_name(tmp_path):
    """The public code writes 00_fake_B.png and 00_real_B.png into one folder."""
    for index, image in enumerate(noise(3, (16, 16, 3))):
        Image.fromarray(image).save(tmp_path / f"{index}_real_B.png")
        Image.fromarray(image // 2).save(tmp_path / f"{index}_fake_B.png")
    patterns = [str(tmp_path / f"*_{kind}_B.png") for kind in ("fake", "real")]
    main([*patterns, "--metrics", "psnr", "--json", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    expected = [20 * np.log10(255 / np.sqrt(np.mean((i // 2 - i.astype(float)) ** 2))) for i in noise(3, (16, 16, 3))]
    assert row == {"metric": "PSNR", "value": pytest.approx(np.mean(expected)), "against": "test", "images": 3}


@pytest.mark.parametrize("name", ["0.png", "0.tif", "float.tif"])
def test_scores_of_deep_images(tmp_path, name):
    """The range is that of the files: 16-bit images that differ by one level have 20 log10(65535) dB."""
    one, other = np.random.default_rng(0).integers(2000, 40000, (2, 16, 16, 1), dtype=np.uint16)
    if name == "float.tif":
        one, other = one / 65535, other / 65535
    save_deep(tmp_path / "a" / name, one)
    save_deep(tmp_path / "b" / name, other)
    found = run(tmp_path / "a", tmp_path / "b", "--metrics", "psnr", "ssim")
    white = 1 if name == "float.tif" else 65535
    expected = 20 * np.log10(white / np.sqrt(np.mean((one.astype(float) - other) ** 2)))
    assert found["PSNR"] == pytest.approx(expected, rel=1e-9) and found["SSIM"] < 0.3
    save_deep(tmp_path / "b" / name, one + 1 if name != "float.tif" else one + 1 / 65535)
    assert run(tmp_path / "a", tmp_path / "b", "--metrics", "psnr")["PSNR"] == pytest.approx(
        20 * np.log10(65535), rel=1e-9
    )


def test_other_files_are_counted(folders, capsys):
    (folders["real"] / "x.heic").touch()
    image = Image.new("RGB", (12, 12))
    image.save(folders["real"] / "p.gif", save_all=True, append_images=[Image.new("RGB", (12, 12), "red")])
    main([str(folders["real"]), str(folders["real"]), "--metrics", "psnr"])
    out = capsys.readouterr().out
    assert out.count(f"{folders['real']}: 1 other file (1 .heic) left out.") == 1
    assert out.count("1 image has further pages or frames, which are not used, such as") == 1


def test_folders_are_listed_once_and_headers_read_once(folders, monkeypatch):
    """On a network drive, each takes milliseconds."""
    scandir, open_image, listed, opened = os.scandir, Image.open, Counter(), Counter()
    monkeypatch.setattr(os, "scandir", lambda path: (listed.update([path]), scandir(path))[1])
    monkeypatch.setattr(
        Image, "open", lambda file, **others: (opened.update([file.name]), open_image(file, **others))[1]
    )

    def fidelity(generated, real, **_):
        assert all(images.have_same_size() for images in [generated, *real["train + test"]])
        return {}

    monkeypatch.setattr("srpkd.evaluate.inception_file", lambda _: None)
    monkeypatch.setattr("srpkd.evaluate.fidelity", fidelity)
    options = ["--real_train", folders["train"], "--metrics", "fid", "psnr"]
    save_all(folders["generated"], noise(7, seed=1))
    run(folders["generated"], folders["real"], *options)
    assert [listed[str(folder)] for folder in folders.values()] == [1, 1, 1]
    assert set(opened.values()) == {1, 2}  # the pixels of pairs are read too
    assert opened[str(folders["train"] / "00.png")] == 1


def test_unreadable_images_end_it_before_the_scores_are_computed(folders, monkeypatch):
    """Also an image that no score needs: what a long computation found would be lost."""
    (folders["real"] / "unpaired.png").touch()
    monkeypatch.setattr("srpkd.evaluate._scores", lambda *_: pytest.fail("the scores were computed"))
    with pytest.raises(DataError, match=r"real/unpaired\.png: not an image"):
        run(folders["generated"], folders["real"], "--metrics", "psnr")


@pytest.mark.parametrize("train_mode_norm", [False, True])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_generator_on_aligned_pairs(tmp_path, direction, train_mode_norm):
    pairs = save_all(tmp_path / "test", noise(3, (16, 32, 3)))
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    net.train(train_mode_norm)
    options = ["--aligned", "--input", pairs, "--metrics", "psnr", "--direction", direction, "--device=cpu"]
    options += ["--train_mode_norm"] if train_mode_norm else []
    found = run(tmp_path / "net.pth", pairs, *options)
    scores = []
    for path in image_files(pairs):
        halves = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float().split(16, dim=2)
        source, target = halves if direction == "AtoB" else halves[::-1]
        with torch.no_grad():
            output = ((net(source[None] / 127.5 - 1)[0] + 1) * 127.5).round()
        scores.append(10 * np.log10(255**2 / (output - target).square().mean().item()))
    assert found == {"PSNR": pytest.approx(np.mean(scores), abs=1e-3)}


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "gif", "avif"])
def test_outputs_of_a_generator_are_not_compressed(tmp_path, suffix):
    """The public data sets are JPEG files; written as such, the outputs would be compressed before they are scored."""
    (tmp_path / "lossy").mkdir()
    (tmp_path / "png").mkdir()
    for i, image in enumerate(noise(2, (24, 24, 3))):
        Image.fromarray(image).save(path := tmp_path / "lossy" / f"{i}.{suffix}")
        Image.open(path).convert("RGB").save(tmp_path / "png" / f"{i}.png")
    save_weights(define_generator("resnet_1blocks", ngf=2, init_gain=0.2), tmp_path / "net.pth")
    one, other = (
        run(tmp_path / "net.pth", tmp_path / "png", "--input", tmp_path / name, "--metrics=psnr", "--device=cpu")
        for name in ("lossy", "png")
    )
    assert one == other


def test_options_of_a_generator(tmp_path, folders):
    save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    with pytest.raises(SystemExit, match=r"is a generator: give the folder .* --input"):
        main([str(tmp_path / "net.pth"), str(folders["real"]), "--metrics=psnr"])
    with pytest.raises(SystemExit, match="--input x needs a generator's weights"):
        main([str(folders["real"]), str(folders["real"]), "--input", "x"])
    with pytest.raises(SystemExit, match=r"--train_mode_norm needs a generator's weights; received images"):
        main([str(folders["real"]), str(folders["real"]), "--train_mode_norm"])
    Image.new("RGB", (9, 9)).save(folders["real"] / "00.png")
    with pytest.raises(SystemExit, match=r"has 12 x 12 pixels and .*00\.png 9 x 9: use --size N"):
        main([str(folders["generated"]), str(folders["real"]), "--metrics=psnr"])
    assert run(folders["generated"], folders["real"], "--metrics", "psnr", "--size", 12)["PSNR"] > 0


def test_miou_by_palette(tmp_path):
    scenes = generate_scenes(3, 16)
    truth = ((scenes.labels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    blurred = np.clip(truth.astype(int) + np.random.default_rng(0).integers(-30, 31, truth.shape), 0, 255)
    folders = save_all(tmp_path / "a", blurred.astype(np.uint8)), save_all(tmp_path / "b", truth)
    perfect = {"mIoU": 100, "pixel accuracy": 100, "class accuracy": 100}
    assert run(*folders, "--metrics", "miou", "--palette", "synthetic") == perfect
    # label maps keep their colours when they are scaled
    assert run(*folders, "--metrics", "miou", "--palette", "synthetic", "--size", 7) == perfect
    with pytest.raises(SystemExit, match="miou needs --palette: synthetic, cityscapes"):
        main([*map(str, folders), "--metrics", "miou"])


class Segmenter(nn.Module):
    """Logits (B, 3, H/2, W/2) that are proportional to red, green and blue."""

    def forward(self, photos):
        return F.avg_pool2d(photos, 2) * 10


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_fcn_scores(tmp_path, kind, recwarn, monkeypatch):
    photo = np.zeros((8, 8, 3), np.uint8)
    photo[:4, :, 0], photo[4:, :4, 1], photo[4:, 4:, 2] = 200, 180, 160
    label = np.zeros((8, 8), np.uint8)
    label[4:, :4], label[4:, 4:] = 1, 0  # where the network predicts class 2
    label[:2] = 255  # ignored
    save_all(tmp_path / "photos", [photo, photo])
    save_all(tmp_path / "labels", [label, label])
    save(tmp_path / "labels" / "0-colours.png", photo)  # as next to the labels of Cityscapes; no photo has this name
    example = torch.rand(1, 3, 8, 8)
    if kind == "torchscript":
        path = tmp_path / "net.pt"
        torch.jit.save(torch.jit.trace(Segmenter(), example), path)
    else:
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(Segmenter(), (example,)), path)
    arguments = [tmp_path / "photos", tmp_path / "photos", "--metrics", "segmentation", "--device=cpu"]
    found = run(*arguments, "--segmenter", path, "--labels", tmp_path / "labels")
    # of 48 scored pixels, 16 of class 0 and 16 of class 1 are right, and 16 of class 0 are predicted as class 2
    assert found == {
        "mIoU": pytest.approx(100 * (16 / 32 + 1 + 0) / 3),
        "pixel accuracy": pytest.approx(100 * 32 / 48),
        "class accuracy": pytest.approx(100 * (0.5 + 1) / 2),
    }
    # the same labels as colours
    (tmp_path / "p").write_text("255 0 0 a\n0 255 0 b\n0 0 255 c\n0 0 0 ignore")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)[np.minimum(label, 3)]
    save_all(tmp_path / "colours", [colours, colours])
    assert found == run(*arguments, "--segmenter", path, "--labels", tmp_path / "colours", "--palette", tmp_path / "p")
    with pytest.raises(ValueError, match=r"is a colour image .* give its --palette"):
        run(*arguments, "--segmenter", path, "--labels", tmp_path / "colours")
    (tmp_path / "labels" / "01.png").write_text("no image")
    monkeypatch.setattr("srpkd.evaluate.segmentation_scores", lambda *_: pytest.fail("photos were segmented"))
    with pytest.raises(DataError, match=r"labels/01\.png: not an image"):
        run(*arguments, "--segmenter", path, "--labels", tmp_path / "labels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("miou", "miou needs --palette"),
        ("miou --palette none.txt", "--palette none.txt: expected synthetic"),
        ("segmentation", "segmentation needs --segmenter"),
        ("segmentation --segmenter none.pt --labels {generated}", "--segmenter none.pt: no such file"),
        (
            "segmentation --segmenter net.pt --labels {train} --palette synthetic",
            "1 of 6 generated images have no label map",
        ),
        ("segmentation --segmenter net.pt --labels {generated}", "is a colour image"),
        ("segmentation --segmenter net.pt --labels {generated} --palette synthetic", "the segmenter returned"),
        ("psnr", "1 of 6 generated images have no real image"),
        ("psnr", r"generated/00.png has 12 x 12 pixels and .*train/00.png 9 x 8: use --size N"),
    ],
)
def test_errors_of_other_metrics_come_before_the_distances(folders, monkeypatch, options, message):
    def fidelity(*_, **__):
        raise AssertionError("the distances, which take long, were computed")

    monkeypatch.setattr("srpkd.evaluate.inception_file", lambda _: None)
    monkeypatch.setattr("srpkd.evaluate.fidelity", fidelity)
    if "net.pt" in options:
        monkeypatch.setattr("srpkd.evaluate.load_segmenter", lambda *_: lambda photos: photos.mean((2, 3)))
    if "pixels" in message:
        save_all(folders["train"], noise(6, (8, 9, 3)))
    with pytest.raises(ValueError, match=message):
        run(folders["generated"], folders["train"], "--metrics", "fid", *options.format(**folders).split())


def test_errors_come_before_images_are_translated(tmp_path, folders, monkeypatch):
    save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    (folders["real"] / "00.png").write_bytes(b"")
    monkeypatch.setattr("srpkd.evaluate.translate_folder", lambda *_, **__: pytest.fail("images were translated"))
    arguments = tmp_path / "net.pth", folders["real"], "--input", folders["generated"], "--metrics"
    with pytest.raises(DataError, match=r"real/00\.png: not an image"):
        run(*arguments, "psnr")
    save_all(folders["real"], noise(1))
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        run(*arguments, "fid", "--inception_weights", "none.pth")
    with pytest.raises(ValueError, match=r"--input .*\*\.png is not a folder"):
        run(*arguments[:3], f"{folders['generated']}/*.png", "--metrics", "psnr")
    with pytest.raises(ValueError, match=r"1 of 6 .* have no real image of the same name, such as .*generated/05.png"):
        run(tmp_path / "net.pth", folders["train"], *arguments[2:], "psnr")
    save_all(folders["train"], noise(6, (8, 9, 3)))
    with pytest.raises(ValueError, match=r"generated/00.png has 12 x 12 pixels and .*train/00.png 9 x 8: use --size"):
        run(tmp_path / "net.pth", folders["train"], *arguments[2:], "psnr")
    monkeypatch.setattr("srpkd.evaluate.inception_file", lambda _: None)
    with pytest.raises(ValueError, match="--kid_subset_size 9: expected 2 to 6, the number of images"):
        run(*arguments, "kid", "--kid_subset_size", 9)
    with pytest.raises(ValueError, match="SSIM needs images of at least 11 x 11 pixels; received a side of 8"):
        run(*arguments, "ssim", "--size", 8)
    with pytest.raises(DataError, match=r"train/00\.png: 9 pixels wide; expected an even width"):
        run(*arguments, "fid", "--aligned", "--real_train", folders["train"])


@pytest.mark.parametrize("metric, function", [("psnr", "similarity"), ("miou", "label_scores")])
def test_errors_are_on_a_line_of_their_own(folders, monkeypatch, capsys, metric, function):
    """The progress bar ends its line before an error is printed."""

    def fail(images, _):
        next(iter(images))
        raise ValueError("expected")

    monkeypatch.setattr(f"srpkd.evaluate.{function}", fail)
    with pytest.raises(ValueError, match="expected") as caught:  # `caught` keeps the frames, as a traceback does
        run(
            folders["real"],
            folders["real"],
            "--metrics",
            metric,
            *(["--palette=synthetic"] if metric == "miou" else []),
        )
    assert capsys.readouterr().err.endswith("\n"), caught
