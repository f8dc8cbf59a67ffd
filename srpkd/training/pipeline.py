"""A whole run: the teacher, then every student for every seed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from torch.utils.data import Dataset

from ..files import WriteError
from ..models.checkpoints import load_generator
from . import distributed
from .datasets import open_data
from .loop import Generators, Stage, fit, freeze_for_inference
from .objectives import OBJECTIVES
from .options import TrainConfig, teacher_config
from .plan import Plan, prepare
from .resume import has_state, remove_state
from .run_dir import RunDir
from .summary import describe, measure, publish
from .validation import evaluate


def run(config: TrainConfig, command: str = "") -> RunDir:
    """Do a whole run, or what is left of one, and leave its folder.

    Args:
        config: options; with `resume`, those of the run that it names.
        command: how the run was called, for its page.

    Raises: as ``prepare``, before anything is trained; then
        DataError: an image cannot be read.
        Diverged: a network's losses are not finite any more.
        WriteError: the disk is full, say; the last state that was written is there to go on from.
    """
    return execute(prepare(config, command))


def execute(plan: Plan) -> RunDir:
    """Train what is left to train."""
    config, record = plan.config, plan.record
    test_set = open_data(config, "test")
    shown: dict[str, Generators] = {}
    try:
        if config.teacher_netG:
            stage = Stage("teacher", teacher_config(config), config.seed, record.folder / "teacher")
            plan.teachers = run_stage(plan, stage, "teacher", {}, test_set, shown)
        elif plan.teachers and "teacher" not in plan.rows and distributed.rank() == 0:
            plan.rows["teacher"] = [describe(config, plan.teachers) | evaluate(plan.teachers, test_set, config, {})]
        shown |= {"teacher": plan.teachers} if plan.teachers else {}
        if not plan.done or plan.done == ["teacher"]:
            publish(record, config, plan.rows, shown, test_set)
        if plan.students_began is None:
            plan.students_began = record.elapsed

        for number in range(config.seeds):
            for name, options in plan.variants.items():
                several = len(plan.variants) * config.seeds > 1
                label = f"{name} seed {number}" if several else name
                folder = record.folder / label.replace(" ", "-") if several else record.folder
                stage = Stage(label, options, config.seed + number, folder)
                generators = run_stage(plan, stage, name, plan.teachers, test_set, shown)
                shown.setdefault(name, generators)
            last = number + 1 == config.seeds or is_over_budget(plan, number + 1)
            if last:
                record.report["status"] = "finished"
            publish(record, config, plan.rows, shown, test_set)
            if last:
                break
        if distributed.rank() == 0:
            remove_state(record.folder)
    except BaseException:
        record.report["status"] = "stopped"
        with suppress(WriteError):  # perhaps what stopped it
            record.write_report()
        if has_state(record.folder):
            distributed.print_rank0(f"stopped; it can go on: python -m srpkd.train --resume {record.folder}")
        raise
    finally:
        record.close()
    return record


def run_stage(
    plan: Plan, stage: Stage, name: str, teachers: Generators, test_set: Dataset, shown: Mapping[str, Generators]
) -> Generators:
    """Train and measure a stage, or load what it gave if it is done: its generators, ready for use.

    Args:
        name: of its row in the table.
        shown: label -> direction -> generator: what the page shows beside it.
    """
    if stage.name in plan.done:
        kind = OBJECTIVES[stage.config.model]
        files = {direction: stage.folder / f"latest_net_{direction}.pth" for direction in kind.directions}
        return {
            direction: freeze_for_inference(load_generator(path), stage.config) for direction, path in files.items()
        }

    def keep(state: dict[str, Any] | None) -> None:
        plan.record.save_resume_state(
            {
                "config": asdict(replace(plan.config, resume=None)),
                "rows": plan.rows,
                "done": plan.done,
                "training": state and (stage.name, state),
                "students_began": plan.students_began,
            }
        )

    def show(generators: Generators) -> None:
        publish(plan.record, plan.config, plan.rows, {name: generators} | shown, test_set)

    stopped = plan.training[1] if plan.training and plan.training[0] == stage.name else None
    if not plan.done and stopped is None:
        keep(None)  # from the first step on there is a state to resume from
    trained = fit(stage, plan.record, teachers, stopped, keep, show)
    plan.rows.setdefault(name, []).append(measure(stage, plan.record, trained, test_set, teachers))
    plan.done.append(stage.name)
    keep(None)
    return trained.generators


def is_over_budget(plan: Plan, number: int) -> bool:
    """Whether seed `number`, 0, 1, ..., is one too many for the time budget: two are always run."""
    budget, elapsed = plan.config.time_budget, plan.record.elapsed
    seconds_per_seed = (elapsed - plan.students_began) / number
    over = number >= 2 and budget is not None and elapsed + seconds_per_seed > budget
    begun = any(label.endswith(f" seed {number}") for label in [*plan.done, *(plan.training or ())[:1]])
    over = distributed.broadcast_object(over and not begun)
    if over:
        distributed.print_rank0(f"{number} seeds: another would take longer than the time budget")
    return over
