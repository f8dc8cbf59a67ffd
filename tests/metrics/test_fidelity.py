"""FID and KID, with a small feature extractor that is registered with torch-fidelity."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import noise, save_deep, save_sets
from torch import nn
from wrong_files import full_disk

from srpkd.data.images import ImageFiles
from srpkd.data.listing import image_files
from srpkd.files import WriteError
from srpkd.metrics.fidelity import fidelity
from srpkd.models.checkpoints import CheckpointError, load_weights, save_weights

fidelity_library = pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")


class Means(fidelity_library.FeatureExtractorBase):
    """Features (B, 3): the mean of each colour channel, in 0..1."""

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


@pytest.fixture
def folders(tmp_path):
    return save_sets(tmp_path)


def images(folder):
    return ImageFiles(image_files(folder))


def frechet(a, b):
    """FID by its definition, with the matrix square root by eigenvalues."""
    mean = a.mean(0) - b.mean(0)
    products = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    roots = np.sqrt(np.clip(products.real, 0, None)).sum()
    return mean @ mean + np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * roots


def kernel(a, b):
    """KID by its definition: unbiased MMD^2 with the kernel (x.y / d + 1)^3."""
    k_aa, k_bb, k_ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    m, n = len(a), len(b)
    return (
        (k_aa.sum() - np.trace(k_aa)) / (m * (m - 1)) + (k_bb.sum() - np.trace(k_bb)) / (n * (n - 1)) - 2 * k_ab.mean()
    )


def means(*folders):
    return np.array([image.float().mean((1, 2)).numpy() / 255 for folder in folders for image in images(folder)])


def test_fid_and_kid_agree_with_their_definitions(folders):
    real = {"test": [images(folders["real"])], "train + test": [images(folders["train"]), images(folders["real"])]}
    found = fidelity(images(folders["generated"]), real, feature_extractor="test-means", kid_subset_size=5)
    ours, test, both = means(folders["generated"]), means(folders["real"]), means(folders["train"], folders["real"])
    assert found["test"]["FID"] == pytest.approx(frechet(ours, test), abs=1e-5)
    assert found["train + test"]["FID"] == pytest.approx(frechet(ours, both), abs=1e-5)
    assert found["test"]["FID"] != pytest.approx(found["train + test"]["FID"], rel=0.01)
    assert found["test"]["KID subset"] == 5 and found["test"]["KID std"] > 0
    # every subset has all images: the mean over the subsets is the KID of all images
    whole = fidelity(
        ImageFiles(images(folders["real"]).paths[:6]),
        {"t": [images(folders["generated"])]},
        feature_extractor="test-means",
    )["t"]
    assert whole["KID"] == pytest.approx(kernel(test[:6], ours), abs=1e-5) and whole["KID subset"] == 6


def test_images_of_different_sizes(folders):
    Image.fromarray(noise(1, (9, 31, 3))[0]).save(folders["real"] / "wide.png")
    assert not images(folders["real"]).have_same_size()
    ours, test = images(folders["generated"]), images(folders["real"])
    found = fidelity(ours, {"test": [test]}, kid=False, feature_extractor="test-means")
    assert found == {
        "test": {"FID": pytest.approx(frechet(means(folders["generated"]), means(folders["real"])), abs=1e-5)}
    }


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"generated": ["a.png"]}, TypeError, r"generated: expected ImageFiles\(paths\), received list"),
        ({"real": {}}, ValueError, "real={}: expected {name: "),
        ({"real": {"test": ImageFiles(["a"])}}, ValueError, r"expected {name: \[ImageFiles\(paths\), ...\], ...}"),
        ({"fid": False, "kid": False}, ValueError, "fid and kid are both False, expected"),
        ({"batch_size": 0}, ValueError, "batch_size=0: expected an integer >= 1"),
    ],
)
def test_wrong_arguments(given, error, message):
    images = ImageFiles(["a"])
    with pytest.raises(error, match=message):
        fidelity(**{"generated": images, "real": {"test": [images]}, **given})


def test_one_image_is_not_enough(folders):
    one = ImageFiles(images(folders["real"]).paths[:1])
    with pytest.raises(ValueError, match="at least two images; received 1 and 7"):
        fidelity(one, {"test": [images(folders["real"])]}, feature_extractor="test-means")


@pytest.mark.parametrize("size", [1, 7])
def test_subsets_of_kid_fit_the_images(folders, monkeypatch, size):
    """Of one image, KID would be NaN; that there are too few images would show after hours."""
    monkeypatch.setattr(fidelity_library, "calculate_metrics", None)
    message = f"--kid_subset_size {size}: expected 2 to 6, the number of images"
    both = images(folders["generated"]), {"train + test": [images(folders["train"]), images(folders["real"])]}
    with pytest.raises(ValueError, match=message):
        fidelity(*both, feature_extractor="test-means", kid_subset_size=size)


def test_missing_and_wrong_inception_weights(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "weights-inception-2015-12-05-6726825d.pth"
    default = tmp_path / "hub" / "checkpoints" / name
    both = images(folders["generated"]), {"test": [images(folders["real"])]}
    with pytest.raises(FileNotFoundError) as caught:
        fidelity(*both)
    message = str(caught.value)
    assert f"are not at {default}" in message and f"put it at {default}" in message
    assert f"Download https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{name}" in message
    with pytest.raises(FileNotFoundError, match=r"are not at .*mine\.pth\. .*--inception_weights PATH"):
        fidelity(*both, inception_weights=tmp_path / "mine.pth")
    save_weights(nn.Linear(2, 2), default)
    with pytest.raises(CheckpointError, match="holds other weights than torch-fidelity's Inception"):
        fidelity(*both)
    default.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        fidelity(*both)


def test_given_inception_weights_are_used(folders, monkeypatch, tmp_path):
    """Otherwise torch-fidelity would download its own. They are read once, unless the file changes."""
    torch.save({"Mixed_7c.branch_pool.conv.weight": torch.zeros(1)}, tmp_path / "mine.pth")
    asked = {}
    monkeypatch.setattr(
        fidelity_library,
        "calculate_metrics",
        lambda **options: asked.update(options) or {"frechet_inception_distance": 1.0},
    )
    both = images(folders["generated"]), {"test": [images(folders["real"])]}
    read = []
    monkeypatch.setattr("srpkd.metrics.fidelity.load_weights", lambda file: read.append(file) or load_weights(file))
    for _ in range(2):
        fidelity(*both, kid=False, inception_weights=tmp_path / "mine.pth")
    assert read == [tmp_path / "mine.pth"]
    assert asked["feature_extractor"] == "inception-v3-compat"
    assert asked["feature_extractor_weights_path"] == str(tmp_path / "mine.pth")
    save_weights(nn.Linear(2, 2), tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match="holds other weights"):
        fidelity(*both, inception_weights=tmp_path / "mine.pth")


def test_deep_images_are_rounded_to_8_bits(folders, tmp_path):
    for kind in ("generated", "real"):
        for path in images(folders[kind]).paths:
            pixels = np.array(Image.open(path)).astype(np.uint16) * 257
            save_deep(tmp_path / kind / Path(path).with_suffix(".png").name, pixels)
    options = {"kid": False, "feature_extractor": "test-means"}
    expected = fidelity(images(folders["generated"]), {"test": [images(folders["real"])]}, **options)
    deep = [images(tmp_path / kind) for kind in ("generated", "real")]
    assert fidelity(deep[0], {"test": [deep[1]]}, **options) == expected


def test_the_gpu_of_the_option_computes(folders, monkeypatch):
    """torch-fidelity takes no number of a GPU, but uses the current one."""
    entered: list[str] = []
    found = {"frechet_inception_distance": 1.0}

    def calculate(**options):
        assert options["cuda"] and not options["save_cpu_ram"]
        entered.append("calculate")
        return found

    def current(device):
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(fidelity_library, "calculate_metrics", calculate)
    real = {"test": [images(folders["real"])]}
    fidelity(images(folders["generated"]), real, kid=False, device="cuda:1", feature_extractor="test-means")
    assert entered == ["cuda:1", "calculate"]


def test_full_disk_of_temporary_files(folders):
    one, other, _ = (images(folder) for folder in folders.values())
    message = r"cannot be written: File too large; make room on that disk"
    with full_disk(10), pytest.raises(WriteError, match=message):
        fidelity(one, {"test": [other]}, feature_extractor="test-means")
