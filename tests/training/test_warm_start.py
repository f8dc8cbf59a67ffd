"""Runs whose networks start from the weights of files."""

import re
from pathlib import Path

import pytest
import torch
from runs import CYCLE_GAN, PIX2PIX, TINY, config_of, teacher_of

from srpkd.models.checkpoints import CheckpointError, load_weights, save_weights
from srpkd.models.networks import define_discriminator
from srpkd.training.loop import make_objective
from srpkd.training.options import teacher_config
from srpkd.training.warm_start import describe_discriminator, warm_start, warm_start_files

FEATURE = ["--lambda_feature=1", "--teacher_netG=resnet_2blocks", "--teacher_ngf=3"]
STILL = ["--lr=1e-30"]  # weights that do not move


def equal(path: Path, other: Path) -> bool:
    found, expected = load_weights(path), load_weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_all_networks_start_from_a_run(run):
    first = run(*PIX2PIX, *FEATURE, "--name=first")
    names = ("G", "D", "adapter_G")
    assert all((first.folder / f"latest_net_{name}.pth").exists() for name in names)
    options = [f"--init_{name}={first.folder}" for name in ("student", "discriminator", "adapter")]
    second = run(*PIX2PIX, *FEATURE, *STILL, "--seed=5", "--ema=0.9", "--name=second", *options)
    for name in names:
        file = f"latest_net_{name}.pth"
        assert equal(second.folder / file, first.folder / file), name
        assert f"student: {name} starts from {first.folder / file}" in second.output
    # the run's own teacher does not start from the student's weights
    assert not equal(second.folder / "teacher/latest_net_D.pth", first.folder / "latest_net_D.pth")


def test_both_directions_start_from_a_run(run, unpaired):
    task = ["--dataroot", str(unpaired), *CYCLE_GAN, *TINY, *FEATURE]
    first = run(*task, "--name=first")
    files = [
        f"--init_student={first.folder}/latest_net_G_A.pth",
        f"--init_discriminator={first.folder}/latest_net_D_A.pth",
        f"--init_adapter={first.folder}/latest_net_adapter_G_A.pth",
    ]
    second = run(*task, *STILL, *files, "--name=second", "--seed=5")
    for name in ("G_A", "G_B", "D_A", "D_B", "adapter_G_A", "adapter_G_B"):
        assert equal(second.folder / f"latest_net_{name}.pth", first.folder / f"latest_net_{name}.pth"), name


@pytest.mark.core(0)
def test_the_discriminator_of_the_teachers_own_run(run, pix2pix):
    done = run(*PIX2PIX, *STILL, "--teacher", f"{pix2pix.folder}", "--init_discriminator", f"{pix2pix.folder}/teacher")
    assert equal(done.folder / "latest_net_D.pth", pix2pix.folder / "teacher/latest_net_D.pth")


def test_variants_may_start_from_different_files(run, pix2pix):
    source = pix2pix.folder / "alone-seed-0"
    variants = f"--variants={{warm: {{init_student: '{source}'}}, cold: {{}}}}"
    done = run(*PIX2PIX, *STILL, "--teacher", f"{pix2pix.folder}", variants)
    assert equal(done.folder / "warm-seed-0/latest_net_G.pth", source / "latest_net_G.pth")
    assert not equal(done.folder / "cold-seed-0/latest_net_G.pth", source / "latest_net_G.pth")


def test_a_file_without_a_second_direction(tmp_path):
    (tmp_path / "latest_net_G_A.pth").touch()
    assert warm_start_files(f"{tmp_path}", ["G_A", "G_B"]) == {"G_A": tmp_path / "latest_net_G_A.pth"}
    (tmp_path / "latest_net_G_B.pth").touch()
    assert warm_start_files(f"{tmp_path}/latest_net_G_A.pth", ["G_A", "G_B"]).keys() == {"G_A", "G_B"}
    (tmp_path / "other.pth").touch()
    assert warm_start_files(f"{tmp_path}/other.pth", ["G_A", "G_B"]) == {"G_A": tmp_path / "other.pth"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--init_student=none"], r"--init_student: none does not exist"),
        (["--init_student={}/G.pth"], r"netG is 'resnet_2blocks' in the file, .* ngf is 3 .*: use --netG resnet_2bl"),
        (["--init_student={}/D.pth"], r"not the weights of a generator"),
        (["--init_discriminator={}/G.pth"], r"--init_discriminator: .*G\.pth: expected the weights of a discriminator"),
        (
            ["--init_discriminator={}/D.pth"],
            r"n_layers_D is 2 in the file, expected 1; ndf is 3 .*: use --n_layers_D 2",
        ),
        (["--init_discriminator={}/D_A.pth"], r"input channels is 3 in the file, expected 6: use the discriminator of"),
        (["--init_discriminator={}/pixel.pth"], r"netD is pixel in the file, expected n_layers: use --netD pixel"),
        (
            [*FEATURE, "--init_adapter={}/G.pth"],
            r"--init_adapter: .*expected an adapter of model.9.weight \(12, 8, 1, 1",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(refusal, tmp_path, given, message):
    save_weights(teacher_of()["G"], tmp_path / "G.pth")
    save_weights(define_discriminator("n_layers", 6, 3, 2), tmp_path / "D.pth")
    save_weights(define_discriminator("n_layers", 3, 2, 1), tmp_path / "D_A.pth")
    save_weights(define_discriminator("pixel", 6, 2), tmp_path / "pixel.pth")
    arguments = [*PIX2PIX, *(option.format(tmp_path) for option in given)]
    found = refusal(*arguments)
    assert re.search(message, found), found


def test_adapters_need_feature_matching(usage_error):
    expected = "only feature matching has adapters: set lambda_feature above 0 and a teacher"
    assert expected in usage_error(*PIX2PIX, "--init_adapter=a.pth")
    assert expected in usage_error(*PIX2PIX, "--init_adapter=a.pth", "--lambda_feature=1")
    assert expected in usage_error(*PIX2PIX, "--init_adapter=a.pth", "--teacher_netG=unet_16")


def test_discriminators_are_described():
    for options in ({"netD": "n_layers", "n_layers_D": 3}, {"netD": "n_layers", "n_layers_D": 1}, {"netD": "pixel"}):
        for norm in ("instance", "batch"):
            network = define_discriminator(options["netD"], 3, 4, options.get("n_layers_D", 3), norm)
            found = describe_discriminator(network.state_dict())
            assert found == options | {"input channels": 3, "ndf": 4, "norm": norm}
    assert describe_discriminator(teacher_of(output_nc=1)["G"].state_dict()) == {}


def test_averages_start_from_the_file_too(tmp_path):
    save_weights(teacher_of(2)["G"], tmp_path / "G.pth")
    config = config_of(f"--init_student={tmp_path}/G.pth", "--netG=resnet_2blocks", "--ema=0.9")
    objective = make_objective(config, 0, {})
    warm_start(objective, config)
    expected = load_weights(tmp_path / "G.pth")
    assert all(torch.equal(value, expected[key]) for key, value in objective.ema_or_live()["G"].state_dict().items())


def test_the_teacher_of_a_run_starts_from_random_weights():
    config = config_of("--init_student=a", "--init_discriminator=b", "--init_adapter=c", *FEATURE)
    teacher = teacher_config(config)
    assert (teacher.init_student, teacher.init_discriminator, teacher.init_adapter) == (None, None, None)


def test_files_are_read_when_the_stage_starts(tmp_path):
    config = config_of(f"--init_student={tmp_path}")
    with pytest.raises(CheckpointError, match=r"--init_student: .*latest_net_G\.pth does not exist"):
        warm_start(make_objective(config, 0, {}), config)
