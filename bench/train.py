"""Time per training step, the share of the relation loss, and what makes a step faster.

    python -m bench train                one table of steps
    python -m bench train --short        only the trainer's default relation loss, as is and as fast as possible
    python -m bench train --peer         only the teacher's steps, and a plain one as the public trainer writes it
    python -m bench train --profile      operators, launches and host time of a step, with the largest contributors
    python -m bench train --loader       images per second of the data loader, against those of a step

A step of a CycleGAN with a teacher for both directions, on random images: without the relation loss (lambda_srp = 0),
with the backends "reference" and "auto" for row and l1, with "auto" for the trainer's default relation, and with "auto"
and each option that may make a step faster; then the default relation with `fast` and with CUDA graphs. The last rows
are steps of the teacher, without distillation, and a plain step in the order of the public trainer's.

All variants of a table take turns, step by step. The share of the relation loss is 1 - (seconds without it) / (seconds
with it) at the same options, and a speed is (seconds of the baseline) / (seconds of the variant): medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srpkd.arguments import positive
from srpkd.kernels import Relation, auto_backend
from srpkd.training.loop import freeze_for_inference, make_objective
from srpkd.training.options import ResolvedConfig, TrainConfig
from srpkd.training.speedups import fast_options
from srpkd.training.static_step import StaticStep

from . import cases, machine, measure, results, train_loader, train_profile
from .plain_step import plain_step, with_inplace_activations

RESULTS = results.FOLDER / "train.csv"
SPEEDUPS: dict[str, dict[str, Any]] = {  # options of the trainer that may make a step faster
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "compile": {"compile": True},
}
KEY = ("variant", "model", "student", "teacher", "size", "batch", "device", "threads")
PLAIN, TEACHER = "plain step of the teacher", "teacher's own training"
Steps = dict[str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("cycle_gan", "pix2pix"), default="cycle_gan", help="default: %(default)s")
    parser.add_argument("--netG", default="resnet_9blocks", help="generator architecture (default: %(default)s)")
    parser.add_argument("--ngf", type=int, default=16, help="channels of the student (default: %(default)s)")
    parser.add_argument("--teacher-ngf", type=positive, default=64, help="those of the teacher (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (default: %(default)s)")
    cases.add_budget(parser, 60.0, "time of the steps, and again of the teacher's")
    parser.add_argument(
        "--speedups", nargs="*", choices=SPEEDUPS, help="options to try (default: each alone; fp16 on a GPU)"
    )
    parser.add_argument("--short", action="store_true", help="fewer rows: a minute on a GPU, with --budget 6")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-teacher", action="store_true", help="do not time the training of the teacher")
    parts.add_argument("--peer", action="store_true", help="only the teacher's steps and the plain one")
    parts.add_argument("--profile", action="store_true", help="count operators, launches and host time instead")
    parts.add_argument("--loader", action="store_true", help="measure the data loader on image files instead")
    cases.add_device(parser)
    results.add_csv(parser, RESULTS, KEY, "--out")


def run(options: argparse.Namespace) -> None:
    """Measure the steps, and write and print the rows."""
    device = cases.device_of(options)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # as in training runs
    student = TrainConfig(
        dataroot=":synthetic:",  # not read: the images are random
        synthetic_size=options.size,
        model=options.model,
        netG=options.netG,
        ngf=options.ngf,
        norm="instance",
        no_dropout=True,
        normalize="row",  # with l1: l2 needs no N x N work
        distance="l1",
        batch_size=options.batch,
        device=device,
    ).resolved()
    teacher = replace(student, ngf=options.teacher_ngf)
    if options.profile:
        default = replace(student, normalize=TrainConfig.normalize, distance=TrainConfig.distance)
        steps = {PLAIN: plain_step_of(teacher), TEACHER: step_of(teacher, {})}
        teachers = frozen_teachers(teacher)
        steps |= {f"distillation step{name}": step_of(config, teachers) for name, config in forms(default).items()}
        print(train_profile.report(steps, student.torch_device))
        return
    if options.loader:
        print(train_loader.report(student, step_of(student, frozen_teachers(teacher)), options.budget))
        return
    speedups = options.speedups
    if speedups is None:
        unused = {"fp16": device != "cuda", "channels_last": student.is_one_image_on_cpu}
        speedups = [name for name in SPEEDUPS if not unused.get(name)]
    rows = [] if options.peer else distillation_rows(student, teacher, options.budget, speedups, options.short)
    if options.peer or not options.no_teacher:
        rows += teacher_rows(teacher, options.budget, options.short)
    common = {
        "model": student.model,
        "student": f"{student.netG} {student.ngf}",
        "teacher": f"{teacher.netG} {teacher.ngf}",
        "size": options.size,
        "batch": options.batch,
        "device": machine.device_name(device),
        "threads": torch.get_num_threads(),
    }
    rows = [common | row | machine.versions() for row in rows]
    results.upsert(options.out, rows, KEY)
    for row in rows:
        print(as_text(row))
    print(options.out)


def forms(config: ResolvedConfig, short: bool = False) -> dict[str, ResolvedConfig]:
    """Return the options of a stage in each form that its device can run: "", ", fast", ", cuda_graph" or both.

    ``short`` leaves out all but the first and the last, which is the fastest.
    """
    fast = fast_options(config.torch_device)
    found = {"": config} | ({", fast": replace(config, **fast)} if fast else {})
    if config.torch_device.type == "cuda":
        found |= {f"{name}, cuda_graph": replace(options, cuda_graph=True) for name, options in found.items()}
    return {form: found[form] for form in ("", list(found)[-1])} if short else found


def distillation_rows(
    student: ResolvedConfig, teacher: ResolvedConfig, budget: float, speedups: Sequence[str], short: bool
) -> list[dict[str, Any]]:
    """Return a row for the step without the relation loss, each way to compute it, each speedup, and each form.

    ``short`` leaves out the ways and speedups, and all forms but the fastest.
    """
    auto = f"auto: {auto_backend(student.torch_device, Relation(student.normalize, student.distance))}"
    normalize, distance = TrainConfig.normalize, TrainConfig.distance
    auto_default = f"auto, the trainer's {normalize} {distance}"  # the backend depends on the size of the map
    without, default = "without relation loss", replace(student, normalize=normalize, distance=distance)
    variants = {
        without: replace(student, lambda_srp=0.0),
        "reference": replace(student, backend="reference"),
        auto: student,
        auto_default: default,
    }
    if short:
        variants, speedups = {name: variants[name] for name in (without, auto_default)}, ()
    variants |= {f"{auto}, {name}": replace(student, **SPEEDUPS[name]) for name in speedups}
    shares = dict.fromkeys(("reference", auto, auto_default), without)  # variant -> the same without the relation loss
    baselines = {f"{auto}, {name}": auto for name in speedups}
    for form, config in forms(default, short).items():
        if form:
            variants |= {without + form: replace(config, lambda_srp=0.0), auto_default + form: config}
            shares[auto_default + form] = without + form
            baselines[auto_default + form] = auto_default
    teachers = frozen_teachers(teacher)
    samples = timed_steps({name: step_of(config, teachers) for name, config in variants.items()}, student, budget)
    rows = []
    for name, seconds in samples.items():
        row = as_row(name, seconds)
        if name in shares:
            ratios = (base / own for base, own in zip(samples[shares[name]], seconds))
            row["srp_percent_of_step"] = 100 * (1 - statistics.median(ratios))
        if name in baselines:
            row["times_faster_than_auto"] = measure.ratio(seconds, samples[baselines[name]])
        rows.append(row)
    return rows


def teacher_rows(teacher: ResolvedConfig, budget: float, short: bool) -> list[dict[str, Any]]:
    """Return the rows of a plain step, and of the teacher's training in each form."""
    steps: Steps = {PLAIN: plain_step_of(teacher)}
    steps |= {TEACHER + form: step_of(config, {}) for form, config in forms(teacher, short).items()}
    samples = timed_steps(steps, teacher, budget)
    plain = samples[PLAIN]
    return [
        as_row(name, own) | ({} if name == PLAIN else {"times_faster_than_plain": measure.ratio(own, plain)})
        for name, own in samples.items()
    ]


def frozen_teachers(teacher: ResolvedConfig) -> dict[str, nn.Module]:
    """Return direction -> generator with random weights, as a distillation step uses it."""
    generators = make_objective(teacher, 1, {}).generators
    return {direction: freeze_for_inference(network, teacher) for direction, network in generators.items()}


def step_of(config: ResolvedConfig, teachers: dict[str, nn.Module]) -> Callable[[], object]:
    """Return a training step on constant images, because only their shape affects the time."""
    objective = make_objective(config, 0, teachers)
    if config.cuda_graph:
        objective.run_step = StaticStep(objective.take_step, config.torch_device)
    return partial(objective.step, images_of(config))


def plain_step_of(config: ResolvedConfig) -> Callable[[], object]:
    """Return a plain training step on the same images and networks, without a teacher."""
    objective = make_objective(config, 0, {})
    for network in objective.networks.values():
        with_inplace_activations(network)
    return partial(plain_step(config, objective.generators, objective.discriminators), images_of(config))


def images_of(config: ResolvedConfig) -> dict[str, Tensor]:
    """Return a batch of random images."""
    generator = torch.Generator().manual_seed(0)
    shape = config.batch_size, 3, config.synthetic_size, config.synthetic_size
    images = {side: 2 * torch.rand(shape, generator=generator) - 1 for side in "AB"}
    return {side: one.to(config.torch_device, memory_format=config.memory_format) for side, one in images.items()}


def timed_steps(steps: Steps, config: ResolvedConfig, budget: float) -> dict[str, list[float]]:
    """Return the seconds of each step, warmed up, by name and round."""
    for step in steps.values():
        for _ in range(5 if config.torch_device.type == "cuda" else 1):  # beyond the capture of a CUDA graph
            step()
    device = str(config.torch_device)
    estimates = {name: measure.seconds_of(step, device) for name, step in steps.items()}
    return measure.interleaved(steps, estimates, device, budget)


def as_row(name: str, samples: list[float]) -> dict[str, Any]:
    """Return the columns of a variant."""
    times = measure.quantiles(samples)
    return {"variant": name, "rounds": len(samples), **times, "steps_per_s": 1 / times["median_s"]}


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    ends = {
        "srp_percent_of_step": "relation loss {:.1f} %",
        "times_faster_than_auto": "{:.2f} x auto's speed",
        "times_faster_than_plain": "{:.2f} x the plain step's speed",
    }
    found = [text.format(row[name]) for name, text in ends.items() if name in row]
    times = (
        f"{row['median_s']:8.4f} s/step ({row['p20_s']:.4f} to {row['p80_s']:.4f}, {row['rounds']} rounds), "
        f"{row['steps_per_s']:.3f} steps/s"
    )
    return ", ".join([f"{row['variant']:<44} {times}", *found])
