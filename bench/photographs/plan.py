"""The configuration of the study on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from srpkd.training.options import ResolvedConfig, TrainConfig

# As selected on generated scenes (docs/study.md), not changed for photographs.
VARIANTS: dict[str, dict[str, float | str]] = {
    "alone": {"lambda_kd": 0.0, "lambda_srp": 0.0},
    "output": {"lambda_kd": 300.0, "lambda_srp": 0.0},
    "output + SRP": {"lambda_kd": 300.0, "lambda_srp": 5400.0, "normalize": "cosine", "distance": "l2"},
    "output + FitNet": {"lambda_kd": 300.0, "lambda_srp": 0.0, "lambda_feature": 2700.0},
}


class Study(NamedTuple):
    """The arguments of the study.

    Attributes:
        runs_dir: folder of the data sets and the runs.
        size: side of the crops in pixels.
        pairs: training pairs, for teachers and students.
        epoch_steps: steps per epoch, or None for those of the plan.
    """

    runs_dir: str
    size: int
    pairs: int
    epoch_steps: int | None


def dataset_folder(study: Study, task: str, partition: int) -> Path:
    """Return the folder of a task's images in one partition of the photographs."""
    return Path(study.runs_dir, "images", f"{task}-{partition}-{study.pairs}x{study.size}")


def run_config(study: Study, task: str, partition: int) -> ResolvedConfig:
    """Return the run that trains the teacher and the students of a partition."""
    return TrainConfig(
        name=f"{task}-{partition}",
        runs_dir=study.runs_dir,
        dataroot=str(dataset_folder(study, task, partition)),
        model="pix2pix",
        preprocess="none",
        netG="resnet_6blocks",
        ngf=9,
        teacher_netG="resnet_6blocks",
        teacher_ngf=24,
        norm="batch",
        no_dropout=True,
        gan_mode="lsgan",
        netD="n_layers",
        n_layers_D=2,
        ndf=16,
        batch_size=2,
        lr=0.001,
        epoch_steps=study.epoch_steps or 250,
        n_epochs=2,
        n_epochs_decay=2,
        teacher_n_epochs=6,
        teacher_n_epochs_decay=6,
        num_threads=0,
        seed=partition,
        seeds=1,
        samples=4,
        no_keep_state=True,
        device="cpu",
        variants={name: dict(options) for name, options in VARIANTS.items()},
    ).resolved()
