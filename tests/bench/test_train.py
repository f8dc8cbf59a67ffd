"""The command ``python -m bench train``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
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
    assert list(train.forms(config)) == ["", ", fast", ", cuda_graph", ", fast, cuda_graph"]
    assert list(train.forms(config, short=True)) == ["", ", fast, cuda_graph"]


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
    for name in ("frozen_teachers", "step_of", "plain_step_of"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(
        train, "timed_steps", lambda steps, *_: {n: [(seconds | of_teacher)[n] * x for x in noise] for n in steps}
    )
    config = TrainConfig(dataroot=":synthetic:", normalize="row", distance="l1", device="cpu").resolved()
    rows = train.distillation_rows(config, config, 1.0, ["bf16"], short=False)
    assert [row["variant"] for row in rows] == list(seconds)
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
