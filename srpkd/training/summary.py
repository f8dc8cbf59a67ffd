"""What a run reports: the rows of its table, notes, sample images, and the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from ..data.layouts import FolderLayout
from ..models.complexity import count_macs, count_parameters
from . import distributed
from .datasets import ImageDataset, channels_of, has_one_size, input_size
from .loop import Generators, Stage, Trained
from .options import ResolvedConfig
from .plan import Plan, Row
from .run_dir import RunDir
from .samples import write_relation_maps, write_samples
from .validation import evaluate, metric_columns


def evaluate_stage(
    stage: Stage, run_dir: RunDir, trained: Trained, test_set: ImageDataset | None, teachers: Generators
) -> Row:
    """Evaluate a stage, if there are test images, and log its metrics.

    Returns:
        The stage's row of the table on rank 0, {} on the others.
    """
    if distributed.rank() > 0:
        return {}
    metrics = evaluate(trained.generators, test_set, stage.config, teachers, stage.name)
    if metrics:
        run_dir.log(stage.name, trained.steps, **metrics)
    cost = complexity(stage.config, trained.generators, stage.layout)
    return cost | metrics | {"seconds_per_step": trained.seconds_per_step}


def evaluate_teachers(plan: Plan, test_set: ImageDataset | None) -> Row:
    """Return the row of teachers that were loaded from files, on rank 0; {} on the others."""
    if distributed.rank() > 0:
        return {}
    cost = complexity(plan.config, plan.teachers, plan.data.train_layout)
    return cost | evaluate(plan.teachers, test_set, plan.config, {}, "teacher")


def complexity(config: ResolvedConfig, generators: Generators, layout: FolderLayout | None) -> Row:
    """Return parameters and MACs of one generator, for the size of the training images in ``layout``."""
    direction, generator = next(iter(generators.items()))
    shape = (1, channels_of(config, direction)[0], *input_size(config, direction, layout))
    return {"parameters": count_parameters(generator), "macs": count_macs(generator, shape)}


def publish(plan: Plan, shown: Mapping[str, Generators], test_set: ImageDataset | None) -> None:
    """Update the table, the images and the page on rank 0.

    Args:
        shown: label -> direction -> generator in eval mode.
        test_set: test images; None publishes no images.
    """
    if distributed.rank() > 0:
        return
    config, run_dir = plan.config, plan.run_dir
    # an extended run removes the rows of the variants that it trains further, and adds them again
    rows = {name: plan.rows[name] for name in ("teacher", *plan.variants) if name in plan.rows}
    run_dir.check_folder()  # before images are written
    pixels = "{} x {} pixels".format(*input_size(config, layout=plan.data.train_layout))
    pixels += "" if has_one_size(config) else ", the first image's size"
    columns = [
        {"key": "name", "label": "network", "format": ""},
        {"key": "parameters", "label": "parameters", "format": ",", "help": "of one generator"},
        {"key": "macs", "label": "MACs", "format": ",", "help": f"multiply-accumulates of {pixels}"},
        *metric_columns([row for group in rows.values() for row in group]),
        {"key": "seconds_per_step", "label": "s/step", "format": ".4f", "help": "median seconds of a training step"},
    ]
    run_dir.report["table"] = {
        "columns": columns,
        "rows": [
            {"name": name} | {column["key"]: table_cell(column["key"], group) for column in columns[1:]}
            for name, group in rows.items()
        ],
        "notes": table_notes(config, plan.variants, rows),
    }
    if test_set is None:
        run_dir.report["table"]["notes"].append("No test images: validation was skipped.")
        run_dir.report |= {"samples": [], "relations": []}  # before it was resumed, the run may have had some
    else:
        run_dir.report["samples"] = write_samples(run_dir.folder, shown, test_set, config, run_dir.drawn)
        run_dir.report["relations"] = write_relation_maps(run_dir.folder, shown, test_set, config, drawn=run_dir.drawn)
    run_dir.write_report()


def table_cell(key: str, group: list[Row]) -> Any:
    """Return a single value, {"mean", "std", "n"} over the seeds, or None without values."""
    values = [row[key] for row in group if key in row]
    if len(values) < 2 or key in ("parameters", "macs"):
        return values[0] if values else None
    tensor = torch.tensor(values, dtype=torch.float64)  # statistics.stdev raises for infinite values
    return {"mean": tensor.mean().item(), "std": tensor.std().item(), "n": len(values)}


def table_notes(
    config: ResolvedConfig, variants: Mapping[str, ResolvedConfig], rows: Mapping[str, list[Row]]
) -> list[str]:
    """Compare each variant with output distillation alone, seed by seed.

    Variants of the same seed start from the same weights and see the same images, so differences by seed are
    meaningful. Unpaired tasks are compared by PSNR to the teacher: no target says what the output should be.
    """
    finished = [name for name in config.variants if len(rows.get(name, [])) > 1]
    output_alone = [
        name
        for name in finished
        if variants[name].lambda_kd and not variants[name].lambda_srp and not variants[name].lambda_feature
    ]
    if not output_alone:
        return []
    base = output_alone[0]
    by_teacher = config.dataset_mode == "unaligned"
    scores = [column for column in metric_columns(rows[base]) if column["key"].startswith("teacher") == by_teacher]
    if not scores:
        return []
    key, label, notes = scores[0]["key"], scores[0]["label"], []
    for name in finished:
        # a row has no score if there were no test images when the stage ended
        pairs = [(ours, theirs) for ours, theirs in zip(rows[name], rows[base]) if key in ours and key in theirs]
        gains = [ours[key] - theirs[key] for ours, theirs in pairs]
        if name != base and gains:
            notes.append(
                f"{name} minus {base}, {label}: {statistics.mean(gains):+.2f} on average; "
                f"by seed {', '.join(f'{gain:+.2f}' for gain in gains)}"
            )
    return notes
