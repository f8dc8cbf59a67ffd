"""``python -m srpkd.evaluate``: metrics of generated images, through the libraries that define them.

FID and KID run through torch-fidelity with a small feature extractor that is registered with it, and once through
its own Inception with random weights: the real ones are a download.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from srpkd.data.folders import Images
from srpkd.data.synthetic import PALETTE, generate_scenes
from srpkd.evaluate import evaluate_images, find_images, main, pair_up, parser
from srpkd.metrics.fidelity import fidelity
from srpkd.metrics.pixels import similarity
from srpkd.metrics.segmentation import label_scores, load_segmenter, read_palette, segmentation_scores
from srpkd.models.checkpoints import CheckpointError, save_weights
from srpkd.models.networks import define_generator

fidelity_library = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")


class Means(fidelity_library.FeatureExtractorBase):
    """Features (B, 3) of an image: its colours' means, in 0..1."""

    @staticmethod
    def get_provided_features_list():
        return ("means",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "means"

    @staticmethod
    def can_be_compiled():
        return False

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (images.float().mean((2, 3)) / 255,)


fidelity_library.register_feature_extractor("test-means", Means)


def write(folder, images, suffix=".png"):
    """uint8 arrays (H, W, 3) or (H, W) as files 00.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02d}{suffix}")
    return folder


def noise(count, shape=(12, 12, 3), seed=0, low=0, high=256):
    return list(np.random.default_rng(seed).integers(low, high, (count, *shape), dtype=np.uint8))


@pytest.fixture
def folders(tmp_path):
    sets = {"generated": noise(6, seed=1, high=200), "real": noise(7, seed=2), "train": noise(5, seed=3, low=60)}
    return {name: write(tmp_path / name, images) for name, images in sets.items()}


def images(folder):
    return Images(find_images(str(folder)))


# FID and KID


def frechet(a, b):
    """By the definition, with the square root by eigenvalues."""
    mean = a.mean(0) - b.mean(0)
    products = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    roots = np.sqrt(np.clip(products.real, 0, None)).sum()
    return mean @ mean + np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * roots


def kernel(a, b):
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3."""
    k_aa, k_bb, k_ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    m, n = len(a), len(b)
    return (
        (k_aa.sum() - np.trace(k_aa)) / (m * (m - 1)) + (k_bb.sum() - np.trace(k_bb)) / (n * (n - 1)) - 2 * k_ab.mean()
    )


def means(*folders):
    return np.array([image.float().mean((1, 2)).numpy() / 255 for folder in folders for image in images(folder)])


def test_fid_and_kid_are_those_of_their_definitions(folders):
    real = {"test": [images(folders["real"])], "train + test": [images(folders["train"]), images(folders["real"])]}
    found = fidelity(images(folders["generated"]), real, feature_extractor="test-means", kid_subset_size=5)
    ours, test, both = means(folders["generated"]), means(folders["real"]), means(folders["train"], folders["real"])
    assert found["test"]["FID"] == pytest.approx(frechet(ours, test), abs=1e-5)
    assert found["train + test"]["FID"] == pytest.approx(frechet(ours, both), abs=1e-5)
    assert found["test"]["FID"] != pytest.approx(found["train + test"]["FID"], rel=0.01)
    assert found["test"]["KID subset"] == 5 and found["test"]["KID std"] > 0
    # subsets of everything: each is the whole, and so is their mean
    whole = fidelity(
        Images(images(folders["real"]).paths[:6]), {"t": [images(folders["generated"])]}, feature_extractor="test-means"
    )["t"]
    assert whole["KID"] == pytest.approx(kernel(test[:6], ours), abs=1e-5) and whole["KID subset"] == 6


def test_images_of_several_sizes(folders):
    Image.fromarray(noise(1, (9, 31, 3))[0]).save(folders["real"] / "wide.png")
    assert not images(folders["real"]).one_size() and Images(find_images(str(folders["real"])), 8).one_size()
    ours, test = images(folders["generated"]), images(folders["real"])
    found = fidelity(ours, {"test": [test]}, kid=False, feature_extractor="test-means")
    assert found == {
        "test": {"FID": pytest.approx(frechet(means(folders["generated"]), means(folders["real"])), abs=1e-5)}
    }


def test_one_image_has_no_covariance(folders):
    one = Images(images(folders["real"]).paths[:1])
    with pytest.raises(ValueError, match="two images at least; received 1 and 7"):
        fidelity(one, {"test": [images(folders["real"])]}, feature_extractor="test-means")


def test_missing_weights_say_which_file_goes_where(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "weights-inception-2015-12-05-6726825d.pth"
    usual = tmp_path / "hub" / "checkpoints" / name
    with pytest.raises(SystemExit) as caught:
        main([str(folders["generated"]), str(folders["real"]), "--device=cpu"])
    message = str(caught.value)
    assert f"are not at {usual}" in message and f"put it at {usual}" in message
    assert f"Download https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{name}" in message
    both = images(folders["real"]), {"test": [images(folders["real"])]}
    with pytest.raises(FileNotFoundError, match=r"are not at .*mine\.pth\. .*--inception_weights PATH"):
        fidelity(*both, inception_weights=tmp_path / "mine.pth")
    save_weights(nn.Linear(2, 2), usual)
    with pytest.raises(CheckpointError, match="holds other weights than torch-fidelity's Inception"):
        fidelity(*both)
    usual.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        fidelity(*both)


def test_inception_by_path(folders, tmp_path, monkeypatch, capsys, one_thread):
    """The real network and the whole command, with random weights in the place of the downloaded ones."""
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
    rows = json.loads((tmp_path / "x" / "out.json").read_text())["rows"]
    assert [(row["metric"], row["against"]) for row in rows] == [
        (metric, against) for against in ("test", "train + test") for metric in ("FID", "KID", "KID std")
    ]
    assert all(np.isfinite(row["value"]) and row["images"] == 2 for row in rows)
    assert rows[0]["value"] != rows[3]["value"]
    out = capsys.readouterr().out
    assert (
        f"{rows[0]['value']:.4f}" in out
        and "biased upwards" in out
        and "KID against train + test: mean and deviation of 100 subsets of 2 " in out
    )


@pytest.mark.parametrize(("package", "metric"), [("torch_fidelity", "fid"), ("torchmetrics.functional.image", "ssim")])
def test_without_the_extra(folders, monkeypatch, package, metric):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r"error: .* needs torch.*: pip install 'srpkd\[metrics\]'"):
        main([str(folders["generated"]), str(folders["generated"]), "--metrics", metric])


# PSNR and SSIM


def test_psnr_and_ssim_by_hand():
    a = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    b = torch.full((3, 16, 16), 110, dtype=torch.uint8)
    found = similarity([(a, b), (a, a + 1)])
    assert found["PSNR"] == pytest.approx((20 * np.log10(25.5) + 20 * np.log10(255)) / 2)
    c = (0.01 * 255) ** 2  # flat images: what remains is the term of their means
    ssim = [(2 * 100 * x + c) / (100**2 + x**2 + c) for x in (110, 101)]
    assert found["SSIM"] == pytest.approx(np.mean(ssim), abs=1e-6)
    with pytest.raises(ValueError, match="11 x 11"):
        similarity([(a[:, :10], a[:, :10])])


def test_pairs_by_name(folders, tmp_path, capsys):
    """The public code writes 00_fake_B.png and 00_real_B.png into one folder."""
    for index, image in enumerate(noise(3, (16, 16, 3))):
        Image.fromarray(image).save(tmp_path / f"{index}_real_B.png")
        Image.fromarray(image // 2).save(tmp_path / f"{index}_fake_B.png")
    patterns = [str(tmp_path / f"*_{kind}_B.png") for kind in ("fake", "real")]
    main([*patterns, "--metrics", "psnr", "--json", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    expected = [20 * np.log10(255 / np.sqrt(np.mean((i // 2 - i.astype(float)) ** 2))) for i in noise(3, (16, 16, 3))]
    assert row == {"metric": "PSNR", "value": pytest.approx(np.mean(expected)), "against": "test", "images": 3}


def test_images_without_a_partner():
    assert pair_up(["x/a_fake.png", "x/b.jpg"], ["y/b.png", "y/a_real.png", "y/c.png"]) == [
        ("x/a_fake.png", "y/a_real.png"),
        ("x/b.jpg", "y/b.png"),
    ]
    with pytest.raises(ValueError, match=r"1 of 2 generated images have no real image .* such as x/q.png; .* like y/a"):
        pair_up(["x/a.png", "x/q.png"], ["y/a.png"])
    with pytest.raises(ValueError, match="have one name"):
        pair_up(["x/a.png", "x/a.jpg"], ["y/a.png"])


# A generator


def run(*arguments):
    return {
        row["metric"]: row["value"] for row in evaluate_images(parser().parse_args(list(map(str, arguments))))["rows"]
    }


@pytest.mark.parametrize("train_mode_norm", [False, True])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_a_generator_on_aligned_pairs(tmp_path, direction, train_mode_norm):
    pairs = write(tmp_path / "test", noise(3, (16, 32, 3)))
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", init_gain=0.2)
    save_weights(net, tmp_path / "net.pth")
    net.train(train_mode_norm)
    options = ["--aligned", "--input", pairs, "--metrics", "psnr", "--direction", direction, "--device=cpu"]
    options += ["--train_mode_norm"] if train_mode_norm else []
    found = run(tmp_path / "net.pth", pairs, *options)
    scores = []
    for path in find_images(str(pairs)):
        halves = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float().split(16, dim=2)
        source, target = halves if direction == "AtoB" else halves[::-1]
        with torch.no_grad():
            output = ((net(source[None] / 127.5 - 1)[0] + 1) * 127.5).round()
        scores.append(10 * np.log10(255**2 / (output - target).square().mean().item()))
    assert found == {"PSNR": pytest.approx(np.mean(scores), abs=1e-3)}


def test_a_generator_needs_input_and_a_folder_none(tmp_path, folders):
    save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    with pytest.raises(SystemExit, match=r"is a generator: give the folder .* --input"):
        main([str(tmp_path / "net.pth"), str(folders["real"]), "--metrics=psnr"])
    with pytest.raises(SystemExit, match="--input is for a generator's weights"):
        main([str(folders["real"]), str(folders["real"]), "--input", "x"])
    with pytest.raises(SystemExit, match=r"--train_mode_norm is for a generator's weights; .* is images"):
        main([str(folders["real"]), str(folders["real"]), "--train_mode_norm"])
    Image.new("RGB", (9, 9)).save(folders["real"] / "00.png")
    with pytest.raises(SystemExit, match=r"has \(12, 12\) pixels and .*00\.png \(9, 9\): --size N"):
        main([str(folders["generated"]), str(folders["real"]), "--metrics=psnr"])
    assert run(folders["generated"], folders["real"], "--metrics", "psnr", "--size", 12)["PSNR"] > 0


# Label maps


def test_miou_by_palette(tmp_path):
    world = generate_scenes(3, 16)
    truth = ((world.labels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    blurred = np.clip(truth.astype(int) + np.random.default_rng(0).integers(-30, 31, truth.shape), 0, 255)
    folders = write(tmp_path / "a", blurred.astype(np.uint8)), write(tmp_path / "b", truth)
    perfect = {"mIoU": 100, "pixel accuracy": 100, "class accuracy": 100}
    assert run(*folders, "--metrics", "miou", "--palette", "synthetic") == perfect
    # scaled, label maps keep their colours
    assert run(*folders, "--metrics", "miou", "--palette", "synthetic", "--size", 7) == perfect
    with pytest.raises(SystemExit, match="miou needs --palette: synthetic, cityscapes"):
        main([*map(str, folders), "--metrics", "miou"])


def test_colours_that_are_ignored(tmp_path):
    (tmp_path / "palette.txt").write_text("# a comment\n255 0 0 red\n0, 255, 0, green\n0 0 255\n0 0 0 void\n")
    palette = read_palette(str(tmp_path / "palette.txt"))
    assert palette.classes == 3 and palette.colours.tolist()[3] == [0, 0, 0]
    red, green, blue, void = palette.colours.tolist()
    true = torch.tensor([[red, red, green, void]], dtype=torch.uint8).permute(2, 0, 1)
    pred = torch.tensor([[red, void, green, blue]], dtype=torch.uint8).permute(2, 0, 1)
    # red: 1 of 2 found; green: all; blue is nowhere where the truth counts; nothing is said of the last pixel
    assert label_scores([(pred, true)], palette) == {
        "mIoU": pytest.approx(100 * (1 / 2 + 1) / 2),
        "pixel accuracy": pytest.approx(100 * 2 / 3),
        "class accuracy": pytest.approx(75),
    }


def test_palettes():
    cityscapes = read_palette("cityscapes")
    assert cityscapes.classes == 19 and len(torch.unique(cityscapes.colours, dim=0)) == 29
    assert torch.equal(read_palette("synthetic").colours, PALETTE)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "expected synthetic, cityscapes, or a file"), ("", "has no colours"), ("1 2", "'1 2' is not a line"),
     ("1 2 256 x", "numbers of 0 to 255"), ("0 0 0 void", "has no colours")],
)  # fmt: skip
def test_palettes_that_are_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / "p").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_palette(str(tmp_path / "p"))


# FCN scores


class Segmenter(nn.Module):
    """Logits at half the size: how red, green and blue a pixel is."""

    def forward(self, photos):
        return F.avg_pool2d(photos, 2) * 10


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_fcn_scores(tmp_path, kind, recwarn):
    photo = np.zeros((8, 8, 3), np.uint8)
    photo[:4, :, 0], photo[4:, :4, 1], photo[4:, 4:, 2] = 200, 180, 160
    label = np.zeros((8, 8), np.uint8)
    label[4:, :4], label[4:, 4:] = 1, 0  # where the network sees class 2
    label[:2] = 255  # ignored
    write(tmp_path / "photos", [photo, photo])
    write(tmp_path / "labels", [label, label])
    example = torch.rand(1, 3, 8, 8)
    if kind == "torchscript":
        path = tmp_path / "net.pt"
        torch.jit.save(torch.jit.trace(Segmenter(), example), path)
    else:
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(Segmenter(), (example,)), path)
    arguments = [tmp_path / "photos", tmp_path / "photos", "--metrics", "segmentation", "--device=cpu"]
    found = run(*arguments, "--segmenter", path, "--labels", tmp_path / "labels")
    # 48 pixels count: 16 of class 0 and 16 of class 1 right, 16 of class 0 taken for class 2
    assert found == {
        "mIoU": pytest.approx(100 * (16 / 32 + 1 + 0) / 3),
        "pixel accuracy": pytest.approx(100 * 32 / 48),
        "class accuracy": pytest.approx(100 * (0.5 + 1) / 2),
    }
    # the same labels as colours
    (tmp_path / "p").write_text("255 0 0 a\n0 255 0 b\n0 0 255 c\n0 0 0 ignore")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)[np.minimum(label, 3)]
    write(tmp_path / "colours", [colours, colours])
    assert found == run(*arguments, "--segmenter", path, "--labels", tmp_path / "colours", "--palette", tmp_path / "p")
    with pytest.raises(ValueError, match=r"is a colour image .* give its --palette"):
        run(*arguments, "--segmenter", path, "--labels", tmp_path / "colours")


def test_segmenters_of_torchvisions_kind_and_of_none(folders):
    photos = images(folders["real"])
    labels = [torch.zeros(12, 12, dtype=torch.int64)] * len(photos)
    plain = segmentation_scores(photos, labels, Segmenter())
    assert plain == segmentation_scores(photos, labels, lambda x: {"out": Segmenter()(x), "aux": None})
    with pytest.raises(ValueError, match=r"the segmenter gave \(1, 3\); expected logits \(1, K, h, w\)"):
        segmentation_scores(photos, labels, lambda x: x.mean((2, 3)))


def test_segmenters_that_are_no_files_of_one(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_segmenter(tmp_path / "net.pt")
    for name in ("net.pt", "net.pt2"):
        torch.save({}, tmp_path / name)
        with pytest.raises(ValueError, match=r"neither TorchScript .* nor, as .pt2, an exported program"):
            load_segmenter(tmp_path / name)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images there; expected a folder of images, or a pattern"):
        find_images(str(tmp_path / "*.gif"))
