"""What is checked and loaded before training starts."""

import builtins
import os
import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from runs import CYCLE_GAN, PIX2PIX, SIZE, SYNTHETIC, TEACHER, TINY, config_of
from sample_images import save_plain

from srpkd.models.checkpoints import save_weights, teacher_files
from srpkd.models.networks import define_discriminator, define_generator
from srpkd.training import pipeline, plan
from srpkd.training.config import parse_arguments

# Teachers from files


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder_or_file_loads_the_teachers_of_both_directions(run, unpaired, cycle_gan, given):
    path = cycle_gan.folder / "teacher" / ("" if given == "folder" else "latest_net_G_A.pth")
    done = run("--dataroot", str(unpaired), *CYCLE_GAN, *TINY, "--teacher", str(path))
    assert {"kd_A", "srp_A", "kd_B", "srp_B"} <= done.metrics[0].keys()
    assert "no teacher from B to A" not in done.output
    assert list(done.rows) == ["teacher", "student"]
    assert done.rows["teacher"]["parameters"] == cycle_gan.rows["teacher"]["parameters"]
    assert done.rows["teacher"]["seconds_per_step"] is None
    assert {"teacher_psnr A to B", "teacher_psnr B to A"} <= done.rows["student"].keys()


def test_a_single_teacher_distils_one_direction(run, unpaired, cycle_gan, tmp_path):
    path = tmp_path / "my teacher.pth"
    path.write_bytes((cycle_gan.folder / "teacher" / "latest_net_G_A.pth").read_bytes())
    done = run("--dataroot", str(unpaired), *CYCLE_GAN, *TINY, "--teacher", str(path))
    assert "no teacher from B to A (--teacher_B): only the generator from A to B is distilled" in done.output
    assert {"kd_A", "srp_A"} <= done.metrics[0].keys()
    assert not {"kd_B", "srp_B"} & done.metrics[0].keys()
    captions = [sample["caption"] for sample in done.report["samples"]]
    assert captions == ["test image 0 A to B", "test image 0 B to A"]


def test_the_second_teacher_may_be_in_another_folder(run, unpaired, cycle_gan, tmp_path):
    files = [tmp_path / "forth.pth", tmp_path / "back.pth"]
    for file, name in zip(files, ("G_A", "G_B")):
        file.write_bytes((cycle_gan.folder / "teacher" / f"latest_net_{name}.pth").read_bytes())
    done = run("--dataroot", str(unpaired), *CYCLE_GAN, *TINY, f"--teacher={files[0]}", f"--teacher_B={files[1]}")
    assert {"kd_A", "kd_B"} <= done.metrics[0].keys()


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_pix2pix_teacher_from_a_file(run, pix2pix, given):
    path = pix2pix.folder / "teacher" / ("" if given == "folder" else "latest_net_G.pth")
    done = run(*PIX2PIX, "--teacher", str(path), "--teacher_netG=resnet_9blocks")  # the file wins
    assert {"kd", "srp"} <= done.metrics[0].keys()
    assert done.rows["teacher"]["mIoU"] == pytest.approx(pix2pix.rows["teacher"]["mIoU"])
    assert not (done.folder / "teacher").exists()


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_the_folder_of_a_run_gives_its_teacher(tmp_path, model):
    names = {"pix2pix": ["G"], "cycle_gan": ["G_A", "G_B"]}[model]
    for ngf, folder in ((2, tmp_path), (3, tmp_path / "teacher")):  # its student's weights, and its teacher's
        for name in names:
            save_weights(define_generator("resnet_1blocks", ngf=ngf), folder / f"latest_net_{name}.pth")
        assert teacher_files(model, str(tmp_path)) == {name: folder / f"latest_net_{name}.pth" for name in names}


def test_the_folder_of_a_cut_run_gives_its_only_generator(tmp_path):
    config = parse_arguments(["--model=cycle_gan", *SYNTHETIC, f"--teacher={tmp_path}"])
    save_weights(define_generator("resnet_4blocks", ngf=2, antialias="both"), tmp_path / "latest_net_G.pth")
    assert teacher_files(config.model, str(tmp_path)) == {"G_A": tmp_path / "latest_net_G.pth"}
    assert list(plan.load_teachers(config)) == ["G_A"]
    save_weights(define_generator("resnet_1blocks", ngf=2), tmp_path / "latest_net_G_A.pth")
    assert teacher_files(config.model, str(tmp_path)) == {"G_A": tmp_path / "latest_net_G_A.pth"}


@pytest.mark.parametrize("dropout", [False, True])
def test_a_loaded_teacher_is_frozen_and_in_eval_mode(tmp_path, dropout):
    save_weights(
        define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=dropout), tmp_path / "latest_net_G.pth"
    )
    [(direction, teacher)] = plan.load_teachers(config_of(f"--teacher={tmp_path}")).items()
    assert direction == "G"
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.rand(1, 3, SIZE, SIZE)
    assert torch.equal(teacher(x), teacher(x))


# Errors before anything is written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataroot=nowhere"],
            "The dataset nowhere (unaligned, train) cannot be used:\n  1. dataroot nowhere does not",
        ),
        (["--dataroot=empty"], r"The dataset empty (unaligned, train) cannot be used:"),
        (["--crop_size=18", "--load_size=20"], "1. --crop_size 18 is not a multiple of 4"),
        (["--netG=unet_32"], "--crop_size 16 is not a multiple of 32, as this generator needs: use 32"),
        (["--teacher_netG=unet_32"], "--crop_size 16 is not a multiple of 32"),
        (["--teacher_netG=unet_16", "--variants={a: {netG: unet_32}}"], "--crop_size 16 is not a multiple of 32"),
        (["--netG=unet_16", "--antialias"], "antialias='both' with netG='unet_16': only a ResNet has anti-aliasing"),
        (
            [*TEACHER, "--variants={a: {antialias: up}, b: {antialias: up, netG: unet_16}}"],
            "variant 'b': antialias='up' with netG='unet_16'",
        ),
        (["--netG=resnet_x"], "netG='resnet_x' is unknown: expected 'resnet_<n>blocks'"),
        ([*TEACHER, "--variants={a: {netG: resnet}}"], "netG='resnet' is unknown"),
        (["--teacher=none.pth"], "none.pth does not exist"),
        (["--teacher=text.pth"], "text.pth is a text file"),
        (["--teacher=D.pth"], "these look like a discriminator's: give the generator's"),
        (["--teacher=empty"], "latest_net_G_A.pth does not exist"),
        (["--teacher=grey.pth"], "grey.pth: this generator maps 1 to 1 channels, the images have 3 and 3: set"),
        (
            [*TEACHER, "--layers={model.9: model.99}"],
            "the teacher has no module named 'model.99'; the nearest names are",
        ),
        (
            [*TEACHER, "--layers={model.4: model.9}"],
            "student layer 'model.4' gives (4, 8, 8) and teacher layer 'model.9'",
        ),
        (
            [*TEACHER, "--variants={a: {}, b: {layers: {model.4: model.9}}}"],
            "variant 'b': student layer 'model.4' gives",
        ),
        (
            [*TEACHER, "--lambda_kd=0", "--lambda_srp=0"],
            "lambda_kd, lambda_srp and lambda_feature are all 0, so the student does not",
        ),
        *(
            ([f"--{name}=5"], f"{name}=5.0 is the weight of a loss that needs a teacher: pass --teacher or --teacher_")
            for name in ("lambda_kd", "lambda_srp", "lambda_feature")
        ),
        ([*TEACHER, "--variants={a: {lambda_kd: 0, lambda_srp: 0}}"], "the student does not learn from the teacher"),
        ([*TEACHER, "--variants={a: {}, b: {ngf: 0}}"], "variant 'b': ngf=0: expected at least 1"),
        (["--backend=blokced"], "backend='blokced' is not one of"),
        ([*TEACHER, "--backend=closed_form", "--distance=l1"], "backend='closed_form' supports distance 'l2'"),
        ([*TEACHER, "--backend=closed_form", "--rectify"], "backend='closed_form' does not support rectify=True"),
        (["--n_layers_D=5"], "images of 16 x 16 pixels are too small for netD n_layers: use larger images, or --n"),
        (
            ["--load_size=4", "--crop_size=4", "--netD=pixel"],
            "images of 4 x 4 pixels are too small for netG resnet_1blocks: use a larger --crop_size or larger images (",
        ),
        (["--input_nc=1"], "lambda_identity=0.5 needs images of equal channels on both sides"),
        (["--runs_dir=text.pth"], "runs_dir text.pth: this folder cannot be made: File exists"),
        (["--runs_dir=text.pth/runs"], "runs_dir text.pth/runs: this folder cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_work_are_refused_before_training(
    refusal, unpaired, tmp_path, monkeypatch, arguments, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("not weights")
    save_weights(define_discriminator(ndf=2), tmp_path / "D.pth")
    save_weights(define_generator("resnet_1blocks", 1, 1, 2), tmp_path / "grey.pth")
    before = sorted(tmp_path.rglob("*"))

    def fit(*_: Any) -> None:
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(pipeline, "fit", fit)
    assert message in refusal("--dataroot", str(unpaired), *CYCLE_GAN, *TINY, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_each_image_file_is_looked_at_once(unpaired, tmp_path, monkeypatch):
    """On a network drive, each look takes milliseconds, and a resumed run repeats it."""
    seen = Counter()

    def counting(function):
        def counted(path, *arguments, **others):
            if str(path).endswith(".png"):
                seen[path] += 1
            return function(path, *arguments, **others)

        return counted

    config = parse_arguments([f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, f"--runs_dir={tmp_path}"])
    for module, name in ((os, "stat"), (os, "lstat"), (builtins, "open")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    plan.prepare(config).run_dir.close()
    assert len(seen) == 14 and set(seen.values()) == {1}


def test_generated_images_must_fit_the_generators(refusal):
    message = "synthetic_size=20: expected a multiple of 16 for these generators"
    assert refusal(*PIX2PIX, "--synthetic_size=20", "--netG=unet_16").startswith(message)


@pytest.mark.parametrize(
    ("folder", "netD", "network"),
    [
        ("trainA", "n_layers", "netD n_layers"),
        ("trainB", "n_layers", "netD n_layers"),
        ("testA", "pixel", "netG resnet_1blocks"),
        ("trainA", "pixel", ""),
    ],
)
def test_images_that_are_smaller_than_the_first_one(refusal, run, oblong, tmp_path, folder, netD, network):
    """Of 40 x 24 and 36 x 48 pixels (H x W), one has 8 x 8, or in the test folder 4 x 4."""
    shutil.copytree(oblong, tmp_path / "images")
    side = 4 if "test" in folder else 8
    save_plain(tmp_path / "images" / folder / "2.png", (side, side))
    arguments = [
        "--dataroot=images",
        "--model=cycle_gan",
        *TINY,
        "--preprocess=none",
        f"--netD={netD}",
        "--n_layers_D=3",
    ]
    if network:
        message = refusal(*arguments)
        assert message.startswith(f"images of {side} x {side} pixels are too small for {network}: use ")
    else:
        run(*arguments)
