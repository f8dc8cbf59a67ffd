"""The command ``python -m bench train``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from bench_helpers import run

from bench import results, train
from srpkd.training.options import TrainConfig

SMALL = ["--size", 32, "--netG", "resnet_1blocks", "--ngf", 2, "--teacher-ngf", 3, "--budget", 0.1, "--device", "cpu"]


@dataclass(kw_only=True)
class Small(TrainConfig):
    ndf: int = 4


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """`fast` means channels_last on this machine, and discriminators are small."""
    monkeypatch.setattr(train, "TrainConfig", Small)
    monkeypatch.setattr(train, "fast_options", lambda device: {"channels_last": True})


@pytest.mark.slow
def test_training_steps_are_timed(tmp_path, monkeypatch):
    out = tmp_path / "train.csv"
    monkeypatch.setattr(train, "auto_backend", lambda device, relation: "blocked")
    run("train", "--model", "pix2pix", "--out", out, *SMALL, "--speedups", "channels_last", "bf16")
    rows = {row["variant"]: row for row in results.read(out)}
    faster = ["auto: blocked, channels_last", "auto: blocked, bf16"]
    default = "auto, the trainer's cosine l2"
    fast = ["without relation loss, fast", f"{default}, fast"]
    teachers = ["plain step of the teacher", "teacher's own training", "teacher's own training, fast"]
    assert list(rows) == ["without relation loss", "reference", "auto: blocked", default, *faster, *fast, *teachers]
    assert all(float(row["median_s"]) > 0 for row in rows.values())
    with_share = ["reference", "auto: blocked", default, f"{default}, fast"]
    assert [name for name in rows if rows[name]["srp_percent_of_step"]] == with_share
    assert [name for name in rows if rows[name]["times_faster_than_auto"]] == [*faster, f"{default}, fast"]


def test_forms():
    config = replace(TrainConfig(dataroot=":synthetic:", device="cpu").resolved(), device="cuda")
    forms = {form: (own.channels_last, own.cuda_graph) for form, own in train.forms(config).items()}
    assert list(forms) == ["", ", fast", ", cuda_graph", ", fast, cuda_graph"]
    assert list(forms.values()) == [(False, False), (True, False), (False, True), (True, True)]
    assert list(train.forms(config, short=True)) == ["", ", fast, cuda_graph"]


def test_steps_are_those_of_the_options(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train, "distillation_rows", lambda *arguments: found.append(arguments) or [])
    run("train", "--no-teacher", "--model", "pix2pix", "--batch", 4, "--out", tmp_path / "train.csv", *SMALL)
    ((student, teacher, budget, speedups, short),) = found
    assert teacher == replace(student, ngf=3) and (budget, short) == (0.1, False)
    assert speedups == ["channels_last", "bf16", "compile"]
    options = {
        "model": "pix2pix", "netG": "resnet_1blocks", "ngf": 2, "norm": "instance", "no_dropout": True,
        "normalize": "row", "distance": "l1", "synthetic_size": 32, "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    assert {name: getattr(student, name) for name in options} == options


def test_images_are_laid_out_as_in_training():
    config = TrainConfig(dataroot=":synthetic:", synthetic_size=32, batch_size=2, device="cpu").resolved()
    for last in (False, True):
        images = train.images_of(replace(config, channels_last=last))["A"]
        assert images.shape == (2, 3, 32, 32) and -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
        assert images.is_contiguous(memory_format=torch.channels_last) == last


def test_shares_and_speeds(monkeypatch):
    """A share is that of the relation loss in the step with it; a speed is that of the baseline's seconds."""
    default = "auto, the trainer's cosine l2"
    seconds = {
        "without relation loss": 3.0, "reference": 12.0, "auto: blocked": 4.0, default: 3.2,
        "auto: blocked, bf16": 2.0, "without relation loss, fast": 1.5, f"{default}, fast": 2.0,
    }  # fmt: skip
    of_teacher = {"plain step of the teacher": 4.0, "teacher's own training": 5.0, "teacher's own training, fast": 2.0}
    noise = (1.0, 7.0, 2.0)  # of a round
    monkeypatch.setattr(train, "auto_backend", lambda device, relation: "blocked")
    monkeypatch.setattr(train, "frozen_teachers", lambda _: {})
    for name in ("step_of", "plain_step_of"):
        monkeypatch.setattr(train, name, lambda config, *_: config)
    configs = {}

    def timed_steps(steps, config, budget):
        configs.update(steps)
        return {name: [(seconds | of_teacher)[name] * x for x in noise] for name in steps}

    monkeypatch.setattr(train, "timed_steps", timed_steps)
    config = TrainConfig(dataroot=":synthetic:", normalize="row", distance="l1", device="cpu").resolved()
    rows = train.distillation_rows(config, config, 1.0, ["bf16"], short=False)
    assert [row["variant"] for row in rows] == list(seconds)
    cosine, fast_cosine = (replace(config, normalize="cosine", distance="l2", channels_last=last) for last in (0, 1))
    assert list(configs.values()) == [
        replace(config, lambda_srp=0.0), replace(config, backend="reference"), config, cosine,
        replace(config, precision="bf16"), replace(fast_cosine, lambda_srp=0.0), fast_cosine,
    ]  # fmt: skip
    shares = {row["variant"]: row["srp_percent_of_step"] for row in rows if "srp_percent_of_step" in row}
    expected = {"reference": 75.0, "auto: blocked": 25.0, default: 6.25, f"{default}, fast": 25.0}
    assert shares == pytest.approx(expected)
    speeds = {row["variant"]: row["times_faster_than_auto"] for row in rows if "times_faster_than_auto" in row}
    assert speeds == pytest.approx({"auto: blocked, bf16": 2.0, f"{default}, fast": 1.6})
    assert [row["median_s"] * row["steps_per_s"] for row in rows] == pytest.approx([1.0] * len(rows))
    speeds = [row.get("times_faster_than_plain") for row in train.teacher_rows(config, 1.0, short=False)]
    assert speeds == [None, pytest.approx(0.8), pytest.approx(2.0)]


def test_short(tmp_path):
    """The trainer's default relation loss, as is and in the fastest form."""
    out = tmp_path / "train.csv"
    run("train", "--short", "--model", "pix2pix", "--out", out, *SMALL)
    rows = {row["variant"]: row for row in results.read(out)}
    default = "auto, the trainer's cosine l2"
    assert list(rows) == [
        "without relation loss", default, "without relation loss, fast", f"{default}, fast",
        "plain step of the teacher", "teacher's own training", "teacher's own training, fast",
    ]  # fmt: skip
    assert [name for name in rows if rows[name]["srp_percent_of_step"]] == [default, f"{default}, fast"]
    assert [name for name in rows if rows[name]["times_faster_than_auto"]] == [f"{default}, fast"]


def test_steps_against_a_plain_one(tmp_path, capsys):
    out = tmp_path / "train.csv"
    run("train", "--peer", "--out", out, *SMALL)
    rows = {row["variant"]: row for row in results.read(out)}
    assert list(rows) == ["plain step of the teacher", "teacher's own training", "teacher's own training, fast"]
    ratios = [row["times_faster_than_plain"] for row in rows.values()]
    assert ratios[0] == "" and all(float(ratio) > 0 for ratio in ratios[1:])
    assert capsys.readouterr().out.count("x the plain step's speed") == 2


def test_profile(capsys):
    run("train", "--profile", *SMALL)
    text = capsys.readouterr().out
    counts = {
        name: int(count.replace(",", "")) for name, count in re.findall(r"^(\S.*): ([\d,]+) operators", text, re.M)
    }
    steps = ["plain step of the teacher", "teacher's own training", "distillation step", "distillation step, fast"]
    assert list(counts) == steps
    assert counts["teacher's own training"] < 0.5 * counts["plain step of the teacher"]
    assert re.search(r"^ +\d+ convolution$", text, re.M)


def test_loader(capsys):
    run("train", "--loader", *SMALL)
    text = capsys.readouterr().out
    assert "loader with --num_threads 0" in text and "a training step uses" in text
