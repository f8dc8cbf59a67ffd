"""Train a generator, or distil a small one from a large one: ``python -m srpkd.train``.

A run is a list of stages: the teacher, unless it is loaded from a file, then every student for every seed.
Whatever they are, ``fit`` trains them. Between two stages, and every save_latest_freq steps of one, the run's state
is written, from which ``--resume`` goes on.
"""

from __future__ import annotations

import copy
import itertools
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from . import parallel
from .checkpoint import CheckpointError, WriteError, load_generator
from .config import RESUME_OPTIONS, TrainConfig, arm_config, parse_arguments, run_folder, teacher_config, to_yaml
from .data import DataError
from .evaluation import evaluate
from .fit import Diverged, Generators, Stage, fit, make_objective, ready, relation_loss_of
from .images import channels_of, examine_data, input_size, open_data
from .networks import image_channels
from .objectives import OBJECTIVES, Objective
from .record import RunRecord, new_folder
from .report import format_table
from .results import Row, describe, describe_task, device_name, measure, publish
from .state import has_state, load_state, remove_state
from .watch import import_watchers, open_watchers


@dataclass
class Plan:
    """A run that has been found to fit together, and how far it is.

    config: as given, with what stood open filled in.
    arms: name -> the options of a student.
    teachers: those loaded, or trained by now: direction -> generator, ready for use.
    rows: name -> its rows of the table, a row per seed.
    done: names of the stages that are finished.
    training: the name of the stage that was stopped, and its state, in a run that is resumed.
    students_began: seconds from the run's beginning to that of the first student.
    """

    config: TrainConfig
    arms: dict[str, TrainConfig]
    teachers: Generators
    record: RunRecord
    rows: dict[str, list[Row]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    training: tuple[str, dict[str, Any]] | None = None
    students_began: float | None = None


def run(config: TrainConfig, command: str = "") -> RunRecord:
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


def prepare(config: TrainConfig, command: str = "") -> Plan:
    """See that everything fits together, and make the run's folder or find it.

    Raises, before anything is written:
        DataError: the images do not fit (see ``srpkd.data.examine``).
        CheckpointError: the teacher's weights, or a stopped run's state, cannot be used.
        ValueError: options that contradict each other, or do not fit the networks.
        ImportError: a package is missing that a flag asks for.
    """
    config = config.resolved()
    packages = import_watchers(config)
    arms = {name: arm_config(config, name) for name in config.arms} or {"student": config}
    teachers = load_teachers(config)
    stages = [*arms.values(), *([teacher_config(config)] if config.teacher_netG else [])]
    summary = examine_data(config, stages, teachers)
    rehearse(config, arms, teachers)

    folder = run_folder(config.resume, config.runs_dir) if config.resume else None
    state = load_state(folder) if folder else {}
    if state:
        check_resumed(config, state)
    folder = parallel.share(folder or (new_folder(config.runs_dir, config.name) if parallel.rank() == 0 else None))
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(config.torch_device),
        "data": summary,
    }
    task = describe_task(config)
    report = {"title": config.name, "task": task, "command": command, "environment": environment}
    try:
        watchers = open_watchers(packages, folder, config) if parallel.rank() == 0 else []
        record = RunRecord(folder, to_yaml(config), report, state.get("record"), watchers)
    except OSError:
        if not state and parallel.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # it was made for this run, which has not begun
        raise
    parallel.say(f"{task}\n{summary}\n{'going on in' if state else 'writing to'} {folder}")
    progress = {key: state[key] for key in ("rows", "done", "training", "students_began") if key in state}
    return Plan(config, arms, teachers, record, **progress)


def execute(plan: Plan) -> RunRecord:
    """Train what is left to train."""
    config, record = plan.config, plan.record
    test_set = open_data(config, "test")
    shown: dict[str, Generators] = {}
    try:
        if config.teacher_netG:
            stage = Stage("teacher", teacher_config(config), config.seed, record.folder / "teacher")
            plan.teachers = do(plan, stage, "teacher", {}, test_set, shown)
        elif plan.teachers and "teacher" not in plan.rows and parallel.rank() == 0:
            plan.rows["teacher"] = [describe(config, plan.teachers) | evaluate(plan.teachers, test_set, config, {})]
        shown |= {"teacher": plan.teachers} if plan.teachers else {}
        if not plan.done or plan.done == ["teacher"]:
            publish(record, config, plan.rows, shown, test_set)
        if plan.students_began is None:
            plan.students_began = record.elapsed

        for number in range(config.seeds):
            for name, options in plan.arms.items():
                several = len(plan.arms) * config.seeds > 1
                label = f"{name} seed {number}" if several else name
                folder = record.folder / label.replace(" ", "-") if several else record.folder
                stage = Stage(label, options, config.seed + number, folder)
                generators = do(plan, stage, name, plan.teachers, test_set, shown)
                shown.setdefault(name, generators)
            last = number + 1 == config.seeds or is_over_budget(plan, number + 1)
            if last:
                record.report["status"] = "finished"
            publish(record, config, plan.rows, shown, test_set)
            if last:
                break
        if parallel.rank() == 0:
            remove_state(record.folder)
    except BaseException:
        record.report["status"] = "stopped"
        with suppress(WriteError):  # perhaps what stopped it
            record.write()
        if has_state(record.folder):
            parallel.say(f"stopped; it can go on: python -m srpkd.train --resume {record.folder}")
        raise
    finally:
        record.close()
    return record


def do(
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
        return {direction: ready(load_generator(path), stage.config) for direction, path in files.items()}

    def keep(state: dict[str, Any] | None) -> None:
        plan.record.keep(
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
    over = parallel.share(over and not begun)
    if over:
        parallel.say(f"{number} seeds: another would take longer than the time budget")
    return over


def check_resumed(config: TrainConfig, state: Mapping[str, Any]) -> None:
    """Whether a run's state is of these options and of as many processes.

    Raises:
        ValueError: it is not; says what differs.
    """
    ours, theirs = asdict(config), state["config"]
    if changed := [name for name in ours if name not in RESUME_OPTIONS and ours[name] != theirs.get(name)]:
        differences = [f"{name} is {ours[name]!r} and was {theirs.get(name)!r}" for name in changed]
        raise ValueError(
            f"--resume {config.resume}: {'; '.join(differences)}: a run goes on with the options that it began with"
        )
    processes = len(state["training"][1]["processes"]) if state["training"] else parallel.ranks()
    if processes != parallel.ranks():
        raise ValueError(
            f"--resume {config.resume}: this run had {processes} processes, and now {parallel.ranks()}: go on with "
            + (f"torchrun --nproc_per_node={processes} -m srpkd.train ..." if processes > 1 else "one")
        )


def rehearse(config: TrainConfig, arms: Mapping[str, TrainConfig], teachers: Mapping[str, nn.Module]) -> None:
    """Build every stage's networks and losses on the device "meta", at no cost.

    Raises:
        ValueError: what does not fit, which else would show when the teacher has been trained.
    """
    if config.distils and not any(options.learns_from_teacher for options in arms.values()):
        raise ValueError(
            "lambda_kd, lambda_srp and lambda_feature are all 0: nothing would be learnt from the teacher; give one of "
            "them a weight, or leave the teacher out"
        )
    ghosts = {direction: copy.deepcopy(teacher).to("meta") for direction, teacher in teachers.items()}
    if config.teacher_netG:
        ghosts = make_ghost(teacher_config(config), {}).generators
    for name, options in arms.items():
        try:
            make_ghost(options, ghosts)
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}" if config.arms else str(error)) from error


def make_ghost(config: TrainConfig, teachers: Mapping[str, nn.Module]) -> Objective:
    """A stage's objective without data, its tapped layers, discriminators and relation loss tried out."""
    try:
        with torch.device("meta"):
            objective = make_objective(replace(config, device="meta"), 0, teachers)
        feature = torch.ones(1, 1, 2, 2, device=config.torch_device)
        relation_loss_of(config)(feature, feature)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    # what a discriminator judges is as large as the inputs of the generators, each one's
    sizes = dict.fromkeys(input_size(config, direction) for direction in objective.generators)
    for network, (height, width) in itertools.product(objective.discriminators.values(), sizes):
        images = torch.empty(1, next(network.parameters()).shape[1], height, width, device="meta")
        try:
            network(images)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for netD {config.netD}: use larger ones, "
                f"or --netD n_layers with fewer --n_layers_D ({error})"
            ) from error
    return objective


def load_teachers(config: TrainConfig) -> Generators:
    """The teachers that ``--teacher`` names: direction -> frozen generator in eval mode.

    Raises:
        CheckpointError: a file is missing, or is not the weights of a generator of this task.
    """
    teachers = {}
    for direction, path in teacher_files(config).items():
        teacher = load_generator(path)
        wanted = channels_of(config, direction)
        found = image_channels(teacher)
        if found != wanted:
            raise CheckpointError(
                f"{path}: this generator goes from {found[0]} to {found[1]} channels, the images from {wanted[0]} to "
                f"{wanted[1]}: set --input_nc and --output_nc, or take another teacher"
            )
        teachers[direction] = ready(teacher, config)
    if list(teachers) == ["G_A"]:
        parallel.say("no teacher from B to A (--teacher_B): only the generator from A to B is distilled")
    return teachers


def teacher_files(config: TrainConfig) -> dict[str, Path]:
    """direction -> the file of its teacher; for cycle_gan, a direction without a file has no teacher."""
    if not config.teacher:
        return {}
    path = Path(config.teacher).expanduser()
    direction = OBJECTIVES[config.model].directions[0]
    if path.is_dir():
        # of a run that trained both, its teacher, not its student
        name = f"latest_net_{direction}.pth"
        path = path / "teacher" / name if (path / "teacher" / name).exists() else path / name
    files = {direction: path}
    if config.model == "pix2pix":
        return files
    sibling = path.with_name(path.name.replace("_G_A", "_G_B"))
    if config.teacher_B:
        files["G_B"] = Path(config.teacher_B).expanduser()
    elif sibling != path and sibling.exists():
        files["G_B"] = sibling
    return files


def main(arguments: list[str] | None = None) -> None:
    """The command line. A configuration, images or weights that cannot be used end it with one message; what
    else goes wrong is a mistake in here, and shows its traceback."""
    config = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    with parallel.processes(config.torch_device):
        failure = attempt(config, shlex.join(["python", "-m", "srpkd.train", *given]))
    if failure:
        sys.exit(f"error: {failure}")


def attempt(config: TrainConfig, command: str) -> str:
    """Train and print the table; what was wrong, else nothing. An error raised would keep the networks: see
    parallel.processes."""
    try:
        plan = prepare(config, command)
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    try:
        record = execute(plan)
    except (DataError, CheckpointError, Diverged, WriteError) as error:
        return str(error)
    if parallel.rank() == 0:
        print(f"\n{format_table(record.report['table'])}\n\nreport: {record.folder / 'index.html'}")
    return ""


if __name__ == "__main__":
    main()
