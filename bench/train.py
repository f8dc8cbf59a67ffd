"""Time per distillation step, and the share of the relation loss.

    python -m bench train

One step of a CycleGAN with a teacher for both directions, on random images: without the relation loss (lambda_srp = 0),
with the backends "reference" and "auto" for row and l1, with "auto" for the trainer's default relation, and with "auto"
and each option that may make a step faster. All variants take turns, step by step. The share of the relation loss is
1 - (seconds without it) / (seconds with it), and the speed is (seconds of "auto") / (seconds of the variant): medians
over rounds. The last row is a training step of the teacher, without distillation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from srpkd.kernels import Relation, auto_backend
from srpkd.training.loop import make_objective
from srpkd.training.options import ResolvedConfig, TrainConfig

from . import cases, machine, measure, results

RESULTS = results.FOLDER / "train.csv"
SPEEDUPS: dict[str, dict[str, Any]] = {  # options of the trainer that may make a step faster
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "compile": {"compile": True},
}
KEY = ("variant", "model", "student", "teacher", "size", "batch", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("cycle_gan", "pix2pix"), default="cycle_gan")
    parser.add_argument("--netG", default="resnet_9blocks", help="generator architecture (default: %(default)s)")
    parser.add_argument("--ngf", type=int, default=16, help="channels of the student (default: %(default)s)")
    parser.add_argument("--teacher-ngf", type=int, default=64, help="channels of the teacher (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--speedups", nargs="*", choices=SPEEDUPS, help="options to try (default: all; fp16 on a GPU)")
    parser.add_argument("--no-teacher", action="store_true", help="do not time the training of the teacher")
    cases.add_device(parser)
    results.add_csv(parser, RESULTS, "--out")


def run(options: argparse.Namespace) -> None:
    """Measure the steps, and write and print the rows."""
    device = cases.device_of(options)
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
    speedups = options.speedups
    if speedups is None:
        speedups = [name for name in SPEEDUPS if name != "fp16" or device == "cuda"]
    rows = distillation_rows(student, teacher, options.budget, speedups)
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
            + ("" if share is None else f", relation loss {share:.1f} %")
            + ("" if faster is None else f", {faster:.2f} x auto's speed")
        )
    print(options.out)


def distillation_rows(
    student: ResolvedConfig, teacher: ResolvedConfig, budget: float, speedups: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return a row for the step without the relation loss, for each way to compute it, and for each speedup."""
    auto = f"auto: {auto_backend(student.torch_device, Relation(student.normalize, student.distance))}"
    normalize, distance = TrainConfig.normalize, TrainConfig.distance
    auto_default = f"auto, the trainer's {normalize} {distance}"  # the backend depends on the size of the map
    variants = {
        "without relation loss": replace(student, lambda_srp=0.0),
        "reference": replace(student, backend="reference"),
        auto: replace(student, backend="auto"),
        auto_default: replace(student, backend="auto", normalize=normalize, distance=distance),
    }
    variants |= {f"{auto}, {name}": replace(student, backend="auto", **SPEEDUPS[name]) for name in speedups}
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


def teacher_row(teacher: ResolvedConfig, budget: float) -> dict[str, Any]:
    """Return the row of the teacher's training."""
    name = "teacher's own training"
    return as_row(name, timed_steps({name: step_of(teacher, {})}, teacher, budget)[name])


def step_of(config: ResolvedConfig, teachers: dict[str, torch.nn.Module]) -> Callable[[], object]:
    """Return a training step on constant images, because only their shape affects the time."""
    objective = make_objective(config, 0, teachers)
    generator = torch.Generator().manual_seed(0)
    shape = config.batch_size, 3, config.synthetic_size, config.synthetic_size
    images = {
        side: (2 * torch.rand(shape, generator=generator) - 1).to(
            config.torch_device, memory_format=config.memory_format
        )
        for side in "AB"
    }
    return partial(objective.step, images)


def timed_steps(
    steps: dict[str, Callable[[], object]], config: ResolvedConfig, budget: float
) -> dict[str, list[float]]:
    """Return the seconds of each step, warmed up, by name and round."""
    for step in steps.values():
        step()
    device = str(config.torch_device)
    estimates = {name: measure.seconds_of(step, device) for name, step in steps.items()}
    return measure.interleaved(steps, estimates, device, budget)


def as_row(name: str, samples: list[float]) -> dict[str, Any]:
    """Return the columns of a variant."""
    times = measure.quantiles(samples)
    return {"variant": name, "rounds": len(samples), **times, "steps_per_s": 1 / times["median_s"]}
