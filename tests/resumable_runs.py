"""Command lines of runs with random state of every kind, and everything that such a run writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from srpkd.models.checkpoints import load_weights

TINY = shlex.split(
    "--netG resnet_1blocks --ngf 2 --ndf 2 --netD n_layers --n_layers_D 1 --teacher_netG=resnet_2blocks "
    "--teacher_ngf=3 --epoch_steps 2 --n_epochs 1 --n_epochs_decay 2 --print_freq 1 --samples 1 --device cpu "
    "--save_latest_freq 2 --batch_size 2 --lambda_feature 1 --ema 0.9 --no_dropout=false --update_html_freq 4 "
    "--name=run --lr 0.01"
)
ARGUMENTS = {
    "pix2pix": [
        *shlex.split(
            "--model pix2pix --dataroot :synthetic: --synthetic_size 16 --synthetic_pairs 8 --synthetic_test_pairs 2"
        ),
        "--variants={a: {}, b: {lambda_srp: 0, ema: null}}",
        *TINY,
    ],
    # random crops and partners from two loader processes; image pools that overflow
    "cycle_gan": [
        *shlex.split("--model cycle_gan --dataroot ../images --load_size 20 --crop_size 16 --num_threads 2"),
        *shlex.split("--pool_size 3 --init_gain 0.1"),
        *TINY,
    ],
}


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run wrote, except times."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "listing": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "weights": {str(path.relative_to(run)): load_weights(path) for path in sorted(run.rglob("*.pth"))},
        "pictures": {path.name: path.read_bytes() for path in run.rglob("*.png")},
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "table": [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in report["table"]["rows"]],
        "rest": {key: report[key] for key in report if key not in ("table", "elapsed_seconds", "environment")},
        "config": (run / "config.yaml").read_text("utf-8"),
    }
