"""The presets: their options, and that they run."""

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import load_generator
from srpkd.models.complexity import count_macs, count_parameters
from srpkd.models.networks import define_generator
from srpkd.training import pipeline
from srpkd.training.config import parse_arguments, presets
from srpkd.training.option_groups import SYNTHETIC, LossOptions
from srpkd.training.options import ResolvedConfig, variant_config

# student and teacher as (netG, ngf)
PAIRS = {
    "resnet9-64to32": (("resnet_9blocks", 32), ("resnet_9blocks", 64)),
    "resnet9-64to16": (("resnet_9blocks", 16), ("resnet_9blocks", 64)),
    "resnet9-to-resnet6": (("resnet_6blocks", 64), ("resnet_9blocks", 64)),
    "unet256-64to16": (("unet_256", 16), ("unet_256", 64)),
}
DATA_SETS = {
    "horse2zebra": ("cycle_gan", "AtoB"),
    "summer2winter_yosemite": ("cycle_gan", "AtoB"),
    "apple2orange": ("cycle_gan", "AtoB"),
    "tiger2leopard": ("cycle_gan", "AtoB"),
    "cityscapes": ("pix2pix", "BtoA"),
    "maps": ("pix2pix", "AtoB"),
    "edges2shoes": ("pix2pix", "AtoB"),
}
DEMOS = {"demo": "pix2pix", "demo-unpaired": "cycle_gan"}


def parse(*names: str, flags: tuple[str, ...] = ()) -> ResolvedConfig:
    return parse_arguments([*(f"--preset={name}" for name in names), *flags])


def test_all_presets_are_tested():
    assert set(presets()) == PAIRS.keys() | DATA_SETS.keys() | DEMOS.keys()


# Options


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_networks(name):
    config = parse(name, flags=("--dataroot=x",))
    student, teacher = PAIRS[name]
    assert ((config.netG, config.ngf), (config.teacher_netG, config.teacher_ngf)) == (student, teacher)
    paired = name.startswith("unet")
    assert config.model == ("pix2pix" if paired else "cycle_gan")
    assert config.norm == ("batch" if paired else "instance")
    assert config.dataset_mode == ("aligned" if paired else "unaligned")
    # it sets only the networks
    plain = parse_arguments(["--dataroot=x", f"--model={config.model}", f"--netG={config.netG}"])
    losses = [entry.name for entry in fields(LossOptions)]
    assert [vars(config)[loss] for loss in losses] == [vars(plain)[loss] for loss in losses]
    assert (config.lr, config.n_epochs, config.name) == (plain.lr, plain.n_epochs, plain.name)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet9-64to32", (2_850_563, 11_378_179), (14.5, 56.8)),
        ("resnet9-64to16", (715_651, 11_378_179), (3.8, 56.8)),
        ("resnet9-to-resnet6", (7_837_699, 11_378_179), (42.3, 56.8)),
        ("unet256-64to16", (3_404_451, 54_413_955), (1.2, 18.1)),
    ],
)
def test_parameters_and_macs_of_a_pair(name, parameters, macs):
    config = parse(name, flags=("--dataroot=x",))
    with torch.device("meta"):
        nets = [
            define_generator(netG, 3, 3, ngf, config.norm)
            for netG, ngf in ((config.netG, config.ngf), (config.teacher_netG, config.teacher_ngf))
        ]
    assert tuple(map(count_parameters, nets)) == parameters
    assert [round(count_macs(net) / 1e9, 1) for net in nets] == list(macs)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set(name):
    model, direction = DATA_SETS[name]
    config = parse(name)
    assert (config.name, config.dataroot) == (name, f"./datasets/{name}")
    assert (config.model, config.direction) == (model, direction)
    assert config.dataset_mode == ("aligned" if model == "pix2pix" else "unaligned")
    assert (config.load_size, config.crop_size) == (286, 256)
    schedule = (4, 15, 0) if name == "edges2shoes" else (1, 100, 100)
    assert (config.batch_size, config.n_epochs, config.n_epochs_decay) == schedule
    assert not config.distils
    # with a pair of networks, in either order, it is a complete configuration
    pair = "unet256-64to16" if model == "pix2pix" else "resnet9-64to16"
    both = parse(name, pair)
    assert both == parse(pair, name)
    assert (both.name, both.dataroot, both.direction) == (name, config.dataroot, direction)
    assert (both.ngf, both.teacher_ngf) == (16, 64)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("summer2winter_yosemite", "horse2zebra"),
        ("apple2orange", "horse2zebra"),
        ("tiger2leopard", "horse2zebra"),
        ("maps", "cityscapes"),
    ],
)
def test_data_sets_of_a_kind_differ_in_the_images_only(name, other):
    """A run with one of them tests the others."""
    config, same = parse(name), parse(other)
    assert replace(config, name=other, dataroot=same.dataroot, direction=same.direction) == same


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo(name):
    config = parse(name)
    assert (config.name, config.dataroot, config.model) == (name, SYNTHETIC, DEMOS[name])
    assert config.seeds >= 2
    variants = {variant: variant_config(config, variant) for variant in config.variants}

    def terms(variant: ResolvedConfig) -> tuple[bool, bool, bool]:
        return variant.lambda_kd > 0, variant.lambda_srp > 0, variant.lambda_feature > 0

    found = [terms(variant) for variant in variants.values()]
    # no teacher, output, output and relations, output and features
    expected = {(False, False, False), (True, False, False), (True, True, False), (True, False, True)}
    assert len(set(found)) == len(found) and expected <= set(found)
    steps = {
        (variant.epoch_steps, variant.n_epochs, variant.n_epochs_decay, variant.batch_size, variant.lr)
        for variant in variants.values()
    }
    assert len(steps) == 1
    student, teacher = (
        count_parameters(define_generator(netG, ngf=ngf))
        for netG, ngf in ((config.netG, config.ngf), (config.teacher_netG, config.teacher_ngf))
    )
    assert 6 < teacher / student < 8  # "about seven times smaller"


def test_the_demos_students_see_few_pairs_and_their_teacher_many():
    config = parse("demo")
    assert 12 <= config.max_dataset_size <= 20
    assert config.teacher_max_dataset_size >= 400


# Runs

TWO_STEPS = shlex.split(
    "--epoch_steps=2 --n_epochs=1 --n_epochs_decay=0 --teacher_n_epochs=1 --teacher_n_epochs_decay=0 --seeds=1 "
    "--name=run --num_threads=0 --samples=1 --print_freq=1 --device=cpu"
)


@pytest.fixture
def run(tmp_path, monkeypatch, one_thread):
    """Train the networks of presets for two steps on a few images; return the run's folder and options."""
    monkeypatch.setattr("srpkd.training.run_dir.write_report", lambda folder, _: folder / "index.html")

    def main(*names: str, size: int = 32, flags: tuple[str, ...] = ()) -> tuple[Path, ResolvedConfig]:
        config = parse(*names, flags=("--dataroot=x",))
        if not any(name in DEMOS for name in names):
            layout = config.dataset_mode
            folder = write_synthetic(tmp_path / "-".join(["images", *names]), 2, 1, size, layout=layout)
            if layout == "aligned":
                (folder / "test").rename(folder / "val")  # as in the public archives of pairs
            flags = (f"--dataroot={folder}", f"--load_size={size + 4}", f"--crop_size={size}", *flags)
        config = parse(*names, flags=(*flags, f"--runs_dir={tmp_path / 'runs'}", *TWO_STEPS))
        pipeline.run(config)
        return tmp_path / "runs/run", config

    return main


def check(folder: Path, config: ResolvedConfig, teacher: bool) -> None:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["status"] == "finished"
    variants = list(config.variants) or ["student"]
    assert [row["name"] for row in report["table"]["rows"]] == ["teacher"] * teacher + variants
    steps: dict[str, list[int]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines()):
        if "epoch" in line:
            steps.setdefault(line["stage"], []).append(line["step"])
    assert len(steps) == teacher + len(variants)
    assert all(taken == [1, 2] for taken in steps.values())
    student = folder / "-".join([*variants[0].split(), "seed-0"]) if config.variants else folder
    for file in student.glob("latest_net_G*.pth"):
        net = load_generator(file)
        assert next(net.parameters()).shape[0] == config.ngf
        assert count_parameters(net) == report["table"]["rows"][teacher]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.core(1)
def test_a_pair_runs(run, name):
    # a U-Net that halves its input eight times needs 256 x 256 pixels
    folder, config = run(name, size=256 if name.startswith("unet") else 32)
    check(folder, config, teacher=True)


@pytest.mark.parametrize("name", ["horse2zebra", "cityscapes", "edges2shoes"])
@pytest.mark.core(1)
def test_a_data_set_runs_alone_and_with_a_pair(run, name):
    pair, size = ("unet256-64to16", 256) if DATA_SETS[name][0] == "pix2pix" else ("resnet9-64to16", 32)
    check(*run(name, size=size, flags=("--ngf=2", "--ndf=4")), teacher=False)
    # narrow: test_a_pair_runs uses the full width
    folder, config = run(name, pair, size=size, flags=("--ngf=2", "--teacher_ngf=4", "--ndf=4"))
    check(folder.with_name("run-2"), config, teacher=True)


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.core(1)
def test_a_demo_runs(run, name):
    folder, config = run(name, flags=("--synthetic_pairs=24", "--synthetic_test_pairs=3"))
    check(folder, config, teacher=True)
