"""Seconds per training step of distillation, and what the relation loss costs of them.

    python -m bench train

A CycleGAN step with a teacher for both directions, on random images: without the relation loss (lambda_srp = 0), with
the reference backend, and with the one that "auto" takes; with the form of the loss that the trainer has by default;
then "auto" again with what the trainer offers to make a step faster. All take turns, step by step. The share is
1 - (seconds without) / (seconds with), and how many times faster a step is, (seconds of "auto") / (seconds of it):
medians over rounds. Then the training steps of the teacher itself.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srpkd.kernels import Relation, auto_backend
from srpkd.training.loop import make_objective
from srpkd.training.options import TrainConfig

from . import cases, machine, measure, results

RESULTS = results.FOLDER / "train.csv"
WAYS: dict[str, dict[str, Any]] = {  # what makes a step faster, perhaps
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "compile": {"compile": True},
}
KEY = ("variant", "model", "student", "teacher", "size", "batch", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("cycle_gan", "pix2pix"), default="cycle_gan")
    parser.add_argument("--netG", default="resnet_9blocks", help="of both networks (%(default)s)")
    parser.add_argument("--ngf", type=int, default=16, help="the student's channels (%(default)s)")
    parser.add_argument("--teacher-ngf", type=int, default=64, help="the teacher's channels (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side of an image (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a step (%(default)s)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for the rounds (%(default)s)")
    parser.add_argument("--ways", nargs="*", choices=WAYS, help="what to try of these (all; fp16 only on a GPU)")
    parser.add_argument("--no-teacher", action="store_true", help="do not time the teacher's own training")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help="%(default)s")


def run(options: argparse.Namespace) -> None:
    """Measure, write the rows and print them."""
    device = cases.device_of(options)
    student = TrainConfig(
        dataroot=":synthetic:",  # never opened: the images are random
        synthetic_size=options.size,
        model=options.model,
        netG=options.netG,
        ngf=options.ngf,
        norm="instance",
        no_dropout=True,
        normalize="row",  # and l1: what the kernels are for; l2 has no N x N work
        distance="l1",
        batch_size=options.batch,
        device=device,
    ).resolved()
    teacher = replace(student, ngf=options.teacher_ngf)
    ways = options.ways
    if ways is None:
        ways = [way for way in WAYS if way != "fp16" or student.torch_device.type == "cuda"]
    rows = distillation_rows(student, teacher, options.budget, ways)
    if not options.no_teacher:
        rows.append(teacher_row(teacher, options.budget))
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
        share, faster = row.get("srp_percent_of_step"), row.get("times_faster_than_auto")
        print(
            f"{row['variant']:<22} {row['median_s']:8.4f} s/step ({row['p20_s']:.4f} to {row['p80_s']:.4f}, "
            f"{row['rounds']} rounds), {row['steps_per_s']:.3f} steps/s"
            + ("" if share is None else f", of it the relation loss {share:.1f} %")
            + ("" if faster is None else f", {faster:.2f} times as fast")
        )
    print(options.out)


def distillation_rows(
    student: TrainConfig, teacher: TrainConfig, budget: float, ways: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row for every way to compute the relation loss, the first without it; then for the ways to be faster."""
    auto = f"auto: {auto_backend(torch.device(student.device), Relation(student.normalize, student.distance))}"
    default = {"normalize": TrainConfig.normalize, "distance": TrainConfig.distance}
    auto_default = f"auto, the trainer's {' '.join(default.values())}"  # by which backend, hangs on the size of the map
    variants = {
        "without relation loss": replace(student, lambda_srp=0.0),
        "reference": replace(student, backend="reference"),
        auto: replace(student, backend="auto"),
        auto_default: replace(student, backend="auto", **default),
    }
    variants |= {f"{auto}, {way}": replace(student, backend="auto", **WAYS[way]) for way in ways}
    teachers = make_objective(teacher, 1, {}).generators
    for network in teachers.values():
        network.eval().requires_grad_(False)
    samples = timed_steps({name: step_of(config, teachers) for name, config in variants.items()}, student, budget)
    without = samples["without relation loss"]
    rows = []
    for name, seconds in samples.items():
        share = faster = None
        if name in ("reference", auto, auto_default):
            share = statistics.median(100 * (1 - base / own) for base, own in zip(without, seconds))
        elif seconds is not without:
            faster = measure.ratio(seconds, samples[auto])
        rows.append(as_row(name, seconds) | {"srp_percent_of_step": share, "times_faster_than_auto": faster})
    return rows


def teacher_row(teacher: TrainConfig, budget: float) -> dict[str, Any]:
    """A row of the teacher's own training."""
    name = "teacher's own training"
    return as_row(name, timed_steps({name: step_of(teacher, {})}, teacher, budget)[name])


def step_of(config: TrainConfig, teachers: dict[str, torch.nn.Module]) -> Callable[[], object]:
    """A training step on images that stay the same, their shape being all that matters to time."""
    objective = make_objective(config, 0, teachers)
    generator = torch.Generator().manual_seed(0)
    shape = config.batch_size, 3, config.synthetic_size, config.synthetic_size
    images = {
        side: torch.rand(shape, generator=generator).mul(2).sub(1).to(config.device, memory_format=config.memory_format)
        for side in "AB"
    }
    return partial(objective.step, images)


def timed_steps(steps: dict[str, Callable[[], object]], config: TrainConfig, budget: float) -> dict[str, list[float]]:
    """Seconds of every step, warmed up, round by round."""
    for step in steps.values():
        step()
    estimates = {name: measure.seconds_of(step, config.device) for name, step in steps.items()}
    return measure.interleaved(steps, estimates, config.device, budget)


def as_row(name: str, samples: list[float]) -> dict[str, Any]:
    times = measure.quantiles(samples)
    return {"variant": name, "rounds": len(samples), **times, "steps_per_s": 1 / times["median_s"]}
