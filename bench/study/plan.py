"""The study's settings, and the configuration of each of its runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from srpkd.training.config import read_preset
from srpkd.training.options import ResolvedConfig, TrainConfig, teacher_config

Options = dict[str, Any]

NO_DISTILLATION: Options = {"lambda_kd": 0.0, "lambda_srp": 0.0, "lambda_feature": 0.0}


class Setting(NamedTuple):
    """A task on which variants are evaluated.

    Attributes:
        preset: preset of ``srpkd train``.
        options: options that differ from the preset.
        factor: factor of all selected weights. CycleGAN's cycle loss has a tenth of the weight of pix2pix's L1 loss,
            and the same factor applies to the other losses.
        metric: score, as named in metrics.jsonl. Without pairs, nothing determines which colour stands for which class
            and CycleGAN may learn any mapping, so unpaired students are compared with their teacher's output.
        label: name of the score in the report.
    """

    preset: str
    options: Options
    factor: float
    metric: str
    label: str

    @property
    def compares_with_teacher(self) -> bool:
        """Whether the score is a distance to the teacher's output, which needs a student with a teacher."""
        return self.metric.startswith("teacher")


SETTINGS = {
    "few pairs": Setting("demo", {}, 1.0, "mIoU", "mIoU %"),
    "many pairs": Setting("demo", {"max_dataset_size": None}, 1.0, "mIoU", "mIoU %"),
    "unpaired": Setting("demo-unpaired", {}, 0.1, "teacher_psnr A to B", "PSNR to teacher dB"),
}
SELECTION_SETTING = "few pairs"
RESERVED_OPTIONS = {  # the study sets these for every run
    "name", "runs_dir", "seed", "seeds", "variants", "resume", "teacher", "teacher_B", "dataroot", "synthetic_variant",
    "model", "dataset_mode", "direction", "time_budget", "layers", "normalize", "distance", "delta", *NO_DISTILLATION,
}  # fmt: skip


class Study(NamedTuple):
    """The arguments of a study.

    Attributes:
        runs_dir: folder of the runs.
        seeds: students of each kind in the selection.
        settings: setting to evaluate -> number of data sets.
        workers: runs at a time.
        options: options of ``srpkd train`` that all runs share.
    """

    runs_dir: str
    seeds: int
    settings: dict[str, int]
    workers: int
    options: Options


def teacher_run(study: Study, setting: str, dataset: int) -> ResolvedConfig:
    """Return the run that trains the teacher of a data set. All paired settings share it."""
    config = run_config(study, setting, dataset, NO_DISTILLATION)
    own = replace(teacher_config(config), teacher_netG=None)
    return replace(own, name=f"teacher-{config.model}-dataset{dataset}", seed=dataset)


def student_run(study: Study, setting: str, dataset: int, seed: int, seeds: int, options: Options) -> ResolvedConfig:
    """Return the run that trains the students of one data set for the seeds `seed`, ..., `seed + seeds - 1`."""
    config = run_config(study, setting, dataset, SETTINGS[setting].options | options)
    name = f"{setting}-dataset{dataset}-seed{seed}-{describe_options(options)}".replace(" ", "-")
    # the trainer refuses a teacher if no loss uses it
    teacher = str(run_folder(teacher_run(study, setting, dataset))) if config.learns_from_teacher else None
    return replace(config, name=name, teacher=teacher, teacher_netG=None, seed=seed, seeds=seeds)


def run_config(study: Study, setting: str, dataset: int, options: Options) -> ResolvedConfig:
    """Return the configuration that the runs of a setting and a data set share."""
    preset = read_preset(SETTINGS[setting].preset)
    for name in ("variants", "seeds", "time_budget"):
        preset.pop(name, None)
    # named here because the study selects the trainer's defaults and must not depend on them
    relation = {"normalize": "row", "distance": "l1", "delta": 1.0}
    common = {"synthetic_variant": dataset, "runs_dir": study.runs_dir, "samples": 2, "no_keep_state": True} | relation
    return TrainConfig(**preset | common | study.options | options).resolved()


def describe_options(options: Options) -> str:
    """Describe options in a few words, such as "kd 100 srp 300 row l2"."""
    words = []
    for name, value in options.items():
        if name == "layers":
            words.append(" and ".join(value))
        elif isinstance(value, str):
            words.append(value)
        elif value:
            words.append(f"{name.removeprefix('lambda_')} {value:g}")
    return " ".join(words) or "no distillation"


def run_folder(config: ResolvedConfig) -> Path:
    """Return the folder of a run."""
    return Path(config.runs_dir, config.name)
