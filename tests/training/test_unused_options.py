"""Options that other options leave without an effect."""

from typing import Any

import pytest
from runs import CYCLE_GAN, PIX2PIX, TEACHER, TINY
from torch import nn

from srpkd.models.networks import define_generator, normalize_per_image
from srpkd.training.config import presets, read_preset
from srpkd.training.datasets import check_batches
from srpkd.training.options import TrainConfig, teacher_config, variant_config
from srpkd.training.unused_options import unused_options

FILE = {"teacher": "t.pth"}
SYNTHETIC = {"dataroot": ":synthetic:"}


def unused(options: dict[str, Any], teachers: dict[str, nn.Module] | None = None) -> list[str]:
    config = TrainConfig(**{"dataroot": "x", **options}).resolved()
    variants = {name: variant_config(config, name) for name in config.variants} or {"student": config}
    trained = teacher_config(config) if config.teacher_netG else None
    return unused_options(config, trained, variants, teachers or {})


@pytest.mark.parametrize(
    ("others", "name", "value", "reason"),
    [
        (SYNTHETIC, "load_size", 3, "generated images are not read from files"),
        (SYNTHETIC, "crop_size", 3, "generated images are not read from files"),
        (SYNTHETIC, "preprocess", "crop", "generated images are not read from files"),
        ({}, "synthetic_size", 32, "only dataroot :synthetic: generates images"),
        ({"preprocess": "crop"}, "load_size", 3, "preprocess crop does not scale images to a given size"),
        ({"preprocess": "none"}, "crop_size", 3, "preprocess none does not crop"),
        ({}, "n_layers_D", 2, "netD is basic; use netD n_layers"),
        ({"netG": "unet_32", "model": "pix2pix"}, "no_dropout", True, "netG unet_32 is too small for dropout"),
        ({"init_type": "kaiming"}, "init_gain", 3.0, "init_type kaiming has no scale"),
        (FILE, "teacher_ngf", 3, "the run trains no teacher"),
        ({}, "teacher_max_dataset_size", 3, "the run trains no teacher"),
        ({"model": "pix2pix"}, "pool_size", 3, "model is pix2pix, and only cycle_gan uses it"),
        ({}, "lambda_L1", 3.0, "model is cycle_gan, and only pix2pix uses it"),
        ({}, "normalize", "row", "there is no teacher"),
        (FILE | {"lambda_srp": 0}, "backend", "reference", "lambda_srp is 0"),
        (FILE | {"lambda_srp": 0}, "layers", {"a": "b"}, "lambda_srp is 0"),
        (FILE, "delta", 3.0, "distance is l2, and only huber has a threshold"),
        (FILE, "scope", "batch", "the loss sees batches of one image"),
        (FILE | {"normalize": "none"}, "detach_norms", True, "normalize is none"),
        ({"seeds": 2}, "time_budget", 3.0, "two seeds always run, and seeds is 2"),
        ({}, "force_bf16", True, "precision is fp32"),
        (
            {"device": "cpu"},
            "channels_last",
            True,
            "PyTorch's gradients of one image in this format are wrong on a CPU",
        ),
        (FILE, "train_mode_norm", True, "the generators have no batch norm"),
    ],
    ids=str,
)
def test_an_option_without_an_effect_is_named(others, name, value, reason):
    expected = f"{name}={value} has no effect on training: {reason}"
    assert [line for line in unused(others | {name: value}) if line not in unused(others)] == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {"preprocess": "crop", "crop_size": 3},
        {"netD": "n_layers", "n_layers_D": 2},
        {"netG": "unet_64", "no_dropout": False},
        {"init_type": "kaiming", "norm": "batch", "init_gain": 3},
        {"teacher_netG": "unet_32", "teacher_ngf": 3, "teacher_n_epochs": 3},
        FILE | {"lambda_srp": 0, "lambda_feature": 1, "layers": {"a": "b"}},
        FILE | {"distance": "huber", "delta": 3},
        FILE | {"scope": "batch", "batch_size": 2},
        {"device": "cpu", "channels_last": True, "batch_size": 2},
        FILE | {"seeds": 3, "time_budget": 3},
        {"norm": "batch", "train_mode_norm": True},
        FILE | {"n_epochs": 3, "max_dataset_size": 4},  # the defaults of the teacher's options
        *({"dataroot": "x"} | read_preset(name) for name in presets()),
    ],
    ids=str,
)
def test_an_option_with_an_effect_is_not_named(options):
    assert unused(options) == []


def test_the_scope_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = ["scope=batch has no effect on training: the loss sees batches of one image"]
    assert unused(FILE | {"batch_size": 2, "scope": "batch"}) == message
    assert unused(FILE | {"batch_size": 4, "scope": "batch"}) == []
    assert unused(FILE | {"batch_size": 2, "scope": "global"}) == []


def test_the_norm_of_a_teacher_from_a_file():
    options = FILE | {"train_mode_norm": True}
    per_image = normalize_per_image(define_generator("resnet_1blocks", norm="batch"))  # as the option leaves it
    assert unused(options, {"G_A": define_generator("resnet_1blocks", norm="batch")}) == []
    assert unused(options, {"G_A": per_image}) == []
    assert len(unused(options, {"G_A": define_generator("resnet_1blocks")})) == 1


@pytest.mark.parametrize(
    ("options", "teacher", "is_unused"),
    [
        ({"teacher_netG": "resnet_1blocks"}, None, True),
        ({"teacher_netG": "unet_32"}, None, False),  # its layer ends in a LeakyReLU
        ({"teacher_netG": "resnet_1blocks", "netG": "unet_32"}, None, False),
        ({"teacher_netG": "resnet_1blocks", "layers": {"model.10": "model.10"}}, None, False),
        (FILE, "resnet_1blocks", True),
        (FILE, "unet_32", False),
    ],
    ids=str,
)
def test_relations_that_are_never_negative(options, teacher, is_unused):
    reason = "the default layer of a ResNet ends in a ReLU, so no relation is negative"
    found = unused({**options, "rectify": True}, {"G_A": define_generator(teacher, ngf=1)} if teacher else {})
    assert found == ([f"rectify=True has no effect on training: {reason}"] if is_unused else [])


def test_options_of_variants():
    layers = {"a": {"netD": "n_layers", "n_layers_D": 2}, "b": {"n_layers_D": 4, "lambda_srp": 0, "distance": "l1"}}
    assert unused(FILE | {"variants": layers, "normalize": "row"}) == [
        "variant 'b': n_layers_D=4 has no effect on training: netD is basic; use netD n_layers",
        "variant 'b': distance=l1 has no effect on training: lambda_srp is 0",
    ]
    # the losses of the teacher of the run have no teacher, but its discriminator has the layers
    options = {"teacher_netG": "unet_32", "distance": "l1", "netD": "n_layers", "n_layers_D": 4}
    variants = {"a": {"lambda_srp": 0, "netD": "pixel"}}
    assert unused(options | {"variants": variants}) == ["distance=l1 has no effect on training: lambda_srp is 0"]


def test_a_run_names_them_and_a_batch_larger_than_the_data(run):
    limits = ["--batch_size=9", "--max_dataset_size=5", "--teacher_max_dataset_size=8"]
    done = run(*PIX2PIX, *TEACHER, "--pool_size=3", "--delta=2", *limits)
    assert [line for line in done.output.splitlines() if line.startswith("note")] == [
        "note: batch_size=9: batches have all 5 training images",
        "note: batch_size=9: batches have all 8 training images",
        "note: pool_size=3 has no effect on training: model is pix2pix, and only cycle_gan uses it",
        "note: delta=2.0 has no effect on training: distance is l2, and only huber has a threshold",
    ]


def test_batches_that_processes_cannot_share_are_refused_before_the_run(refusal, unpaired, monkeypatch):
    monkeypatch.setattr("srpkd.training.datasets.distributed.world_size", lambda: 2)
    monkeypatch.setattr("srpkd.training.plan.distributed.raise_on_all_ranks", lambda function: function())
    arguments = [f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--batch_size=4", "--max_dataset_size=3"]
    assert refusal(*arguments) == "3 images cannot be divided evenly among 2 processes: use fewer processes"


@pytest.mark.parametrize(("batch_size", "left_out"), [(1, 0), (2, 1), (3, 2), (5, 0)])
def test_images_that_are_never_read_in_order_are_counted(unpaired, batch_size, left_out):
    options = {"dataroot": str(unpaired), "batch_size": batch_size}  # five images
    line = f"serial_batches=True with batch_size={batch_size}: the last {left_out} of 5 training images are never read"
    assert check_batches([TrainConfig(**options, serial_batches=True).resolved()]) == ([line] if left_out else [])
    assert check_batches([TrainConfig(**options).resolved()]) == []
