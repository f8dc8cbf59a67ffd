"""What the study trains: settings, weights to try, and the configuration of each run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from srpkd.training.config import read_preset
from srpkd.training.options import TrainConfig, teacher_config

Options = dict[str, Any]

NOTHING: Options = {"lambda_kd": 0.0, "lambda_srp": 0.0, "lambda_feature": 0.0}
# Weights beside an L1 loss to the target that weighs 100. An untrained student is 0.5 from its teacher's output (L1),
# 0.7 from its features (MSE), and its row-normalised relations are 0.03 apart in l1. Every form of the relation loss is
# tried from a tenth of what output distillation of weight 100 begins with to about as much.
OUTPUT_WEIGHTS = (10.0, 30.0, 100.0, 300.0)
FEATURE_WEIGHTS = (10.0, 30.0, 100.0)
RELATION_FORMS: tuple[tuple[Options, tuple[float, ...]], ...] = (
    ({"normalize": "row", "distance": "l1"}, (100.0, 300.0, 1000.0)),
    ({"normalize": "row", "distance": "l2"}, (2000.0, 6000.0, 20000.0)),
    ({"normalize": "row", "distance": "huber", "delta": 0.03}, (15000.0,)),
    ({"normalize": "cosine", "distance": "l1"}, (15.0, 50.0, 150.0)),
    ({"normalize": "cosine", "distance": "l2"}, (60.0, 200.0, 600.0)),
    ({"normalize": "none", "distance": "l1"}, (1.0,)),
)
# Of a ResNet whose encoder ends at model.9, with factors of the weight that was chosen there: amid and behind the
# blocks, two at once; and half-way down and up, where row-normalised relations, of four times as many pixels, are
# smaller.
LAYERS: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = (
    (("model.12",), (1.0,)),
    (("model.15",), (1.0,)),
    (("model.9", "model.15"), (1.0,)),
    (("model.6",), (1.0, 3.0)),
    (("model.18",), (1.0, 3.0)),
)


class Setting(NamedTuple):
    """A task to judge on: a preset, what is different from it, the factor of all chosen weights, and the score.

    CycleGAN's cycle loss weighs a tenth of pix2pix's L1 loss, and so do the others beside it. No unpaired image says
    which colour is which class, and CycleGAN settles on any mapping: a student of it is held to its teacher's.
    """

    preset: str
    options: Options
    factor: float
    metric: str  # as in metrics.jsonl
    label: str


SETTINGS = {
    "few pairs": Setting("demo", {}, 1.0, "mIoU", "mIoU %"),
    "many pairs": Setting("demo", {"max_dataset_size": None}, 1.0, "mIoU", "mIoU %"),
    "unpaired": Setting("demo-unpaired", {}, 0.1, "teacher_psnr A to B", "PSNR to teacher dB"),
}
CHOOSING = "few pairs"
EXTENSIONS = 3  # times that a larger weight is tried because the largest was the best
OWN_OPTIONS = {  # what the study itself says of every run
    "name", "runs_dir", "seed", "seeds", "variants", "resume", "teacher", "teacher_B", "dataroot", "synthetic_variant", "model",
    "dataset_mode", "direction", "time_budget", "layers", "normalize", "distance", "delta", *NOTHING,
}  # fmt: skip


# --- training -------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What a study's command line says; see ``parser``."""

    runs_dir: str
    seeds: int
    settings: dict[str, int]  # what is judged, and on how many worlds
    workers: int
    options: Options


def teacher(study: Study, setting: str, world: int) -> TrainConfig:
    """The run of a world's teacher. All paired settings share it."""
    config = run_config(study, setting, world, NOTHING)
    seen = replace(teacher_config(config), teacher_netG=None, max_dataset_size=config.teacher_max_dataset_size)
    return replace(seen, name=f"teacher-{config.model}-world{world}", seed=world)


def students(study: Study, setting: str, world: int, seed: int, seeds: int, options: Options) -> TrainConfig:
    """The run of a world's students of `seeds` seeds from `seed` on, all alike otherwise."""
    config = run_config(study, setting, world, SETTINGS[setting].options | options)
    name = f"{setting.replace(' ', '-')}-world{world}-seed{seed}-{spelled(options).replace(' ', '-')}"
    # one that learns nothing from a teacher goes without, as the trainer wants it
    taught_by = str(run_folder(teacher(study, setting, world))) if config.learns_from_teacher else None
    return replace(config, name=name, teacher=taught_by, teacher_netG=None, seed=seed, seeds=seeds)


def run_config(study: Study, setting: str, world: int, options: Options) -> TrainConfig:
    preset = read_preset(SETTINGS[setting].preset)
    for name in ("variants", "seeds", "time_budget"):
        preset.pop(name, None)
    # what a student learns hangs on no default of the trainer's, since those are chosen from this
    form = {"normalize": "row", "distance": "l1", "delta": 1.0}
    common = {"synthetic_variant": world, "runs_dir": study.runs_dir, "samples": 2} | form
    return TrainConfig(**preset | common | study.options | options).resolved()


def spelled(options: Options) -> str:
    """Options in a few words, such as "kd 100, srp 300 row l2"."""
    words = []
    for name, value in options.items():
        if name == "layers":
            words.append(" and ".join(value))
        elif isinstance(value, str):
            words.append(value)
        elif value:
            words.append(f"{name.removeprefix('lambda_')} {value:g}")
    return " ".join(words) or "alone"


def run_folder(config: TrainConfig) -> Path:
    return Path(config.runs_dir, config.name)
