"""Everything that is decided and checked before training starts."""

from __future__ import annotations

import copy
import itertools
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.checkpoints import CheckpointError, load_generator
from ..models.networks import image_channels
from . import distributed
from .config import run_folder, to_yaml
from .datasets import channels_of, input_size, validate_data
from .loggers import import_loggers, open_loggers
from .loop import Generators, freeze_for_inference, make_objective, make_relation_loss
from .objectives import OBJECTIVES, Objective
from .options import RESUME_OPTIONS, TrainConfig, teacher_config, variant_config
from .resume import load_state
from .run_dir import RunDir, new_folder
from .summary import Row, describe_task, device_name


@dataclass
class Plan:
    """A run that has been found to fit together, and how far it is.

    config: as given, with what stood open filled in.
    variants: name -> the options of a student.
    teachers: those loaded, or trained by now: direction -> generator, ready for use.
    rows: name -> its rows of the table, a row per seed.
    done: names of the stages that are finished.
    training: the name of the stage that was stopped, and its state, in a run that is resumed.
    students_began: seconds from the run's beginning to that of the first student.
    """

    config: TrainConfig
    variants: dict[str, TrainConfig]
    teachers: Generators
    record: RunDir
    rows: dict[str, list[Row]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    training: tuple[str, dict[str, Any]] | None = None
    students_began: float | None = None


def prepare(config: TrainConfig, command: str = "") -> Plan:
    """See that everything fits together, and make the run's folder or find it.

    Raises, before anything is written:
        DataError: the images do not fit (see ``srpkd.data.examine``).
        CheckpointError: the teacher's weights, or a stopped run's state, cannot be used.
        ValueError: options that contradict each other, or do not fit the networks.
        ImportError: a package is missing that a flag asks for.
    """
    config = config.resolved()
    packages = import_loggers(config)
    variants = {name: variant_config(config, name) for name in config.variants} or {"student": config}
    teachers = load_teachers(config)
    stages = [*variants.values(), *([teacher_config(config)] if config.teacher_netG else [])]
    summary = validate_data(config, stages, teachers)
    dry_run(config, variants, teachers)

    folder = run_folder(config.resume, config.runs_dir) if config.resume else None
    state = load_state(folder) if folder else {}
    if state:
        check_resumed(config, state)
    folder = distributed.broadcast_object(
        folder or (new_folder(config.runs_dir, config.name) if distributed.rank() == 0 else None)
    )
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(config.torch_device),
        "data": summary,
    }
    task = describe_task(config)
    report = {"title": config.name, "task": task, "command": command, "environment": environment}
    try:
        watchers = open_loggers(packages, folder, config) if distributed.rank() == 0 else []
        record = RunDir(folder, to_yaml(config), report, state.get("record"), watchers)
    except OSError:
        if not state and distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # it was made for this run, which has not begun
        raise
    distributed.print_rank0(f"{task}\n{summary}\n{'going on in' if state else 'writing to'} {folder}")
    progress = {key: state[key] for key in ("rows", "done", "training", "students_began") if key in state}
    return Plan(config, variants, teachers, record, **progress)


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
    processes = len(state["training"][1]["processes"]) if state["training"] else distributed.world_size()
    if processes != distributed.world_size():
        raise ValueError(
            f"--resume {config.resume}: this run had {processes} processes, and now {distributed.world_size()}: go on with "
            + (f"torchrun --nproc_per_node={processes} -m srpkd.train ..." if processes > 1 else "one")
        )


def dry_run(config: TrainConfig, variants: Mapping[str, TrainConfig], teachers: Mapping[str, nn.Module]) -> None:
    """Build every stage's networks and losses on the device "meta", at no cost.

    Raises:
        ValueError: what does not fit, which else would show when the teacher has been trained.
    """
    if config.distils and not any(options.learns_from_teacher for options in variants.values()):
        raise ValueError(
            "lambda_kd, lambda_srp and lambda_feature are all 0: nothing would be learnt from the teacher; give one of "
            "them a weight, or leave the teacher out"
        )
    ghosts = {direction: copy.deepcopy(teacher).to("meta") for direction, teacher in teachers.items()}
    if config.teacher_netG:
        ghosts = build_on_meta(teacher_config(config), {}).generators
    for name, options in variants.items():
        try:
            build_on_meta(options, ghosts)
        except ValueError as error:
            raise ValueError(f"variant {name!r}: {error}" if config.variants else str(error)) from error


def build_on_meta(config: TrainConfig, teachers: Mapping[str, nn.Module]) -> Objective:
    """A stage's objective without data, its tapped layers, discriminators and relation loss tried out."""
    try:
        with torch.device("meta"):
            objective = make_objective(replace(config, device="meta"), 0, teachers)
        feature = torch.ones(1, 1, 2, 2, device=config.torch_device)
        make_relation_loss(config)(feature, feature)
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
        teachers[direction] = freeze_for_inference(teacher, config)
    if list(teachers) == ["G_A"]:
        distributed.print_rank0("no teacher from B to A (--teacher_B): only the generator from A to B is distilled")
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
