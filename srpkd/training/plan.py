"""Everything that a run checks and decides before training starts."""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..defaults import KD_WEIGHT, SRP_WEIGHT
from ..devices import describe_device
from ..models.checkpoints import CheckpointError, load_generator, teacher_files
from ..models.networks import define_generator, image_channels
from . import distributed
from .config import run_folder, to_yaml, update_yaml
from .datasets import DataSummary, channels_of, check_batches, validate_data
from .extension import check_processes, extend, starting_variants
from .fingerprints import check_unchanged, fingerprints
from .folder_lock import FolderLock
from .loggers import import_loggers, open_loggers
from .loop import Generators, freeze_for_inference, make_objective, make_relation_loss
from .objectives import OBJECTIVES, Objective
from .options import EXTEND_OPTIONS, RESUME_OPTIONS, ResolvedConfig, TrainConfig, teacher_config, variant_config
from .resume import load_state
from .run_dir import RunDir, new_folder
from .speedups import compiler_problem, slow_precision_reason
from .unused_options import unused_options
from .warm_start import generator_spec, warm_start

Row = dict[str, float]  # of the table: values by name


@dataclass
class Plan:
    """A validated run and its progress.

    Attributes:
        config: options of the run.
        teacher: options of the teacher that the run trains, or None.
        variants: name -> options of a student.
        teachers: direction -> teacher that was loaded or trained, frozen and in eval mode.
        run_dir: folder of the run.
        data: what is known of the images.
        inputs: fingerprints of what the run reads.
        rows: name -> rows of the table, one per seed.
        done: names of the finished stages.
        training: for a resumed run, the name of the interrupted stage and its state.
        extended: names of the stages that were finished before the run was extended, and are not again.
        students_began: seconds from the start of the run to the start of the first student.
    """

    config: ResolvedConfig
    teacher: ResolvedConfig | None
    variants: dict[str, ResolvedConfig]
    teachers: Generators
    run_dir: RunDir
    data: DataSummary
    inputs: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    training: tuple[str, dict[str, Any]] | None = None
    extended: list[str] = field(default_factory=list)
    students_began: float | None = None


def prepare(config: TrainConfig, command: str = "") -> Plan:
    """Check that everything fits together, and create the folder of the run or open that of a resumed one.

    Args:
        config: options of the run.
        command: command line that started the run, for the page.

    Raises: before anything is written,
        ValueError: Options contradict each other, or do not fit the networks, or another process trains the run.
        DataError: The images do not fit (see ``srpkd.data.validate``).
        CheckpointError: The weights of a teacher or of a warm start, or the state of a resumed run cannot be used.
        ImportError: A logging option needs a package that is not installed.
    """
    config = with_usable_precision(config.resolved())
    if config.fast:
        speedups = ", ".join(f"{name}={getattr(config, name)}" for name in ("precision", "compile", "channels_last"))
        distributed.print_rank0(f"fast: {speedups}")
    with ExitStack() as on_error:
        checked = distributed.raise_on_all_ranks(partial(_check, config, on_error))
        starting = starting_variants(config, checked.variants, checked.state)
        dry_run(config, checked, starting)  # on all ranks the same
        notes = distributed.raise_on_all_ranks(partial(check_batches, checked.stages, checked.data.train_layout))
        folder = distributed.broadcast_object(distributed.raise_on_all_ranks(partial(_folder, config)))
        run_dir = distributed.raise_on_all_ranks(partial(_open_run_dir, folder, config, command, checked))
        on_error.pop_all()
    state = checked.state
    if not state:
        notes += unused_options(config, checked.teacher, checked.variants, checked.teachers)
        for line in notes:
            distributed.print_rank0(f"note: {line}")
    distributed.print_rank0(
        f"{describe_task(config)}\n{checked.data.text}\n{'resuming' if state else 'writing to'} {folder}"
    )
    progress = {key: state[key] for key in ("rows", "done", "training", "extended", "students_began") if key in state}
    return Plan(
        config, checked.teacher, checked.variants, checked.teachers, run_dir, checked.data, checked.inputs, **progress
    )


def check_compiler(config: ResolvedConfig) -> None:
    """Check that torch.compile works, if the networks will be compiled.

    Raises:
        ValueError: It does not: without this check, the first training step would raise an error of the compiler.
    """
    if config.compile and (problem := compiler_problem(config.torch_device)):
        remedy = f"use --precision {config.precision} instead of --fast" if config.fast else "leave out --compile"
        raise ValueError(
            f"compile: torch.compile does not work here ({problem}): it needs a C++ compiler (GCC or clang, on Windows "
            f"that of Visual Studio) or, for a GPU, Triton and a C compiler: install it, or {remedy}"
        )


class _Checked(NamedTuple):
    """What ``prepare`` finds out before it writes anything."""

    packages: Mapping[str, ModuleType]
    teacher: ResolvedConfig | None
    variants: dict[str, ResolvedConfig]
    stages: list[ResolvedConfig]  # the variants and the teacher
    teachers: Generators
    data: DataSummary
    inputs: dict[str, str]
    lock: FolderLock | None
    state: dict[str, Any]


def _check(config: ResolvedConfig, on_error: ExitStack) -> _Checked:
    """Check what needs no other rank, and lock the folder of a resumed run; ``on_error`` releases it."""
    check_compiler(config)
    packages = import_loggers(config)
    teacher = teacher_config(config) if config.teacher_netG else None
    variants = {name: variant_config(config, name) for name in config.variants} or {"student": config}
    teachers = load_teachers(config)
    stages = [*variants.values(), *([teacher] if teacher else [])]
    data = validate_data(config, stages, teachers)
    inputs = fingerprints(data, teachers)
    state: dict[str, Any] = {}
    lock: FolderLock | None = None
    if config.resume:
        folder = run_folder(config.resume, config.runs_dir)
        if distributed.rank() == 0:
            lock = FolderLock(folder)  # before the state is read, which another process may replace
            on_error.callback(lock.close)
        state = load_state(folder)
        check_resumed(config, state)
        check_unchanged(config.resume, inputs, state.get("inputs", {}))
        state = extend(config, variants, folder, state)
    return _Checked(packages, teacher, variants, stages, teachers, data, inputs, lock, state)


def _folder(config: ResolvedConfig) -> Path:
    """Return the folder of the run, on rank 0."""
    if distributed.rank() > 0:
        return Path()
    if not config.resume:
        return new_folder(config.runs_dir, config.name)
    folder = run_folder(config.resume, config.runs_dir)
    update_yaml(folder / "config.yaml", {name: getattr(config, name) for name in EXTEND_OPTIONS})
    return folder


def with_usable_precision(config: ResolvedConfig) -> ResolvedConfig:
    """Return the options with precision fp32 instead of one that would be slower, and say so.

    A resumed run keeps its precision, and one with `force_bf16` its bf16.
    """
    reason = slow_precision_reason(config.torch_device, config.precision)
    if not reason or config.force_bf16:
        return config
    if config.resume:
        distributed.print_rank0(f"precision {config.precision}: {reason}; a resumed run keeps its precision")
        return config
    distributed.print_rank0(
        f"precision fp32 instead of {config.precision}: {reason} (--force_bf16 uses it nevertheless)"
    )
    return replace(config, precision="fp32")


def _open_run_dir(folder: Path, config: ResolvedConfig, command: str, checked: _Checked) -> RunDir:
    report = {
        "title": config.name,
        "task": describe_task(config),
        "command": command,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": describe_device(config.torch_device),
            "data": checked.data.text.replace("\n", "; "),
        },
    }
    try:
        loggers = open_loggers(checked.packages, folder, config) if distributed.rank() == 0 else []
        return RunDir(folder, to_yaml(config), report, checked.state.get("record"), loggers, checked.lock)
    except OSError:
        if not checked.state and distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the new folder of a run that cannot start
        raise


def describe_task(config: ResolvedConfig) -> str:
    """Return the task of a run in one sentence."""
    task = {"pix2pix": "pix2pix on pairs", "cycle_gan": "CycleGAN on unpaired images"}[config.model]
    student = f"{config.netG} of ngf {config.ngf}"
    if config.antialias != "none":
        student += f" with antialias {config.antialias}"
    if config.teacher:
        return f"{task}: {student}, distilled from {config.teacher}"
    if config.teacher_netG:
        return f"{task}: {student}, distilled from {config.teacher_netG} of ngf {config.teacher_ngf}"
    return f"{task}: {student}, without a teacher"


def check_resumed(config: ResolvedConfig, state: Mapping[str, Any]) -> None:
    """Check that a saved state fits the options and the number of processes.

    Options that did not exist when the state was written count as having their default.

    Raises:
        ValueError: It does not; the message lists the differences.
    """
    ours, theirs, changeable = asdict(config), state["config"], RESUME_OPTIONS | EXTEND_OPTIONS
    if ours.keys() - theirs.keys():
        stored = {name: value for name, value in theirs.items() if name in ours}
        theirs = asdict(TrainConfig(**stored).resolved()) | stored
    if changed := [name for name in ours if name not in changeable and ours[name] != theirs[name]]:
        differences = [f"{name} is {ours[name]!r} and was {theirs[name]!r}" for name in changed]
        raise ValueError(f"--resume {config.resume}: {'; '.join(differences)}: a resumed run must keep its options")
    if state["training"]:
        check_processes(config, state["training"][1])


def dry_run(config: ResolvedConfig, checked: _Checked, starting: Collection[str]) -> None:
    """Build the networks and losses of every stage on the "meta" device, which allocates no memory.

    Args:
        checked: options of all stages, teachers that were loaded from files, and sizes of the images.
        starting: names of the variants whose training has yet to start: the files that they start from are read.

    Raises:
        ValueError: Options do not fit together, which would otherwise show only when the student's training starts.
    """
    variants = checked.variants
    if config.distils and not any(options.learns_from_teacher for options in variants.values()):
        raise ValueError(
            "lambda_kd, lambda_srp and lambda_feature are all 0, so the student does not learn from the teacher: give "
            "one of them a weight, or remove the teacher"
        )
    if not (config.distils or config.resume):  # a run that was started before this check can be resumed
        defaults = {"lambda_kd": KD_WEIGHT[config.model], "lambda_srp": SRP_WEIGHT[config.model], "lambda_feature": 0.0}
        # the config.yaml of a run without a teacher has the defaults
        if given := [name for name, default in defaults.items() if getattr(config, name) not in (0, default)]:
            raise ValueError(
                f"{given[0]}={getattr(config, given[0])} is the weight of a loss that needs a teacher: pass --teacher "
                f"or --teacher_netG, or leave out --{given[0]}"
            )
    if checked.teacher:
        meta_teachers: Mapping[str, nn.Module] = build_on_meta(checked.teacher, {}, checked.data).generators
    else:
        meta_teachers = {name: copy.deepcopy(network).to("meta") for name, network in checked.teachers.items()}
    for name, options in variants.items():
        try:
            objective = build_on_meta(options, meta_teachers, checked.data)
            if name in starting:
                warm_start(objective, options)
        except ValueError as error:
            raise ValueError(f"variant {name!r}: {error}" if config.variants else str(error)) from error


def build_on_meta(config: ResolvedConfig, teachers: Mapping[str, nn.Module], data: DataSummary) -> Objective:
    """Build the objective of a stage on the "meta" device, and try its networks and its relation loss.

    Raises:
        ValueError: Options do not fit the networks or the image size.
    """
    for direction in OBJECTIVES[config.model].directions:  # before the objective, whose taps run the generators
        with torch.device("meta"):
            generator = define_generator(**asdict(generator_spec(config, direction)))
        sizes = dict.fromkeys([*data.train_sizes, *data.test_sizes])
        _try_sizes(generator, f"netG {config.netG}", sizes, "use a larger --crop_size or larger images")
    try:
        with torch.device("meta"):
            objective = make_objective(replace(config, device="meta"), 0, teachers, data.train_layout)
        feature = torch.ones(1, 1, 2, 2, device=config.torch_device)
        make_relation_loss(config)(feature, feature)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    advice = "use larger images, or --netD n_layers with fewer --n_layers_D"
    for network in objective.discriminators.values():  # they see outputs, which are as large as inputs
        _try_sizes(network, f"netD {config.netD}", data.train_sizes, advice)
    return objective


def _try_sizes(network: nn.Module, name: str, sizes: Iterable[tuple[int, int]], advice: str) -> None:
    """Run a network on "meta" images of several sizes (H, W), and raise a ValueError if it cannot process one."""
    for height, width in sizes:
        images = torch.empty(1, next(network.parameters()).shape[1], height, width, device="meta")
        try:
            network(images)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for {name}: {advice} ({error})"
            ) from error


def load_teachers(config: ResolvedConfig) -> Generators:
    """Load the teachers that ``--teacher`` names.

    Returns:
        direction -> generator, frozen and in eval mode.

    Raises:
        CheckpointError: A file is missing, or does not contain the weights of a generator of this task.
    """
    teachers = {}
    files = teacher_files(config.model, config.teacher, config.teacher_B) if config.teacher else {}
    for direction, path in files.items():
        teacher = load_generator(path)
        expected = channels_of(config, direction)
        received = image_channels(teacher)
        if received != expected:
            raise CheckpointError(
                f"{path}: this generator maps {received[0]} to {received[1]} channels, the images have {expected[0]} "
                f"and {expected[1]}: set --input_nc and --output_nc, or use another teacher"
            )
        teachers[direction] = freeze_for_inference(teacher, config)
    if list(teachers) == ["G_A"]:
        distributed.print_rank0("no teacher from B to A (--teacher_B): only the generator from A to B is distilled")
    return teachers
