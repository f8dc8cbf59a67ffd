"""What a run found out: the rows of its table, its notes, its pictures, and the page with all of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from ..models.complexity import count_macs, count_parameters
from . import distributed
from .datasets import channels_of, has_one_size, input_size
from .loop import Generators, Stage, Trained
from .options import TrainConfig, variant_config
from .run_dir import RunDir
from .validation import evaluate, metric_columns, show_relations, show_samples

Row = dict[str, float]


def measure(stage: Stage, record: RunDir, trained: Trained, test_set: Dataset, teachers: Generators) -> Row:
    """A stage's row of the table, in the first process; its metrics are logged too."""
    if distributed.rank() > 0:
        return {}
    metrics = evaluate(trained.generators, test_set, stage.config, teachers)
    record.log(stage.name, trained.steps, **metrics)
    return describe(stage.config, trained.generators) | metrics | {"seconds_per_step": trained.seconds_per_step}


def describe(config: TrainConfig, generators: Generators) -> Row:
    """How large one generator is."""
    direction, generator = next(iter(generators.items()))
    shape = (1, channels_of(config, direction)[0], *input_size(config, direction))
    return {"parameters": count_parameters(generator), "macs": count_macs(generator, shape)}


def publish(
    record: RunDir,
    config: TrainConfig,
    rows: Mapping[str, list[Row]],
    shown: Mapping[str, Generators],
    test_set: Dataset,
) -> None:
    """Bring the table, the pictures and the page up to date; the first process does."""
    if distributed.rank() > 0:
        return
    pixels = "{} x {} pixels".format(*input_size(config)) + ("" if has_one_size(config) else ", the first image's size")
    columns = [
        {"key": "name", "label": "network", "format": ""},
        {"key": "parameters", "label": "parameters", "format": ",", "help": "of one generator"},
        {"key": "macs", "label": "MACs", "format": ",", "help": f"multiply-accumulates of {pixels}"},
        *metric_columns([row for group in rows.values() for row in group]),
        {"key": "seconds_per_step", "label": "s/step", "format": ".4f", "help": "median seconds of a training step"},
    ]
    record.report["table"] = {
        "columns": columns,
        "rows": [
            {"name": name} | {column["key"]: summarise(column["key"], group) for column in columns[1:]}
            for name, group in rows.items()
        ],
        "notes": table_notes(config, rows),
    }
    record.report["samples"] = show_samples(record.folder, shown, test_set, config)
    record.report["relations"] = show_relations(record.folder, shown, test_set, config)
    record.write_report()


def summarise(key: str, group: list[Row]) -> Any:
    """One value, or mean and standard deviation over the seeds; None where there is none."""
    values = [row[key] for row in group if key in row]
    if len(values) < 2 or key in ("parameters", "macs"):
        return values[0] if values else None
    spread = torch.tensor(values, dtype=torch.float64)  # statistics.stdev cannot take what diverged
    return {"mean": spread.mean().item(), "std": spread.std().item(), "n": len(values)}


def table_notes(config: TrainConfig, rows: Mapping[str, list[Row]]) -> list[str]:
    """What each variant gains over output distillation alone, seed by seed: variants of a seed start and draw alike."""
    variants = [name for name in config.variants if len(rows.get(name, [])) > 1]
    options = {name: variant_config(config, name) for name in variants}
    plain = [n for n, o in options.items() if o.lambda_kd and not o.lambda_srp and not o.lambda_feature]
    if not plain:
        return []
    base, notes = plain[0], []
    # unpaired, nothing but its teacher says what a student should have made of an image
    by_teacher = config.dataset_mode == "unaligned"
    scores = [column for column in metric_columns(rows[base]) if column["key"].startswith("teacher") == by_teacher]
    if not scores:
        return []
    score = scores[0]
    for name in variants:
        if name != base:
            gains = [ours[score["key"]] - theirs[score["key"]] for ours, theirs in zip(rows[name], rows[base])]
            notes.append(
                f"{name} minus {base}, {score['label']}: {statistics.mean(gains):+.2f} on average; "
                f"by seed {', '.join(f'{gain:+.2f}' for gain in gains)}"
            )
    return notes


def describe_task(config: TrainConfig) -> str:
    """The run in a sentence."""
    what = {"pix2pix": "pix2pix on pairs", "cycle_gan": "CycleGAN on unpaired images"}[config.model]
    student = f"{config.netG} of ngf {config.ngf}"
    if config.teacher:
        return f"{what}: {student}, distilled from {config.teacher}"
    if config.teacher_netG:
        return f"{what}: {student}, distilled from {config.teacher_netG} of ngf {config.teacher_ngf}"
    return f"{what}: {student}, without a teacher"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
