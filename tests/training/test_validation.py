"""Metrics of generators whose outputs are known."""

import math

import pytest
import torch
from known_outputs import COUNT, PHOTO_TO_LABEL, SCENES, Lookup, folder, options, scenes
from torch import Tensor, nn

from srpkd.data.batches import collate, sides
from srpkd.data.synthetic import paint
from srpkd.finite import NonFiniteError
from srpkd.training.validation import evaluate, metric_columns

OFFSETS = torch.linspace(0.01, 0.5, COUNT)
# a different constant offset for each image, so that each has a different PSNR
LABEL_TO_PHOTO = Lookup(SCENES.labels, SCENES.photos + OFFSETS.view(-1, 1, 1, 1))
PSNR = (10 * torch.log10(4 / OFFSETS.double() ** 2)).mean().item()


# Metrics


def test_a_perfect_generator_scores_100():
    assert evaluate({"G": PHOTO_TO_LABEL}, scenes(), options(model="pix2pix"), {}) == {"mIoU": 100, "accuracy": 100}


def test_scores_of_a_known_mistake():
    classes = SCENES.classes.clone()
    wrong = classes == 0
    classes[wrong] = 1  # class 0 is always mistaken for class 1
    found = evaluate({"G": Lookup(SCENES.photos, paint(classes))}, scenes(), options(model="pix2pix"), {})
    zeros, ones = wrong.sum().item(), (SCENES.classes == 1).sum().item()
    assert found["accuracy"] == pytest.approx(100 * (1 - zeros / classes.numel()))
    assert found["mIoU"] == pytest.approx(100 * (0 + ones / (ones + zeros) + 4) / 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite(value):
    """NaN would count as one of the classes."""
    config = options(model="pix2pix")
    broken = Lookup(SCENES.photos, torch.full_like(SCENES.photos, value))
    with pytest.raises(NonFiniteError, match="student: the output of G for a test image is not finite"):
        evaluate({"G": broken}, scenes(), config, {})
    with pytest.raises(NonFiniteError, match=r"the teacher's output for a test image is not finite .* another"):
        evaluate({"G": PHOTO_TO_LABEL}, scenes(), config, {"G": broken})


def test_psnr_counts_every_image_once():
    found = evaluate({"G": LABEL_TO_PHOTO}, scenes("BtoA"), options(model="pix2pix", direction="BtoA"), {})
    assert found == {"psnr": pytest.approx(PSNR, abs=1e-3)}


@pytest.mark.parametrize(("direction", "labels", "photos"), [("AtoB", "G_A", "G_B"), ("BtoA", "G_B", "G_A")])
def test_both_directions_of_cycle_gan(direction, labels, photos):
    config = options(model="cycle_gan", direction=direction)
    generators = {labels: PHOTO_TO_LABEL, photos: LABEL_TO_PHOTO}
    names = {"G_A": "A to B", "G_B": "B to A"}
    assert evaluate(generators, scenes(direction), config, {}) == {
        f"mIoU {names[labels]}": 100,
        f"accuracy {names[labels]}": 100,
        f"psnr {names[photos]}": pytest.approx(PSNR, abs=1e-3),
    }


def test_images_are_read_once_for_both_directions():
    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    config = options(dataroot="x", model="cycle_gan", dataset_mode="unaligned")
    evaluate({"G_A": nn.Identity(), "G_B": nn.Identity()}, Counted(folder([8, 9, 8])), config, {})
    assert read == [0, 1, 2]


def test_psnr_to_the_teacher():
    teacher = Lookup(SCENES.photos, SCENES.labels + OFFSETS.view(-1, 1, 1, 1))
    generators = {"G_A": PHOTO_TO_LABEL, "G_B": LABEL_TO_PHOTO}
    found = evaluate(generators, scenes(), options(model="cycle_gan"), {"G_A": teacher})
    assert found["teacher_psnr A to B"] == pytest.approx(PSNR, abs=1e-3)
    assert "teacher_psnr B to A" not in found
    same = evaluate({"G": PHOTO_TO_LABEL}, scenes(), options(model="pix2pix"), {"G": PHOTO_TO_LABEL})
    assert same["teacher_psnr"] == math.inf


def test_pairs_in_folders_have_targets_and_unpaired_images_do_not():
    items, net = folder([8, 12, 16]), nn.Identity()
    aligned = options(dataroot="x", model="pix2pix", dataset_mode="aligned")
    assert evaluate({"G": net}, items, aligned, {}) == {"psnr": pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)}
    unaligned = options(dataroot="x", model="cycle_gan", dataset_mode="unaligned")
    assert evaluate({"G_A": net, "G_B": net}, items, unaligned, {}) == {}
    found = evaluate({"G_A": net, "G_B": net}, items, unaligned, {"G_A": nn.Tanh()})
    assert found.keys() == {"teacher_psnr A to B"}


def test_label_maps_in_folders_are_scored_by_psnr():
    items = [{"A": photo, "B": label} for photo, label in zip(SCENES.photos[:2], SCENES.labels[:2])]
    config = options(dataroot="x", model="pix2pix", dataset_mode="aligned")
    assert evaluate({"G": PHOTO_TO_LABEL}, items, config, {}) == {"psnr": math.inf}


def test_generators_are_run_without_gradients():
    class AssertNoGrad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return x

    evaluate({"G": AssertNoGrad()}, scenes(), options(model="pix2pix"), {"G": AssertNoGrad()})


# Columns of the table


def test_columns_are_the_metrics_of_any_row_in_a_fixed_order():
    rows = [{"parameters": 3, "psnr B to A": 1.0}, {"teacher_psnr A to B": 2.0, "mIoU A to B": 3.0, "psnr B to A": 4.0}]
    columns = metric_columns(rows)
    assert [column["key"] for column in columns] == ["mIoU A to B", "psnr B to A", "teacher_psnr A to B"]
    assert [column["label"] for column in columns] == ["mIoU % A to B", "PSNR dB B to A", "PSNR to teacher dB A to B"]
    assert all(column["help"] and format(1.0, column["format"]) for column in columns)
    assert metric_columns([{"parameters": 3}]) == []


@pytest.mark.parametrize(
    ("direction", "expected"), [("G", ("A", "B")), ("G_A", ("A", "B")), ("G_B", ("B", "A"))], ids=str
)
def test_input_and_target_side_of_a_direction(direction, expected):
    assert sides(direction) == expected


def test_collate_stacks_both_sides():
    batch = collate([scenes()[0], scenes()[1]])
    assert batch.keys() == {"A", "B"}
    assert torch.equal(batch["A"], SCENES.photos[:2]) and torch.equal(batch["B"], SCENES.labels[:2])
