"""Training of one stage of a run: a teacher, or a student with its teachers."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.layouts import FolderLayout
from ..devices import may_copy_ahead
from ..loss import SRPLoss
from ..models.networks import default_tap, define_generator, normalize_per_image
from ..progress import ProgressBar
from ..taps import remove_hooks, unwrap
from . import distributed, stop_signals
from .datasets import channels_of, input_size, iterate, make_loader, open_data, plain_loader_errors
from .objectives import OBJECTIVES, Objective, dynamic_shapes, lr_factor, to_device
from .optimizers import PRECISIONS, Losses
from .options import ResolvedConfig
from .resume import random_state, seed_everything, set_random_state
from .run_dir import RunDir
from .static_step import StaticStep, uncapturable_reason
from .student_teacher import StudentTeacher
from .warm_start import generator_spec, warm_start

Generators = dict[str, nn.Module]
MAX_CONSECUTIVE_SKIPS = 10


class Diverged(ArithmeticError):
    """The losses of MAX_CONSECUTIVE_SKIPS or more consecutive steps, or the final weights, are not finite."""


@dataclass(frozen=True)
class Stage:
    """One network (for cycle_gan a pair of networks) to train.

    Attributes:
        name, config, seed, folder: those of the stage.
        layout: folders of the training images, as for ``open_data``.
    """

    name: str
    config: ResolvedConfig
    seed: int
    folder: Path
    layout: FolderLayout | None = None


class Trained(NamedTuple):
    """The result of a stage.

    Attributes:
        generators: direction -> generator, frozen and in eval mode.
        steps: number of training steps.
        seconds_per_step: median duration of a step.
    """

    generators: Generators
    steps: int
    seconds_per_step: float


def fit(
    stage: Stage,
    run_dir: RunDir,
    teachers: Mapping[str, nn.Module],
    state: Mapping[str, Any] | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    show: Callable[[Generators], None] | None = None,
    keep_final_state: bool = False,
) -> Trained:
    """Train one stage, with a progress bar, metrics and checkpoints.

    Args:
        stage: what to train.
        run_dir: folder of the run.
        teachers: direction -> frozen generator; {} trains without a teacher.
        state: state that ``save_state`` received in an interrupted run, to resume from.
        save_state: called with the state of the stage every save_latest_freq steps.
        show: called with frozen copies of the generators every update_html_freq steps.
        keep_final_state: write the state of the stage at its end to its folder, if it can be resumed from.

    Raises:
        DataError: An image cannot be read, or a process that loads images was killed.
        CheckpointError: a file that the stage starts from (``warm_start``) cannot be used.
        Diverged: MAX_CONSECUTIVE_SKIPS consecutive steps had a non-finite loss, or the final weights are not finite. On
            a GPU this is checked when metrics are logged.
        Stopped: A signal asked a rank to stop; the state has been saved.
    """
    config = stage.config
    objective = make_objective(config, stage.seed, teachers, stage.layout)
    if not state:
        for line in warm_start(objective, config):
            distributed.print_rank0(f"{stage.name}: {line}")
    first = state["step"] + 1 if state else 1
    loader = make_loader(open_data(config, "train", stage.layout), config, stage.seed, start=first - 1)
    epoch_steps = config.epoch_steps or len(loader)
    steps = (config.n_epochs + config.n_epochs_decay) * epoch_steps

    def lr_of(epoch: int) -> float:
        return config.lr * lr_factor(epoch, config.n_epochs, config.n_epochs_decay)

    # initialisation draws a varying number of random numbers: seed again, so that all variants of a seed draw the same
    # numbers in training; each rank draws its own
    seed_everything(stage.seed + 1_000_003 * distributed.rank())
    durations = load_training_state(objective, state) if state else []
    if config.cuda_graph:
        if reason := uncapturable_reason(config):
            distributed.print_rank0(f"{stage.name}: cuda_graph has no effect: {reason}")
        else:
            objective.run_step = StaticStep(objective.take_step, config.torch_device, objective.references)
    objective.optimizers.set_lr(lr_of((first - 1) // epoch_steps + 1))

    timer, ahead = _StepTimer(first - 1), may_copy_ahead(config.torch_device)
    with (
        plain_loader_errors(),
        closing(iterate(loader)) as batches,
        _progress_bar(stage.name, first - 1, steps) as progress,
    ):
        for step, batch in zip(range(first, steps + 1), batches):
            epoch = (step - 1) // epoch_steps + 1
            losses = objective.step(
                {
                    side: images.to(config.torch_device, non_blocking=ahead, memory_format=config.memory_format)
                    for side, images in batch.items()
                }
            )
            logs = step % config.print_freq == 0 or step == 1
            if logs or config.torch_device.type == "cpu":  # waits for a GPU
                _check_divergence(stage, run_dir, objective, step)
            if logs:
                values = _mean_over_ranks(losses)
                durations.append(timer.lap(step))
                if skipped := objective.optimizers.skipped:
                    values["skipped"] = skipped
                run_dir.log(stage.name, step, epoch=epoch, **values)
                images = len(batch["A"]) * distributed.world_size()  # may be fewer than batch_size
                shown = {"img/s": images / durations[-1]} | values
                progress.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            progress.update()
            with timer.paused():
                if step % epoch_steps == 0:
                    objective.optimizers.set_lr(lr_of(epoch + 1))
                    if epoch % config.save_epoch_freq == 0 and step < steps and not objective.nonfinite_weights():
                        run_dir.save_checkpoint(stage.folder, str(epoch), objective.ema_or_live())
                        _save_latest(stage, run_dir, objective)
                if show and step % config.update_html_freq == 0 and step < steps and distributed.rank() == 0:
                    live = copy.deepcopy(objective.ema_or_live())
                    show({name: freeze_for_inference(network, config) for name, network in live.items()})
                stop = distributed.max_over_ranks(stop_signals.received())
                if save_state and (stop or step % config.save_latest_freq == 0) and objective.can_resume():
                    save_state(training_state(objective, step, epoch_steps, durations))
                if stop:
                    raise stop_signals.Stopped(stop)
    if source := objective.nonfinite_weights():  # after the last step: the losses before it were finite
        raise Diverged(f"{stage.name}: after step {steps}, {source} are not finite; {_advice(stage, run_dir, source)}")
    _save_latest(stage, run_dir, objective)
    folder = stage.folder.relative_to(run_dir.folder)
    entries = [{"file": (folder / f"latest_net_{name}.pth").as_posix()} for name in objective.generators]
    run_dir.report["files"] += [entry for entry in entries if entry not in run_dir.report["files"]]
    if keep_final_state:
        final = training_state(objective, steps, epoch_steps, durations) if objective.can_resume() else None
        run_dir.save_final_state(stage.folder, final)
    objective.close()
    generators = objective.ema_or_live()
    for network in generators.values():
        distributed.broadcast_buffers(network)  # a student learns on all ranks from the teacher that was saved
    generators = {name: freeze_for_inference(network, config) for name, network in generators.items()}
    return Trained(generators, steps, statistics.median(durations[1:] or durations))


def make_objective(
    config: ResolvedConfig, seed: int, teachers: Mapping[str, nn.Module], layout: FolderLayout | None = None
) -> Objective:
    """Return the task's networks, optimizers and losses, on the device and in training mode.

    Args:
        config: options of the stage.
        seed: determines the initial weights.
        teachers: direction -> frozen generator; {} trains without a teacher.
        layout: folders of the training images, as for ``open_data``.
    """
    kind = OBJECTIVES[config.model]
    seed_everything(seed)
    generators, student_teachers = {}, {}
    for direction in kind.directions:
        spec = generator_spec(config, direction)
        network = define_generator(**asdict(spec), init_type=config.init_type, init_gain=config.init_gain)
        generators[direction] = distributed.wrap(
            to_device(network, config), config.compile, dynamic=dynamic_shapes(config)
        )
    for direction, teacher in (teachers if config.learns_from_teacher else {}).items():
        generator = generators[direction]
        dtype = PRECISIONS[config.precision]
        if dtype != torch.float32:
            teacher = copy.deepcopy(teacher)
        student_teachers[direction] = StudentTeacher(
            generator,
            teacher,
            config.layers or {default_tap(unwrap(generator)): default_tap(teacher)},
            make_relation_loss(config),
            lambda_kd=config.lambda_kd,
            lambda_srp=config.lambda_srp,
            lambda_feature=config.lambda_feature,
            input_shape=(channels_of(config, direction)[0], *input_size(config, direction, layout)),
        )
        if dtype != torch.float32:
            cast_convolutions(teacher, dtype)
    # adapters drew random numbers: seed again, so that discriminators start from the same weights in every variant
    seed_everything(seed + 1)
    return kind(config, generators, student_teachers)


def cast_convolutions(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions: autocast would cast those of a frozen network to the same bits in each step."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(dtype)


def make_relation_loss(config: ResolvedConfig) -> SRPLoss:
    """Return the relation loss that the options select."""
    return SRPLoss(
        config.normalize,
        config.distance,
        config.delta,
        backend=config.backend,
        scope=config.scope,
        rectify=config.rectify,
        detach_norms=config.detach_norms,
    )


def freeze_for_inference(network: nn.Module, config: ResolvedConfig) -> nn.Module:
    """Return a generator for inference, changed in place: on the device, without gradients, hooks and dropout.

    Its batch norms use running statistics or, with train_mode_norm, those of each image.
    """
    remove_hooks(network)
    if config.train_mode_norm:
        network = normalize_per_image(network)
    return to_device(network, config).eval().requires_grad_(False)


def training_state(objective: Objective, step: int, epoch_steps: int, durations: list[float]) -> dict[str, Any]:
    """Return everything that the next training step depends on, of all ranks, and the number of complete epochs."""
    own = {"random": random_state(), **objective.rank_state_dict()}
    return {
        "step": step,
        "epochs": step // epoch_steps,
        "durations": durations,
        "objective": objective.state_dict(),
        "processes": distributed.all_gather_object(own),
    }


def load_training_state(objective: Objective, state: Mapping[str, Any]) -> list[float]:
    """Load what ``training_state`` returned, and return its durations."""
    objective.load_state_dict(state["objective"])
    own = state["processes"][distributed.rank()]
    objective.load_rank_state_dict(own)
    set_random_state(own["random"])
    return list(state["durations"])


class _StepTimer:
    """Seconds per training step, without pauses.

    Args:
        step: number of the last step before the timer starts.
    """

    def __init__(self, step: int) -> None:
        self.step, self.start = step, time.perf_counter()

    def lap(self, step: int) -> float:
        """Return the mean duration of the steps since the last lap."""
        now = time.perf_counter()
        seconds = (now - self.start) / (step - self.step)
        self.step, self.start = step, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose duration does not count."""
        paused = time.perf_counter()
        yield
        self.start += time.perf_counter() - paused


def _progress_bar(name: str, done: int, steps: int) -> ProgressBar:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds: keeps log files short
    return ProgressBar(
        total=steps, initial=done, desc=name, unit="step", mininterval=interval, disable=distributed.rank() > 0
    )


def _save_latest(stage: Stage, run_dir: RunDir, objective: Objective) -> None:
    run_dir.save_checkpoint(stage.folder, "latest", objective.ema_or_live() | objective.discriminators)
    run_dir.save_adapters(stage.folder, objective.adapter_weights())


def _mean_over_ranks(losses: Losses) -> dict[str, float]:
    """Return the losses of the whole batch, as numbers."""
    values = torch.stack(list(losses.values())).tolist()  # one copy from the device
    gathered = distributed.all_gather_object(dict(zip(losses, values, strict=True)))
    return {name: statistics.fmean(values[name] for values in gathered) for name in losses}


def _check_divergence(stage: Stage, run_dir: RunDir, objective: Objective, step: int) -> None:
    """Find out why a step was skipped, and raise an error after MAX_CONSECUTIVE_SKIPS of them."""
    objective.find_nonfinite()
    if (skips := objective.optimizers.consecutive_skips) < MAX_CONSECUTIVE_SKIPS:
        return
    source = objective.nonfinite_source
    reason = f"; not finite before it: {source}" if source else ""
    raise Diverged(
        f"{stage.name}: {skips} consecutive steps were skipped: the loss "
        f"{objective.optimizers.nonfinite_loss} was not finite, first at step {step - skips + 1}"
        f"{reason}. {_advice(stage, run_dir, source)}"
    )


def _advice(stage: Stage, run_dir: RunDir, source: str) -> str:
    """Return what to do about a loss that is not finite because of `source`, in words, or ""."""
    half = " or with --precision bf16" if stage.config.precision == "fp16" else ""
    if source.startswith("the images"):
        return "Start a new run with images that are finite"
    if source.startswith("the teacher"):
        return f"Start a new run with another teacher{half}"
    return (
        f"{run_dir.folder} contains the last finite state: start a new run with a lower --lr or with "
        f"--clip_grad_norm 1{half}, or resume with --resume {run_dir.folder}"
    )
