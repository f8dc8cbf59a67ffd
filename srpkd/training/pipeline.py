"""The stages of a run: the teacher, then every student for every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import WriteError
from ..models.checkpoints import load_generator
from . import distributed
from .datasets import ImageDataset, has_one_size
from .extension import stage_folder, stage_name
from .loop import Generators, Stage, fit, freeze_for_inference
from .objectives import OBJECTIVES
from .options import ResolvedConfig, TrainConfig
from .plan import Plan, Row, prepare
from .resume import has_state, load_final_state, remove_older_states, remove_state, resume_command
from .run_dir import RunDir
from .stop_signals import Stopped
from .summary import evaluate_stage, evaluate_teachers, publish


def run(config: TrainConfig, command: str = "") -> RunDir:
    """Run all stages, or resume a stopped run, and return its folder.

    Args:
        config: options; with `resume`, those of the run that it names.
        command: command line that started the run, for the page.

    Raises: as ``prepare``, before training starts; then
        DataError: An image cannot be read.
        Diverged: The losses stay non-finite.
        WriteError: A file cannot be written, for example because the disk is full; resume from the last saved state.
    """
    return execute(prepare(config, command))


def execute(plan: Plan) -> RunDir:
    """Run all stages of a plan that are not done, and return the folder of the run."""
    config, run_dir = plan.config, plan.run_dir
    layout = plan.data.train_layout
    test_set = plan.data.open_test_data(config)
    shown: dict[str, Generators] = {}
    try:
        if plan.teacher:
            stage = Stage("teacher", plan.teacher, config.seed, run_dir.folder / "teacher", layout)
            plan.teachers = run_stage(plan, stage, "teacher", {}, test_set, shown)
        elif plan.teachers and "teacher" not in plan.rows:
            plan.rows["teacher"] = [stop_together(partial(evaluate_teachers, plan, test_set))]
        if plan.teachers:
            shown["teacher"] = plan.teachers
        if not plan.done or plan.done == ["teacher"]:
            publish(plan, shown, test_set)
        if plan.students_began is None:
            plan.students_began = run_dir.elapsed

        for number in range(config.seeds):
            for name, options in plan.variants.items():
                label = stage_name(config, name, number)
                folder = stage_folder(run_dir.folder, config, name, number)
                stage = Stage(label, options, config.seed + number, folder, layout)
                generators = run_stage(plan, stage, name, plan.teachers, test_set, shown)
                shown.setdefault(name, generators)
            last = number + 1 == config.seeds or is_over_budget(plan, number + 1)
            if last:
                run_dir.report["status"] = "finished"
            publish(plan, shown, test_set)
            if last:
                break
        if not config.no_keep_state:
            save_progress(plan, finished=True)
        if distributed.rank() == 0:
            (remove_state if config.no_keep_state else remove_older_states)(run_dir.folder)
    except BaseException:
        # before the report, which a second Ctrl-C may interrupt
        if advice := how_to_resume(run_dir.folder):
            with suppress(WriteError):  # a write error, of stdout too, may be what stopped the run
                distributed.print_rank0(advice)
        run_dir.report["status"] = "stopped"
        with suppress(WriteError):
            run_dir.write_report()
        raise
    finally:
        run_dir.close()
    return run_dir


def how_to_resume(folder: Path) -> str:
    """Return how a stopped run is resumed, or "" if its folder has no state."""
    return f"stopped; resume with: {resume_command(folder, distributed.world_size())}" if has_state(folder) else ""


def run_stage(
    plan: Plan,
    stage: Stage,
    name: str,
    teachers: Generators,
    test_set: ImageDataset | None,
    shown: dict[str, Generators],
) -> Generators:
    """Train and evaluate a stage, or load the result of a finished one.

    Args:
        name: name of the stage's row in the table.
        teachers: direction -> frozen generator; {} trains without a teacher.
        test_set: test images, or None to skip validation.
        shown: label -> direction -> generator: the other networks on the page.

    Returns:
        direction -> generator, frozen and in eval mode.
    """
    if stage.name in plan.done:
        directions = OBJECTIVES[stage.config.model].directions
        files = {direction: stage.folder / f"latest_net_{direction}.pth" for direction in directions}
        return {
            direction: freeze_for_inference(load_generator(path), stage.config) for direction, path in files.items()
        }

    def save_state(state: dict[str, Any]) -> None:
        save_progress(plan, (stage.name, state))

    def show(generators: Generators) -> None:
        publish(plan, {name: generators} | shown, test_set)

    interrupted = plan.training[1] if plan.training and plan.training[0] == stage.name else None
    if interrupted is None and stage.name in plan.extended:
        interrupted = load_final_state(stage.folder)
        save_state(interrupted)  # the stage replaces its final state before the run records that it is done
    if not plan.done and interrupted is None:
        save_progress(plan)  # a run can be resumed from its first step on
    keep = name != "teacher" and not plan.config.no_keep_state
    with selected_convolutions(stage.config):
        trained = fit(stage, plan.run_dir, teachers, interrupted, save_state, show, keep)
    row = stop_together(partial(evaluate_stage, stage, plan.run_dir, trained, test_set, teachers))
    plan.rows.setdefault(name, []).append(row)
    plan.done.append(stage.name)
    plan.extended = [other for other in plan.extended if other != stage.name]
    save_progress(plan)
    return trained.generators


def stop_together(evaluation: Callable[[], Row]) -> Row:
    """Return ``evaluation()``, or raise ``Stopped`` on all ranks if a signal stops it on one."""
    row, stop = {}, 0
    try:
        row = evaluation()
    except Stopped as stopped:
        stop = stopped.number
    if stop := distributed.max_over_ranks(stop):
        raise Stopped(stop)
    return row


@contextmanager
def selected_convolutions(config: ResolvedConfig) -> Iterator[None]:
    """Context in which cuDNN times its algorithms at first use, as in the public code, if all images have one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or has_one_size(config)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def save_progress(plan: Plan, training: tuple[str, dict[str, Any]] | None = None, *, finished: bool = False) -> None:
    """Save the state of the run, from which it can be resumed.

    Args:
        training: name and state of the stage that is being trained.
        finished: whether all stages are done and the results are published.
    """
    plan.run_dir.save_resume_state(
        {
            "config": asdict(replace(plan.config, resume=None)),
            "inputs": plan.inputs,
            "rows": plan.rows,
            "done": plan.done,
            "extended": plan.extended,
            "training": training,
            "students_began": plan.students_began,
            "finished": finished,
        }
    )


def is_over_budget(plan: Plan, number: int) -> bool:
    """Return whether seed `number` (0, 1, ...) would exceed the time budget. Seeds 0 and 1 always run."""
    assert plan.students_began is not None
    budget, elapsed = plan.config.time_budget, plan.run_dir.elapsed
    seconds_per_seed = (elapsed - plan.students_began) / number
    over = number >= 2 and budget is not None and elapsed + seconds_per_seed > budget
    started = any(
        label.endswith(f" seed {number}") for label in [*plan.done, *plan.extended, *(plan.training or ())[:1]]
    )
    over = distributed.broadcast_object(over and not started)
    if over:
        distributed.print_rank0(f"{number} seeds: another one would exceed the time budget")
    return over
