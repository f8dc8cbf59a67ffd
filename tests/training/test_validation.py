import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from srpkd.data.batches import collate, sides
from srpkd.data.synthetic import generate_scenes, open_synthetic, paint
from srpkd.models.networks import define_generator
from srpkd.reporting.pictures import relation_picture
from srpkd.training.options import TrainConfig
from srpkd.training.validation import evaluate, metric_columns, show_relations, show_samples, tapped_feature

COUNT = 33  # one more than a batch of the test holds
WORLD = generate_scenes(COUNT, 16, seed=5)
OFFSETS = torch.linspace(0.01, 0.5, COUNT)


def options(**others) -> TrainConfig:
    return TrainConfig(
        **{"dataroot": ":synthetic:", "synthetic_size": 16, "netG": "resnet_1blocks", "device": "cpu"} | others
    )


class Lookup(nn.Module):
    """Answers an image that it knows with the one that belongs to it."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        same = (x[:, None] == self.inputs[None]).flatten(2).all(2)
        assert same.any(1).all(), "an image that is not of the test set"
        return self.outputs[same.int().argmax(1)]


PHOTO_TO_LABEL = Lookup(WORLD.photos, WORLD.labels)
# off by another constant for each image, so that every image has another PSNR
LABEL_TO_PHOTO = Lookup(WORLD.labels, WORLD.photos + OFFSETS.view(-1, 1, 1, 1))
PSNR = (10 * torch.log10(4 / OFFSETS.double() ** 2)).mean().item()


def world(direction: str = "AtoB"):
    return open_synthetic(WORLD, direction)


# Numbers


def test_the_truth_scores_100():
    assert evaluate({"G": PHOTO_TO_LABEL}, world(), options(model="pix2pix"), {}) == {"mIoU": 100, "accuracy": 100}


def test_a_known_mistake_scores_what_it_must():
    classes = WORLD.classes.clone()
    wrong = classes == 0
    classes[wrong] = 1  # all of one class is taken for another
    found = evaluate({"G": Lookup(WORLD.photos, paint(classes))}, world(), options(model="pix2pix"), {})
    zeros, ones = wrong.sum().item(), (WORLD.classes == 1).sum().item()
    assert found["accuracy"] == pytest.approx(100 * (1 - zeros / classes.numel()))
    assert found["mIoU"] == pytest.approx(100 * (0 + ones / (ones + zeros) + 4) / 6)


def test_psnr_counts_every_image_once_whatever_the_batches():
    found = evaluate({"G": LABEL_TO_PHOTO}, world("BtoA"), options(model="pix2pix", direction="BtoA"), {})
    assert found == {"psnr": pytest.approx(PSNR, abs=1e-3)}


@pytest.mark.parametrize(("direction", "labels", "photos"), [("AtoB", "G_A", "G_B"), ("BtoA", "G_B", "G_A")])
def test_both_directions_of_cycle_gan(direction, labels, photos):
    config = options(model="cycle_gan", direction=direction)
    generators = {labels: PHOTO_TO_LABEL, photos: LABEL_TO_PHOTO}
    names = {"G_A": "A to B", "G_B": "B to A"}
    assert evaluate(generators, world(direction), config, {}) == {
        f"mIoU {names[labels]}": 100,
        f"accuracy {names[labels]}": 100,
        f"psnr {names[photos]}": pytest.approx(PSNR, abs=1e-3),
    }


def test_likeness_to_the_teacher_where_there_is_one():
    teacher = Lookup(WORLD.photos, WORLD.labels + OFFSETS.view(-1, 1, 1, 1))
    generators = {"G_A": PHOTO_TO_LABEL, "G_B": LABEL_TO_PHOTO}
    found = evaluate(generators, world(), options(model="cycle_gan"), {"G_A": teacher})
    assert found["teacher_psnr A to B"] == pytest.approx(PSNR, abs=1e-3)
    assert "teacher_psnr B to A" not in found
    same = evaluate({"G": PHOTO_TO_LABEL}, world(), options(model="pix2pix"), {"G": PHOTO_TO_LABEL})
    assert same["teacher_psnr"] == math.inf


def folder(sizes: list[int], offset: float = 0.1) -> list[dict[str, Tensor]]:
    """Items as those of a folder, which may differ in size: B is A and a bit."""
    items = [{"A": torch.rand(3, size, size)} for size in sizes]
    return [item | {"B": item["A"] + offset} for item in items]


def test_pairs_in_folders_have_a_truth_and_unpaired_images_none():
    items, net = folder([8, 12, 16]), nn.Identity()
    aligned = options(dataroot="x", model="pix2pix", dataset_mode="aligned")
    assert evaluate({"G": net}, items, aligned, {}) == {"psnr": pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)}
    unaligned = options(dataroot="x", model="cycle_gan", dataset_mode="unaligned")
    assert evaluate({"G_A": net, "G_B": net}, items, unaligned, {}) == {}
    found = evaluate({"G_A": net, "G_B": net}, items, unaligned, {"G_A": nn.Tanh()})
    assert found.keys() == {"teacher_psnr A to B"}


def test_a_folders_colours_are_no_classes():
    """Pairs of a folder are scored by PSNR, also if they are label maps."""
    items = [{"A": photo, "B": label} for photo, label in zip(WORLD.photos[:2], WORLD.labels[:2])]
    config = options(dataroot="x", model="pix2pix", dataset_mode="aligned")
    assert evaluate({"G": PHOTO_TO_LABEL}, items, config, {}) == {"psnr": math.inf}


def test_generators_are_run_without_gradients():
    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return x

    evaluate({"G": Watch()}, world(), options(model="pix2pix"), {"G": Watch()})


# The table's columns


def test_columns_are_what_some_row_has_in_a_fixed_order():
    rows = [{"parameters": 3, "psnr B to A": 1.0}, {"teacher_psnr A to B": 2.0, "mIoU A to B": 3.0, "psnr B to A": 4.0}]
    columns = metric_columns(rows)
    assert [column["key"] for column in columns] == ["mIoU A to B", "psnr B to A", "teacher_psnr A to B"]
    assert [column["label"] for column in columns] == ["mIoU % A to B", "PSNR dB B to A", "PSNR to teacher dB A to B"]
    assert all(column["help"] and format(1.0, column["format"]) for column in columns)
    assert metric_columns([{"parameters": 3}]) == []


@pytest.mark.parametrize(
    ("direction", "expected"), [("G", ("A", "B")), ("G_A", ("A", "B")), ("G_B", ("B", "A"))], ids=str
)
def test_which_side_is_the_input(direction, expected):
    assert sides(direction) == expected


def test_collate_stacks_both_sides():
    batch = collate([world()[0], world()[1]])
    assert batch.keys() == {"A", "B"}
    assert torch.equal(batch["A"], WORLD.photos[:2]) and torch.equal(batch["B"], WORLD.labels[:2])


# Pictures


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).long()


def as_pixels(image: Tensor) -> Tensor:
    return ((image + 1) * 127.5).round().clamp(0, 255).long()


def test_samples_show_input_networks_and_truth(tmp_path):
    shown = {"teacher": {"G": PHOTO_TO_LABEL}, "a student": {"G": nn.Identity()}}
    samples = show_samples(tmp_path, shown, world(), options(model="pix2pix", samples=2))
    assert [sample["caption"] for sample in samples] == ["test image 0", "test image 1"]
    for index, sample in enumerate(samples):
        files = {entry["label"]: tmp_path / entry["file"] for entry in sample["images"]}
        assert list(files) == ["input", "teacher", "a student", "truth"]
        photo, label = as_pixels(WORLD.photos[index]), as_pixels(WORLD.labels[index])
        for name, expected in {"input": photo, "teacher": label, "a student": photo, "truth": label}.items():
            assert torch.equal(pixels(files[name]), expected)


def test_samples_show_every_direction_that_some_network_knows(tmp_path):
    net = nn.Identity()
    config = options(dataroot="x", model="cycle_gan", dataset_mode="unaligned", samples=1)
    shown = {"teacher": {"G_A": net}, "student": {"G_A": net, "G_B": net}}
    samples = show_samples(tmp_path, shown, folder([8, 8]), config)
    labels = {sample["caption"]: [entry["label"] for entry in sample["images"]] for sample in samples}
    assert labels == {
        "test image 0 A to B": ["input", "teacher", "student"],
        "test image 0 B to A": ["input", "student"],
    }
    assert len({entry["file"] for sample in samples for entry in sample["images"]}) == 5


@pytest.mark.parametrize(("samples", "count"), [(0, 0), (5, 2)])
def test_there_are_no_more_samples_than_images(tmp_path, samples, count):
    config = options(dataroot="x", dataset_mode="aligned", model="pix2pix", samples=samples)
    assert len(show_samples(tmp_path, {"student": {"G": nn.Identity()}}, folder([8, 8]), config)) == count
    assert show_samples(tmp_path, {}, folder([8, 8]), config) == []


def test_relations_are_those_of_the_tapped_layer(tmp_path):
    teacher, student = (define_generator("resnet_1blocks", ngf=ngf).eval() for ngf in (3, 2))
    config = options(model="pix2pix", normalize="cosine", layers={"model.10": "model.9"})
    shown = {"teacher": {"G": teacher}, "student": {"G": student}}
    relations = show_relations(tmp_path, shown, world(), config, places=[(0.5, 0.25)])
    [relation] = relations
    files = {entry["label"]: tmp_path / entry["file"] for entry in relation["panels"]}
    assert list(files) == ["the chosen pixel", "teacher", "student"]
    with torch.no_grad():
        features = {
            "teacher": teacher.model[:10](WORLD.photos[:1])[0],
            "student": student.model[:11](WORLD.photos[:1])[0],
        }
    for name, feature in features.items():
        expected = relation_picture(feature, (2, 1), (16, 16), "cosine")  # of a map of 4 x 4
        assert torch.equal(pixels(files[name]), torch.tensor(expected).permute(2, 0, 1).long())
    assert show_relations(tmp_path, {}, world(), config) == []
    assert all(not module._forward_hooks for net in (teacher, student) for module in net.modules())


@pytest.mark.parametrize(("is_teacher", "layer"), [(True, "model.6"), (False, "model.3")])
def test_the_first_of_several_layers_is_shown(is_teacher, layer):
    net = define_generator("resnet_1blocks", ngf=2).eval()
    config = options(layers={"model.3": "model.6", "model.9": "model.9"})
    expected = {"model.3": (2, 16, 16), "model.6": (4, 8, 8)}[layer]
    assert tuple(tapped_feature(net, is_teacher, WORLD.photos[0], config).shape) == expected
    assert tuple(tapped_feature(net, is_teacher, WORLD.photos[0], options()).shape) == (8, 4, 4)
    unet = define_generator("unet_16", ngf=2).eval()  # an variant's, which has no such layers
    assert tuple(tapped_feature(unet, is_teacher, WORLD.photos[0], config).shape) == (2, 8, 8)
