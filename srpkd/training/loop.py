"""Training one stage of a run: a teacher, or a student with its teachers. Whatever it is, the loop is the same."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..distiller import unwrapped
from ..loss import SRPLoss
from ..models.networks import default_tap, define_generator, normalize_per_image
from . import distributed
from .datasets import channels_of, input_size, make_loader, open_data
from .objectives import OBJECTIVES, Objective, learning_rate_law, restore, state_of
from .options import TrainConfig
from .resume import random_state, seed_everything, set_random_state
from .run_dir import RunDir
from .student_teacher import StudentTeacher

Generators = dict[str, nn.Module]
PATIENCE = 10  # steps in a row that may be left out because a loss is not finite


class Diverged(ArithmeticError):
    """Training that only gives losses that are not finite any more."""


@dataclass(frozen=True)
class Stage:
    """One network (pair of networks for cycle_gan) to train: its name, options, seed and folder."""

    name: str
    config: TrainConfig
    seed: int
    folder: Path


class Trained(NamedTuple):
    """What a stage gave: generators by direction, `ready` for use, the steps taken, a step's median seconds."""

    generators: Generators
    steps: int
    seconds_per_step: float


def fit(
    stage: Stage,
    record: RunDir,
    teachers: Mapping[str, nn.Module],
    state: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    show: Callable[[Generators], None] | None = None,
) -> Trained:
    """Train one stage, with a progress bar, metrics and checkpoints.

    Args:
        teachers: direction -> frozen generator; {} trains without one.
        state: what `keep` was given when the stage was stopped: it goes on from there, and ends as it would have.
        keep: takes the stage's state, every save_latest_freq steps.
        show: takes a copy of the generators, `ready` for use, every update_html_freq steps.

    Raises:
        Diverged: PATIENCE steps in a row had a loss that is not finite.
    """
    config = stage.config
    objective = make_objective(config, stage.seed, teachers)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: learning_rate_law(epoch + 1, config.n_epochs, config.n_epochs_decay)
        )
        for optimizer in objective.optimizers.values()
    ]
    first = state["step"] + 1 if state else 1
    loader = make_loader(open_data(config, "train"), config, stage.seed, start=first - 1)
    batches = iter(loader)
    epoch_steps = config.epoch_steps or len(loader.batch_sampler)
    steps = (config.n_epochs + config.n_epochs_decay) * epoch_steps
    # after the networks are made, whose number of random draws differs: all variants of a seed draw the same; and each
    # process draws its own
    seed_everything(stage.seed + 1_000_003 * distributed.rank())
    durations: list[float] = []
    if state:
        durations = _restore(objective, schedules, state)

    measured, began = first - 1, time.perf_counter()
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs no thousand lines
    with tqdm(
        total=steps,
        initial=first - 1,
        desc=stage.name,
        unit="step",
        mininterval=interval,
        disable=distributed.rank() > 0,
    ) as progress:
        for step in range(first, steps + 1):
            epoch = (step - 1) // epoch_steps + 1
            batch = {
                side: images.to(config.torch_device, non_blocking=True, memory_format=config.memory_format)
                for side, images in next(batches).items()
            }
            losses = objective.step(batch)
            if objective.updates.consecutive_skips == 0:
                for name, average in objective.averages.items():
                    average.update_parameters(objective.generators[name])
            elif objective.updates.consecutive_skips == PATIENCE:
                raise Diverged(_why_diverged(stage, record, objective, step))
            if step % config.print_freq == 0 or step == 1:
                values = _values(losses)  # waits for the GPU
                now = time.perf_counter()
                durations.append((now - began) / (step - measured))
                measured, began = step, now
                skipped = {"skipped": objective.updates.skipped} if objective.updates.skipped else {}
                record.log(stage.name, step, epoch=epoch, **values, **skipped)
                shown = {name: f"{value:.3g}" for name, value in values.items()} | skipped
                progress.set_postfix({"img/s": f"{config.batch_size / durations[-1]:.3g}"} | shown, refresh=False)
            progress.update()
            paused = time.perf_counter()
            if step % epoch_steps == 0:
                for schedule in schedules:
                    schedule.step()
                if epoch % config.save_epoch_freq == 0 and step < steps:
                    record.save_checkpoint(stage.folder, str(epoch), ema_or_live(objective))
                    record.save_checkpoint(stage.folder, "latest", ema_or_live(objective) | objective.discriminators)
            if show and step % config.update_html_freq == 0 and step < steps and distributed.rank() == 0:
                show(
                    {
                        name: freeze_for_inference(copy.deepcopy(network), config)
                        for name, network in ema_or_live(objective).items()
                    }
                )
            if keep and step % config.save_latest_freq == 0 and _is_sound(objective):
                keep(_state(objective, schedules, step, durations))
            began += time.perf_counter() - paused
    record.save_checkpoint(stage.folder, "latest", ema_or_live(objective) | objective.discriminators)
    folder = stage.folder.relative_to(record.folder)
    record.report["files"] += [{"file": str(folder / f"latest_net_{name}.pth")} for name in objective.generators]
    for distillation in objective.distillations.values():
        distillation.close()
    generators = {name: freeze_for_inference(network, config) for name, network in ema_or_live(objective).items()}
    return Trained(generators, steps, statistics.median(durations[1:] or durations))


def make_objective(config: TrainConfig, seed: int, teachers: Mapping[str, nn.Module]) -> Objective:
    """The task's networks, optimizers and losses, on the device and in training mode."""
    kind, device = OBJECTIVES[config.model], config.torch_device
    seed_everything(seed)
    generators, distillations = {}, {}
    for direction in kind.directions:
        input_nc, output_nc = channels_of(config, direction)
        network = define_generator(
            config.netG,
            input_nc,
            output_nc,
            config.ngf,
            config.norm,
            not config.no_dropout,
            init_type=config.init_type,
            init_gain=config.init_gain,
        )
        network = network.to(device, memory_format=config.memory_format)
        generators[direction] = distributed.wrap(network, config.compile)
    for direction, teacher in (teachers if config.learns_from_teacher else {}).items():
        generator = generators[direction]
        distillations[direction] = StudentTeacher(
            generator,
            teacher,
            config.layers or {default_tap(unwrapped(generator)): default_tap(teacher)},
            make_relation_loss(config),
            lambda_kd=config.lambda_kd,
            lambda_srp=config.lambda_srp,
            lambda_feature=config.lambda_feature,
            input_shape=(channels_of(config, direction)[0], *input_size(config, direction)),
        )
    # adapters drew random numbers: the discriminators start alike in every variant all the same
    seed_everything(seed + 1)
    return kind(config, generators, distillations)


def make_relation_loss(config: TrainConfig) -> SRPLoss:
    return SRPLoss(config.normalize, config.distance, config.delta, backend=config.backend, scope=config.scope)


def freeze_for_inference(network: nn.Module, config: TrainConfig) -> nn.Module:
    """The generator itself, for use: on the device, frozen, without dropout, and its batch norms by the running
    statistics or, with train_mode_norm, by each image's own."""
    for module in network.modules():
        module._forward_hooks.clear()
    if config.train_mode_norm:
        network = normalize_per_image(network)
    return network.to(config.torch_device, memory_format=config.memory_format).eval().requires_grad_(False)


def ema_or_live(objective: Objective) -> Generators:
    """The generators that a stage is for: their averages, if there are such."""
    return objective.generators | {name: average.module for name, average in objective.averages.items()}


def _state(objective: Objective, schedules: list[Any], step: int, durations: list[float]) -> dict[str, Any]:
    """All that the next step hangs on, and each process's own."""
    pools = getattr(objective, "pools", {})
    own = {
        "random": random_state(),
        # stacked, since an image by itself would be saved with the batch that it was a part of
        "pools": {name: torch.stack(pool.images).cpu() for name, pool in pools.items() if pool.images},
    }
    return {
        "step": step,
        "durations": durations,
        "objective": state_of(objective),
        "schedules": [schedule.state_dict() for schedule in schedules],
        "processes": distributed.all_gather_object(own),
    }


def _restore(objective: Objective, schedules: list[Any], state: Mapping[str, Any]) -> list[float]:
    """Undo `_state`; gives the durations."""
    restore(objective, state["objective"])
    for schedule, kept in zip(schedules, state["schedules"]):
        schedule.load_state_dict(kept)
    own = state["processes"][distributed.rank()]
    for name, images in own["pools"].items():
        objective.pools[name].images = list(images.to(objective.config.torch_device))
    set_random_state(own["random"])
    return list(state["durations"])


def _is_sound(objective: Objective) -> bool:
    """Whether this is a state to go on from; the one that was kept last stays otherwise."""
    parameters = [p for network in objective.networks.values() for p in network.parameters()]
    return objective.updates.consecutive_skips == 0 and all(bool(p.isfinite().all()) for p in parameters)


def _values(losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The losses of all processes, averaged: those of the whole batch."""
    everywhere = distributed.all_gather_object({name: float(loss) for name, loss in losses.items()})
    return {name: statistics.fmean(values[name] for values in everywhere) for name in losses}


def _why_diverged(stage: Stage, record: RunDir, objective: Objective, step: int) -> str:
    return (
        f"{stage.name}: {PATIENCE} steps in a row had a loss that is not finite, first {objective.updates.nonfinite_loss}, "
        f"at step {step - PATIENCE + 1}; none of them changed the networks. {record.folder} keeps the last good state "
        "and weights. Start anew with a lower --lr, with --clip_grad_norm 1"
        + (", or with --precision bf16" if stage.config.precision == "fp16" else "")
    )
