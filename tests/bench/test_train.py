"""The command ``python -m bench train``."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import results, train


@pytest.mark.slow
def test_training_steps_are_timed(tmp_path):
    out = tmp_path / "train.csv"
    small = ["--size", 32, "--netG", "resnet_1blocks", "--ngf", 2, "--teacher-ngf", 3, "--budget", 0.1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "auto_backend", lambda device, relation: "blocked")
        speedups = ["--speedups", "channels_last", "bf16"]
        run("train", "--model", "pix2pix", "--device", "cpu", "--out", out, *small, *speedups)
    rows = {row["variant"]: row for row in results.read(out)}
    faster = ["auto: blocked, channels_last", "auto: blocked, bf16"]
    default = "auto, the trainer's cosine l2"
    measured = ["without relation loss", "reference", "auto: blocked", default, *faster, "teacher's own training"]
    assert list(rows) == measured
    assert all(float(row["median_s"]) > 0 for row in rows.values())
    assert [name for name in rows if rows[name]["srp_percent_of_step"]] == ["reference", "auto: blocked", default]
    assert [name for name in rows if rows[name]["times_faster_than_auto"]] == faster
