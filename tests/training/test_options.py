"""Validation of options, defaults that depend on other options, and the options of teachers and variants."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from runs import TEACHER, config_of

from srpkd.defaults import KD_WEIGHT, SRP_WEIGHT
from srpkd.training.config import parse_arguments, to_yaml
from srpkd.training.option_groups import OPTIONS
from srpkd.training.options import VARIANT_OPTIONS, ResolvedConfig, TrainConfig, teacher_config, variant_config

HERE = "--dataroot=x"
LOADED_TEACHER = "--teacher=t.pth"


def parse(*arguments: str) -> ResolvedConfig:
    return parse_arguments(arguments)


# Validation


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", "4", "a whole number"),
        ("ngf", 1.5, "a whole number"),
        ("seeds", True, "a whole number"),
        ("max_dataset_size", "all", "a whole number or inf"),
        ("lambda_srp", "1", "a number"),
        ("lambda_A", None, "a number"),
        ("lr", math.inf, "a number"),
        ("no_dropout", "false", "true or false"),
        ("input_nc", True, "1 or 3"),
        ("gan_mode", "wgangp", "lsgan or vanilla"),
        ("model", "cyclegan", "pix2pix or cycle_gan"),
        ("teacher", 3, "a text"),
        ("layers", "model.9", "a mapping in YAML, {name: value, ...}"),
    ],
)
def test_a_wrong_type_is_refused(name, value, expected):
    """From Python: the parser of the command line has its own check."""
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r}: expected {expected}')}$"):
        TrainConfig(**{"dataroot": "x", name: value}).resolved()


def test_a_number_does_not_name_a_variant():
    config = TrainConfig(dataroot="x", teacher="t.pth", variants={8: {"ngf": 8}})
    with pytest.raises(ValueError, match="variant 8: expected a text as its name"):
        config.resolved()


def test_paths_and_numbers_of_numpy():
    """config.yaml stores plain texts and numbers."""
    variants = {"half": {"lambda_srp": np.float32(0.5)}}
    config = TrainConfig(dataroot=Path("x"), teacher=Path("t.pth"), batch_size=np.int64(2), variants=variants)
    config = config.resolved()
    assert (config.dataroot, config.teacher, config.batch_size) == ("x", "t.pth", 2)
    assert yaml.safe_load(yaml.safe_dump(asdict(config)))["variants"] == {"half": {"lambda_srp": 0.5}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "dataroot is not set: pass --dataroot with the folder"),
        (
            [HERE, "--model=pix2pix", "--dataset_mode=unaligned"],
            "model pix2pix needs pairs: use --dataset_mode aligned",
        ),
        ([HERE, "--teacher_B=b.pth"], "teacher_B (weights from B to A) needs model cycle_gan and teacher"),
        (
            [HERE, LOADED_TEACHER, "--teacher_B=b.pth", "--model=pix2pix"],
            "teacher_B (weights from B to A) needs model cycle",
        ),
        ([HERE, "--n_epochs=0", "--n_epochs_decay=0"], "n_epochs and n_epochs_decay are both 0"),
        (
            [HERE, "--teacher_netG=resnet_6blocks", "--teacher_n_epochs=0", "--teacher_n_epochs_decay=0"],
            "teacher_n_epochs and teacher_n_epochs_decay are both 0",
        ),
        ([HERE, "--variants={a: {}}"], "variants compare students of a teacher"),
        (["--dataroot=:synthetic:", "--input_nc=1"], "input_nc=1 and output_nc=3: generated images have 3 channels"),
        (["--dataroot=:synthetic:", "--synthetic_pairs=1"], "synthetic_pairs=1: an unpaired task needs at least 2"),
        ([HERE, "--device=gpu"], "device='gpu': expected cpu, cuda, cuda:1"),
        ([HERE, "--device=cuda:99"], "device='cuda:99': torch sees"),
        *(
            ([HERE, f"--name={name}"], f"name={name!r}: expected the name of a folder")
            for name in ("", ".", "..", "a/b", "/a")
        ),
    ],
)
def test_contradictions_are_refused(usage_error, arguments, message):
    assert usage_error("--ngf=2", *arguments).startswith(message)


MINIMUM = {
    1: "load_size crop_size max_dataset_size teacher_max_dataset_size synthetic_pairs synthetic_test_pairs ngf ndf "
    "n_layers_D teacher_ngf epoch_steps batch_size seeds print_freq save_epoch_freq save_latest_freq update_html_freq",
    0: "num_threads pool_size lambda_L1 lambda_A lambda_B lambda_identity lambda_kd lambda_srp lambda_feature n_epochs "
    "n_epochs_decay teacher_n_epochs teacher_n_epochs_decay beta1 time_budget samples ema",
    16: "synthetic_size",
}


@pytest.mark.parametrize(("cores", "expected"), [(2, 2), (16, 4)])
def test_loader_processes_by_default(monkeypatch, cores, expected):
    """torch warns about more processes than cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert parse(HERE).num_threads == expected
    assert parse(HERE, "--num_threads=9").num_threads == 9


@pytest.mark.parametrize(
    ("name", "minimum"), [(name, minimum) for minimum, names in MINIMUM.items() for name in names.split()]
)
@pytest.mark.core(12)
def test_every_lower_bound(usage_error, name, minimum):
    assert vars(parse(HERE, f"--{name}={minimum}"))[name] == minimum
    assert re.fullmatch(
        f"{name}={minimum - 1}(.0)?: expected at least {minimum}", usage_error(HERE, f"--{name}={minimum - 1}")
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr=0", "lr=0.0: expected a number above 0"),
        ("--delta=0", "delta=0.0: expected a number above 0"),
        ("--beta1=1", "beta1=1.0: expected a number below 1"),
        ("--ema=1", "ema=1.0: expected a number below 1"),
        ("--clip_grad_norm=0", "clip_grad_norm=0.0: expected a number above 0"),
    ],
)
def test_open_bounds(usage_error, flag, message):
    assert usage_error(HERE, flag) == message


# Variants


def test_values_of_variants_are_converted(yaml_file):
    assert parse(
        HERE, LOADED_TEACHER, "--variants={a: {}, b: {lambda_kd: 1e-3, no_dropout: true, norm: batch}}"
    ).variants == {
        "a": {},
        "b": {"lambda_kd": 0.001, "no_dropout": True, "norm": "batch"},
    }
    # PyYAML reads 1e-3 as a string
    assert parse(HERE, LOADED_TEACHER, yaml_file("variants: {a: {lambda_kd: 1e-3, layers: {m: t}}}")).variants == {
        "a": {"lambda_kd": 0.001, "layers": {"m": "t"}}
    }


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: {lamda_kd: 3}}", "variant 'a': unknown option 'lamda_kd'; did you mean lambda_kd?"),
        ("{a: {lambda_kd: much}}", "variant 'a': --lambda_kd much: expected a number"),
        ("{a: {norm: none}}", "variant 'a': --norm none: expected instance or batch"),
        ("{a: {seed: 3, lambda_kd: 1}}", "variant 'a': seed cannot differ between variants: set it for the whole run"),
        ("{a: {model: pix2pix}}", "variant 'a': model cannot differ between variants"),
        ("{a: {teacher: t.pth}}", "variant 'a': teacher cannot differ between variants"),
        ("{a: }", "--variants None: expected a mapping"),
        ("[a, b]", "--variants ['a', 'b']: expected a mapping"),
        ("{a/b: {}}", "variant 'a/b': expected a name that can be a folder's"),
        ("{..: {}}", "variant '..': expected a name that can be a folder's"),
        ("{'': {}}", "variant '': expected a name that can be a folder's"),
        *(
            (f"{{{name}: {{}}}}", f"variant '{name}': expected a name that can be a folder's")
            for name in ("teacher", "input", "truth")
        ),
        ("{a b: {}, a-b: {}}", "variants ['a b', 'a-b']: two of them have the same folder name"),
        ("{a: {}, A: {}}", "variants ['a', 'A']: two of them have the same folder name, or differ only in case"),
        ("{Teacher: {}}", "variant 'Teacher': expected a name that can be a folder's"),
    ],
)
def test_invalid_variants_are_refused(usage_error, variants, message):
    assert usage_error(HERE, LOADED_TEACHER, f"--variants={variants}").startswith(message)


def test_names_that_windows_does_not_allow(usage_error, monkeypatch):
    assert parse(HERE, "--name=12:30").name == "12:30"
    monkeypatch.setattr("srpkd.training.options.sys", SimpleNamespace(platform="win32"))
    assert usage_error(HERE, "--name=12:30") == "name='12:30': names on Windows cannot contain ':': use another name"
    assert usage_error(HERE, LOADED_TEACHER, "--variants={aux: {}}").startswith("variant 'aux': Windows reserves this")


def test_variant_options_are_options():
    assert OPTIONS.keys() > VARIANT_OPTIONS
    assert {"lambda_srp", "layers", "normalize", "distance", "netG", "ngf"} < VARIANT_OPTIONS


# Defaults


@pytest.mark.parametrize(
    ("model", "defaults"),
    [
        ("pix2pix", ("aligned", "unet_256", "batch", False, "vanilla")),
        ("cycle_gan", ("unaligned", "resnet_9blocks", "instance", True, "lsgan")),
    ],
)
def test_defaults_by_model_are_those_of_the_public_code(model, defaults):
    def found(config: TrainConfig) -> tuple:
        return config.dataset_mode, config.netG, config.norm, config.no_dropout, config.gan_mode

    config = parse(HERE, f"--model={model}", "--n_epochs=7", "--n_epochs_decay=8", "--max_dataset_size=9")
    assert found(config) == defaults
    assert (config.teacher_n_epochs, config.teacher_n_epochs_decay, config.teacher_max_dataset_size) == (7, 8, 9)
    assert (config.ngf, config.ndf, config.netD, config.lr, config.beta1) == (64, 64, "basic", 0.0002, 0.5)
    assert (config.lambda_A, config.lambda_B, config.lambda_identity, config.lambda_L1) == (10, 10, 0.5, 100)
    assert (config.pool_size, config.batch_size, config.load_size, config.crop_size) == (50, 1, 286, 256)
    assert config.device is None  # config.yaml may be used on another machine
    assert config.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.resolved() is config


def test_teacher_overrides_teacher_netG():
    config = parse(HERE, LOADED_TEACHER, "--preset=resnet9-64to16")
    assert (config.teacher, config.teacher_netG, config.distils) == ("t.pth", None, True)


def test_a_process_without_a_gpu_is_refused(usage_error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    message = usage_error(HERE, "--device=cuda", "--batch_size=2")
    assert message.startswith("local rank 1 has no GPU: torch sees 1; use torchrun --nproc_per_node")


# Teachers and variants


def test_teacher_config():
    config = config_of(*TEACHER, "--teacher_n_epochs=7", "--max_dataset_size=4", "--teacher_max_dataset_size=6")
    teacher = teacher_config(config)
    changed = {"netG": "resnet_2blocks", "ngf": 3, "n_epochs": 7, "max_dataset_size": 6}
    assert teacher == replace(config, **changed)
    assert teacher.n_epochs_decay == config.n_epochs_decay


@pytest.mark.parametrize(("netG", "antialias"), [("resnet_2blocks", "both"), ("unet_16", "none")])
def test_a_trained_teacher_has_the_anti_aliasing_of_the_student_if_it_is_a_resnet(netG, antialias):
    config = config_of("--antialias", f"--teacher_netG={netG}", "--teacher_ngf=3")
    assert teacher_config(config).antialias == antialias


def test_variant_config():
    config = config_of(*TEACHER, "--variants={a: {lambda_kd: 3, ngf: 5, no_dropout: false}, b: {}}")
    assert variant_config(config, "a") == replace(config, lambda_kd=3, ngf=5, no_dropout=False, variants={})
    assert variant_config(config, "b") == replace(config, variants={})


def test_variants_may_reset_an_option_to_its_default():
    config = config_of(*TEACHER, "--norm=batch", "--variants={a: {norm: null, lambda_kd: null}}")
    assert (variant_config(config, "a").norm, variant_config(config, "a").lambda_kd) == ("batch", KD_WEIGHT["pix2pix"])


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):  # on POSIX systems, and on Windows
        monkeypatch.setenv(name, str(tmp_path))
    config = parse("--dataroot=~/data", "--runs_dir=~/runs", "--name=a")
    assert (Path(config.dataroot), Path(config.runs_dir)) == (tmp_path / "data", tmp_path / "runs")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse("--resume=a", "--runs_dir=~/runs").resume == str(tmp_path / "runs" / "a")


def test_teacher_config_needs_an_architecture():
    with pytest.raises(ValueError, match="teacher_netG is not set"):
        teacher_config(config_of())


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_default_weights(model):
    config = TrainConfig(dataroot="x", model=model).resolved()
    assert (config.lambda_kd, config.lambda_srp) == (KD_WEIGHT[model], SRP_WEIGHT[model])
    assert (config.normalize, config.distance) == ("cosine", "l2")
    assert TrainConfig(dataroot="x", model=model, lambda_kd=0).resolved().lambda_kd == 0
