"""Train a generator, or distil a small one from a large one: ``python -m srpkd.train``.

A run is a list of stages: the teacher, unless it is loaded from a file, then every student for every seed.
Whatever they are, they are trained by the same loop, ``fit``.
"""

from __future__ import annotations

import copy
import functools
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoint import CheckpointError, load_generator
from .complexity import count_macs, count_parameters
from .config import TrainConfig, check_keys, parse_arguments, to_yaml
from .data import DataError, examine, generate_world, open_dataset, open_world
from .distillation import Distillation
from .evaluation import collate, evaluate, metric_columns, show_relations, show_samples
from .loss import SRPLoss
from .networks import default_tap, define_generator, size_multiple
from .objectives import OBJECTIVES, Objective, learning_rate_law
from .record import RunRecord
from .report import format_table

Generators = dict[str, nn.Module]
TEST_SEED = 1_000_003  # of the generated test scenes: far from the training scenes' 0

cached_world = functools.cache(generate_world)


@dataclass(frozen=True)
class Stage:
    """One network (pair of networks for cycle_gan) to train: its name, options, seed and folder."""

    name: str
    config: TrainConfig
    seed: int
    folder: Path


class Trained(NamedTuple):
    """What a stage gave: generators by direction in eval mode, the steps taken, a step's median seconds."""

    generators: Generators
    steps: int
    seconds_per_step: float


def run(config: TrainConfig, command: str = "") -> RunRecord:
    """Do a whole run and leave its folder.

    Args:
        config: options.
        command: how the run was called, for its page.

    Raises, before anything is written or trained:
        DataError: the images do not fit (see ``srpkd.data.examine``).
        CheckpointError: the teacher's weights cannot be used.
        ValueError: options that contradict each other, or do not fit the networks.
    """
    config = config.resolved()
    arms = {name: arm_config(config, name) for name in config.arms} or {"student": config}
    teachers = load_teachers(config)
    summary = examine_data(config, arms, teachers)
    rehearse(config, arms, teachers)
    record = RunRecord(
        config.runs_dir,
        config.name,
        to_yaml(config),
        {
            "title": config.name,
            "task": describe_task(config),
            "command": command,
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": device_name(config.torch_device),
                "data": summary,
            },
        },
    )
    print(f"{describe_task(config)}\n{summary}\nwriting to {record.folder}")
    test_set = open_data(config, "test")
    rows: dict[str, list[dict[str, float]]] = {}
    shown: dict[str, Generators] = {}
    try:
        if config.teacher_netG:
            stage = Stage("teacher", teacher_config(config), config.seed, record.folder / "teacher")
            trained = fit(stage, record, {})
            rows["teacher"] = [measure(stage, record, trained, test_set, {})]
            teachers = trained.generators
        elif teachers:
            rows["teacher"] = [describe(config, teachers) | evaluate(teachers, test_set, config, {})]
        shown |= {"teacher": teachers} if teachers else {}
        publish(record, config, rows, shown, test_set)

        first_seed_began = record.elapsed
        for number in range(config.seeds):
            if number >= 2 and config.time_budget is not None:
                seconds_per_seed = (record.elapsed - first_seed_began) / number
                if record.elapsed + seconds_per_seed > config.time_budget:
                    print(f"{number} seeds: another would take longer than the time budget")
                    break
            for name, options in arms.items():
                several = len(arms) * config.seeds > 1
                label = f"{name} seed {number}" if several else name
                folder = record.folder / label.replace(" ", "-") if several else record.folder
                stage = Stage(label, options, config.seed + number, folder)
                trained = fit(stage, record, teachers)
                rows.setdefault(name, []).append(measure(stage, record, trained, test_set, teachers))
                shown.setdefault(name, trained.generators)
            publish(record, config, rows, shown, test_set)
        record.report["status"] = "finished"
        record.write()
    except BaseException:
        record.report["status"] = "stopped"
        record.write()
        raise
    finally:
        record.close()
    return record


def fit(stage: Stage, record: RunRecord, teachers: Mapping[str, nn.Module]) -> Trained:
    """Train one stage, with a progress bar, metrics and checkpoints.

    Args:
        teachers: direction -> frozen generator; {} trains without one.
    """
    config = stage.config
    objective = make_objective(config, stage.seed, teachers)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: learning_rate_law(epoch + 1, config.n_epochs, config.n_epochs_decay)
        )
        for optimizer in objective.optimizers.values()
    ]
    # after the networks are made, whose number of random draws differs: all arms of a seed see the same images
    seed_everything(stage.seed)
    loader = make_loader(open_data(config, "train"), config, stage.seed)
    epochs, epoch_steps = config.n_epochs + config.n_epochs_decay, config.epoch_steps or len(loader)
    batches, step = endless(loader), 0
    durations, measured, began = [], 0, time.perf_counter()
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs no thousand lines
    with tqdm(total=epochs * epoch_steps, desc=stage.name, unit="step", mininterval=interval) as progress:
        for epoch in range(1, epochs + 1):
            for _ in range(epoch_steps):
                batch = {side: images.to(config.torch_device) for side, images in next(batches).items()}
                losses = objective.step(batch)
                step += 1
                if step % config.print_freq == 0 or step == 1:
                    values = {name: float(loss) for name, loss in losses.items()}  # waits for the GPU
                    now = time.perf_counter()
                    durations.append((now - began) / (step - measured))
                    measured, began = step, now
                    record.log(stage.name, step, epoch=epoch, **values)
                    progress.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                progress.update()
            for schedule in schedules:
                schedule.step()
            if epoch % config.save_epoch_freq == 0 and epoch < epochs:
                record.save(stage.folder, str(epoch), objective.generators)
                record.save(stage.folder, "latest", objective.generators | objective.discriminators)
    record.save(stage.folder, "latest", objective.generators | objective.discriminators)
    folder = stage.folder.relative_to(record.folder)
    record.report["files"] += [{"file": str(folder / f"latest_net_{name}.pth")} for name in objective.generators]
    for distillation in objective.distillations.values():
        distillation.close()
    for generator in objective.generators.values():
        generator.eval().requires_grad_(False)
    return Trained(objective.generators, step, statistics.median(durations[1:] or durations))


def make_objective(config: TrainConfig, seed: int, teachers: Mapping[str, nn.Module]) -> Objective:
    """The task's networks, optimizers and losses, on the device and in training mode."""
    kind, device = OBJECTIVES[config.model], config.torch_device
    seed_everything(seed)
    generators, distillations = {}, {}
    for direction in kind.directions:
        input_nc, output_nc = channels_of(config, direction)
        generators[direction] = define_generator(
            config.netG,
            input_nc,
            output_nc,
            config.ngf,
            config.norm,
            not config.no_dropout,
            init_type=config.init_type,
            init_gain=config.init_gain,
        ).to(device)
    for direction, teacher in teachers.items():
        if not (config.lambda_kd or config.lambda_srp or config.lambda_feature):
            continue
        generator = generators[direction]
        distillations[direction] = Distillation(
            generator,
            teacher,
            config.layers or {default_tap(generator): default_tap(teacher)},
            relation_loss_of(config),
            lambda_kd=config.lambda_kd,
            lambda_srp=config.lambda_srp,
            lambda_feature=config.lambda_feature,
            input_shape=(channels_of(config, direction)[0], *input_size(config)),
        )
    # adapters drew random numbers: the discriminators start alike in every arm all the same
    seed_everything(seed + 1)
    return kind(config, generators, distillations)


def relation_loss_of(config: TrainConfig) -> SRPLoss:
    return SRPLoss(config.normalize, config.distance, config.delta, backend=config.backend)


def rehearse(config: TrainConfig, arms: Mapping[str, TrainConfig], teachers: Mapping[str, nn.Module]) -> None:
    """Build every stage's networks and losses on the device "meta", at no cost.

    Raises:
        ValueError: what does not fit, which else would show when the teacher has been trained.
    """
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
    height, width = input_size(config)
    for network in objective.discriminators.values():
        images = torch.empty(1, next(network.parameters()).shape[1], height, width, device="meta")
        try:
            network(images)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for netD {config.netD}: use larger ones, "
                f"or --netD n_layers with fewer --n_layers_D ({error})"
            ) from error
    return objective


# --- data -------------------------------------------------------------------------------------------------------


def open_data(config: TrainConfig, phase: str) -> Dataset:
    """The images of a phase, "train" or "test": a folder's, or the generated ones (always in pairs for the test)."""
    testing = phase == "test"
    limit = None if testing else config.max_dataset_size
    if config.is_world:
        world = cached_world(
            config.world_test_pairs if testing else config.world_pairs,
            config.world_size,
            TEST_SEED if testing else 0,
            config.world_variant,
        )
        paired = testing or config.dataset_mode == "aligned"
        if limit is not None and not paired:
            limit *= 2  # one half of the scenes gives the photos, the other the label maps
        return open_world(
            world[:limit],
            config.direction,
            aligned=paired,
            flip=not (testing or config.no_flip),
            serial_batches=config.serial_batches,
        )
    return open_dataset(
        config.dataroot,
        config.dataset_mode,
        phase,
        config.direction,
        preprocess=config.preprocess,
        load_size=config.load_size,
        crop_size=config.crop_size,
        no_flip=config.no_flip,
        serial_batches=testing or config.serial_batches,
        max_dataset_size=limit,
        input_nc=config.input_nc,
        output_nc=config.output_nc,
    )


def examine_data(config: TrainConfig, arms: Mapping[str, TrainConfig], teachers: Mapping[str, nn.Module]) -> str:
    """What the images are, in a line; raises a DataError that says all that is wrong with them."""
    stages = [*arms.values(), *([teacher_config(config)] if config.teacher_netG else [])]
    with torch.device("meta"):
        nets = [define_generator(netG) for netG in {stage.netG for stage in stages}]
    multiple = max(size_multiple(net) for net in [*nets, *teachers.values()])
    limits = [stage.max_dataset_size for stage in stages]
    if config.is_world:
        if config.world_size % multiple:
            raise DataError(f"world_size={config.world_size} must be a multiple of {multiple} for these generators")
        return (
            f"generated scenes of {config.world_size} x {config.world_size} pixels: "
            f"{config.world_pairs} to train, {config.world_test_pairs} to test"
        )
    summaries = [
        examine(
            config.dataroot,
            config.dataset_mode,
            phase,
            preprocess=config.preprocess,
            load_size=config.load_size,
            crop_size=config.crop_size,
            direction=config.direction,
            max_dataset_size=max(limits) if phase == "train" and None not in limits else None,
            batch_size=max(stage.batch_size for stage in stages) if phase == "train" else 1,
            size_multiple=multiple,
        )
        for phase in ("train", "test")
    ]
    return "; ".join(map(str, summaries))


def make_loader(dataset: Dataset, config: TrainConfig, seed: int) -> DataLoader:
    """Batches of {"A", "B"}, shuffled by the seed."""
    workers = 0 if config.is_world else config.num_threads
    return DataLoader(
        dataset,
        config.batch_size,
        shuffle=not config.serial_batches,
        num_workers=workers,
        collate_fn=collate,
        drop_last=len(dataset) >= config.batch_size,
        pin_memory=config.torch_device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def endless(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Pass after pass over the images."""
    while True:
        yield from loader


def input_size(config: TrainConfig) -> tuple[int, int]:
    """(H, W) of what the generators are trained on, as far as the options say it."""
    side = config.world_size if config.is_world else config.crop_size
    return side, side


# --- teachers and students --------------------------------------------------------------------------------------


def teacher_config(config: TrainConfig) -> TrainConfig:
    """The options of a teacher that the run trains itself."""
    return replace(
        config,
        netG=config.teacher_netG,
        ngf=config.teacher_ngf,
        n_epochs=config.teacher_n_epochs,
        n_epochs_decay=config.teacher_n_epochs_decay,
        max_dataset_size=config.teacher_max_dataset_size,
    )


def arm_config(config: TrainConfig, name: str) -> TrainConfig:
    """The options of one arm, checked; errors name it."""
    options = check_keys(config.arms[name], f"arm {name!r}")
    try:
        return replace(config, **options).resolved()
    except (TypeError, ValueError) as error:
        raise ValueError(f"arm {name!r}: {error}") from error


def load_teachers(config: TrainConfig) -> Generators:
    """The teachers that ``--teacher`` names: direction -> frozen generator in eval mode.

    Raises:
        CheckpointError: a file is missing, or is not the weights of a generator of this task.
    """
    teachers = {}
    for direction, path in teacher_files(config).items():
        teacher = load_generator(path)
        wanted = channels_of(config, direction)
        convs = [module for module in teacher.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
        found = convs[0].in_channels, convs[-1].out_channels
        if found != wanted:
            raise CheckpointError(
                f"{path}: this generator goes from {found[0]} to {found[1]} channels, the images from {wanted[0]} to "
                f"{wanted[1]}: set --input_nc and --output_nc, or take another teacher"
            )
        teachers[direction] = teacher.to(config.torch_device).eval().requires_grad_(False)
    if list(teachers) == ["G_A"]:
        print("no teacher from B to A (--teacher_B): only the generator from A to B is distilled")
    return teachers


def teacher_files(config: TrainConfig) -> dict[str, Path]:
    """direction -> the file of its teacher; for cycle_gan, a direction without a file has no teacher."""
    if not config.teacher:
        return {}
    path = Path(config.teacher).expanduser()
    if config.model == "pix2pix":
        return {"G": path / "latest_net_G.pth" if path.is_dir() else path}
    if path.is_dir():
        path /= "latest_net_G_A.pth"
    files = {"G_A": path}
    sibling = path.with_name(path.name.replace("_G_A", "_G_B"))
    if config.teacher_B:
        files["G_B"] = Path(config.teacher_B).expanduser()
    elif sibling != path and sibling.exists():
        files["G_B"] = sibling
    return files


def channels_of(config: TrainConfig, direction: str) -> tuple[int, int]:
    """(input, output) channels of a direction's generator."""
    channels = config.input_nc, config.output_nc
    return channels[::-1] if direction == "G_B" else channels


# --- the table, the page ----------------------------------------------------------------------------------------


def measure(
    stage: Stage, record: RunRecord, trained: Trained, test_set: Dataset, teachers: Generators
) -> dict[str, float]:
    """A stage's row of the table; its metrics are logged too."""
    metrics = evaluate(trained.generators, test_set, stage.config, teachers)
    record.log(stage.name, trained.steps, **metrics)
    return describe(stage.config, trained.generators) | metrics | {"seconds_per_step": trained.seconds_per_step}


def describe(config: TrainConfig, generators: Generators) -> dict[str, float]:
    """How large one generator is."""
    direction, generator = next(iter(generators.items()))
    shape = (1, channels_of(config, direction)[0], *input_size(config))
    return {"parameters": count_parameters(generator), "macs": count_macs(generator, shape)}


def publish(
    record: RunRecord,
    config: TrainConfig,
    rows: Mapping[str, list[dict[str, float]]],
    shown: Mapping[str, Generators],
    test_set: Dataset,
) -> None:
    """Bring the table, the pictures and the page up to date."""
    height, width = input_size(config)
    columns = [
        {"key": "name", "label": "network", "format": ""},
        {"key": "parameters", "label": "parameters", "format": ",", "help": "of one generator"},
        {"key": "macs", "label": "MACs", "format": ",", "help": f"multiply-accumulates of {height} x {width} pixels"},
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
    record.write()


def summarise(key: str, group: list[dict[str, float]]) -> Any:
    """One value, or mean and standard deviation over the seeds; None where there is none."""
    values = [row[key] for row in group if key in row]
    if len(values) < 2 or key in ("parameters", "macs"):
        return values[0] if values else None
    spread = torch.tensor(values, dtype=torch.float64)  # statistics.stdev cannot take what diverged
    return {"mean": spread.mean().item(), "std": spread.std().item(), "n": len(values)}


def table_notes(config: TrainConfig, rows: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """What each arm gains over output distillation alone, seed by seed: arms of a seed start and draw alike."""
    arms = [name for name in config.arms if len(rows.get(name, [])) > 1]
    options = {name: arm_config(config, name) for name in arms}
    plain = [n for n, o in options.items() if o.lambda_kd and not o.lambda_srp and not o.lambda_feature]
    if not plain:
        return []
    base, notes = plain[0], []
    scores = [column for column in metric_columns(rows[base]) if not column["key"].startswith("teacher")]
    if not scores:  # unpaired images: there is no truth
        return []
    score = scores[0]
    for name in arms:
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


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), and Python's generator, which the image pool draws from."""
    torch.manual_seed(seed)
    random.seed(seed)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        record = run(config, shlex.join(["python", "-m", "srpkd.train", *given]))
    except (ValueError, OSError, ImportError) as error:  # of them DataError and CheckpointError are ValueErrors
        sys.exit(f"error: {error}")
    print(f"\n{format_table(record.report['table'])}\n")
    print(f"report: {record.folder / 'index.html'}")


if __name__ == "__main__":
    main()
