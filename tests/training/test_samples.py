"""Sample images and relation maps of networks whose outputs are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known_outputs import PHOTO_TO_LABEL, SCENES, folder, options, scenes
from PIL import Image
from torch import Tensor, nn

from srpkd.models.networks import define_generator
from srpkd.reporting import pictures
from srpkd.reporting.pictures import relation_picture
from srpkd.training.samples import tapped_feature, write_relation_maps, write_samples


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).long()


def as_pixels(image: Tensor) -> Tensor:
    return ((image + 1) * 127.5).round().clamp(0, 255).long()


def test_samples_have_input_outputs_and_target(tmp_path):
    shown = {"teacher": {"G": PHOTO_TO_LABEL}, "a student": {"G": nn.Identity()}}
    samples = write_samples(tmp_path, shown, scenes(), options(model="pix2pix", samples=2))
    assert [sample["caption"] for sample in samples] == ["test image 0", "test image 1"]
    for index, sample in enumerate(samples):
        files = {entry["label"]: tmp_path / entry["file"] for entry in sample["images"]}
        assert list(files) == ["input", "teacher", "a student", "truth"]
        photo, label = as_pixels(SCENES.photos[index]), as_pixels(SCENES.labels[index])
        for name, expected in {"input": photo, "teacher": label, "a student": photo, "truth": label}.items():
            assert torch.equal(pixels(files[name]), expected)


def test_samples_show_every_direction_of_any_network(tmp_path):
    net = nn.Identity()
    config = options(dataroot="x", model="cycle_gan", dataset_mode="unaligned", samples=1)
    shown = {"teacher": {"G_A": net}, "student": {"G_A": net, "G_B": net}}
    samples = write_samples(tmp_path, shown, folder([8, 8]), config)
    labels = {sample["caption"]: [entry["label"] for entry in sample["images"]] for sample in samples}
    assert labels == {
        "test image 0 A to B": ["input", "teacher", "student"],
        "test image 0 B to A": ["input", "student"],
    }
    assert len({entry["file"] for sample in samples for entry in sample["images"]}) == 5


def test_pictures_of_large_images_are_previews(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PREVIEW_SIDE", 16)
    dataset = [{"A": torch.rand(3, 32, 64), "B": torch.rand(3, 32, 64)}]
    net = define_generator("resnet_1blocks", ngf=2).eval()  # its map has 8 x 16 pixels
    config = options(dataroot="x", dataset_mode="aligned", model="pix2pix")
    shown = {"student": {"G": net}}
    [sample] = write_samples(tmp_path, shown, dataset, config)
    [relation] = write_relation_maps(tmp_path, shown, dataset, config, places=[(0.5, 0.75)])
    files = {entry["label"]: pixels(tmp_path / entry["file"]) for entry in [*sample["images"], *relation["panels"]]}
    assert {tuple(picture.shape) for picture in files.values()} == {(3, 8, 16)}
    expected = {"input": dataset[0]["A"], "truth": dataset[0]["B"]}
    for label, image in expected.items():
        assert (files[label] - as_pixels(F.avg_pool2d(image, 4))).abs().max() <= 1
    framed = (files["the chosen pixel"] != files["input"]).any(0)
    assert framed[3:6, 11:14].tolist() == [[True] * 3, [True, False, True], [True] * 3]


def test_what_has_not_changed_is_not_drawn_again(tmp_path):
    """A page is written a thousand times in a run; only the network that learns changes."""
    calls = []

    def network(name: str) -> nn.Module:
        net = define_generator("resnet_1blocks", ngf=2).eval()
        net.register_forward_hook(lambda *_: calls.append(name))
        return net

    class Counted(list):
        def __getitem__(self, index):
            calls.append("read")
            return super().__getitem__(index)

    dataset, config = Counted(folder([16, 16])), options(dataroot="x", dataset_mode="aligned", model="pix2pix")
    shown, drawn = {"teacher": {"G": network("teacher")}, "student": {"G": network("old")}}, {}

    def write() -> tuple[Any, dict[Path, bytes], list[str]]:
        calls.clear()
        entries = [
            function(tmp_path, shown, dataset, config, drawn=drawn) for function in (write_samples, write_relation_maps)
        ]
        return entries, {path: path.read_bytes() for path in tmp_path.rglob("*.png")}, sorted(calls)

    first, files, called = write()
    assert called == ["old"] * 4 + ["read"] * 4 + ["teacher"] * 4
    assert write() == (first, files, [])
    shown["student"] = {"G": network("new")}
    entries, changed, called = write()
    assert entries == first and called == ["new"] * 4 + ["read"] * 4
    assert {path.name for path in files if files[path] != changed[path]} == {
        f"{prefix}_2.png" for prefix in ("000G", "001G", "relation000", "relation001")
    }


@pytest.mark.parametrize(("samples", "count"), [(0, 0), (5, 2)])
def test_number_of_samples(tmp_path, samples, count):
    config = options(dataroot="x", dataset_mode="aligned", model="pix2pix", samples=samples)
    assert len(write_samples(tmp_path, {"student": {"G": nn.Identity()}}, folder([8, 8]), config)) == count
    assert write_samples(tmp_path, {}, folder([8, 8]), config) == []


def test_relation_maps_are_those_of_the_tapped_layer(tmp_path):
    teacher, student = (define_generator("resnet_1blocks", ngf=ngf).eval() for ngf in (3, 2))
    config = options(model="pix2pix", normalize="cosine", layers={"model.10": "model.9"})
    shown = {"teacher": {"G": teacher}, "student": {"G": student}}
    image = SCENES.photos[0][:, :, :8]
    relations = write_relation_maps(tmp_path, shown, [{"A": image, "B": image}], config, places=[(0.5, 0.5)])
    assert all(not module._forward_hooks for net in (teacher, student) for module in net.modules())
    [relation] = relations
    files = {entry["label"]: tmp_path / entry["file"] for entry in relation["panels"]}
    assert list(files) == ["the chosen pixel", "teacher", "student"]
    with torch.no_grad():
        features = {
            "teacher": teacher.model[:10](image[None])[0],
            "student": student.model[:11](image[None])[0],
        }
    for name, feature in features.items():
        expected = relation_picture(feature, (2, 1), (16, 8), "cosine")  # of a map of 4 x 2
        assert torch.equal(pixels(files[name]), torch.tensor(expected).permute(2, 0, 1).long())
    assert write_relation_maps(tmp_path, {}, scenes(), config) == []


@pytest.mark.parametrize(("is_teacher", "layer"), [(True, "model.6"), (False, "model.3")])
def test_the_first_of_several_layers_is_shown(is_teacher, layer):
    net = define_generator("resnet_1blocks", ngf=2).eval()
    config = options(layers={"model.3": "model.6", "model.9": "model.9"})
    expected = {"model.3": (2, 16, 16), "model.6": (4, 8, 8)}[layer]
    assert tuple(tapped_feature(net, is_teacher, SCENES.photos[0], config).shape) == expected
    assert tuple(tapped_feature(net, is_teacher, SCENES.photos[0], options()).shape) == (8, 4, 4)
    unet = define_generator("unet_16", ngf=2).eval()  # a variant's architecture, without such layers
    assert tuple(tapped_feature(unet, is_teacher, SCENES.photos[0], config).shape) == (2, 8, 8)
