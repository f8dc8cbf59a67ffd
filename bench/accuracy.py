"""Errors of all backends against float64 as the student converges to its teacher.

    python -m bench accuracy
    python -m bench plot

The student's features are the teacher's plus noise. As the noise decreases, the two relation matrices become similar,
and rounding flips more signs of l1. Errors are relative to float64 on the same rounded features: they show the loss of
precision in a backend, not that of its input. On a GPU, float32 runs with all precisions of
``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from srpkd.arguments import positive
from srpkd.checking import gate
from srpkd.checking.cases import Case, features, settings
from srpkd.kernels import BACKENDS, DISTANCES, NORMALIZATIONS

from . import cases, machine, results
from .providers import PROVIDERS

RESULTS = results.FOLDER / "accuracy.csv"
KEY = ("provider", "noise", "dtype", "precision", "normalize", "distance", "pixels", "channels", "batch", "device")
NOISES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pixels", type=positive, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--channels", type=positive, default=64, metavar="C", help="default: %(default)s, both networks"
    )
    parser.add_argument("--normalize", choices=NORMALIZATIONS, default="row", help="default: %(default)s")
    parser.add_argument("--distance", choices=DISTANCES, default="l1", help="default: %(default)s")
    cases.add_device(parser)
    results.add_csv(parser, RESULTS, KEY, "--out")


def run(options: argparse.Namespace) -> None:
    """Measure, and write the rows."""
    device = cases.device_of(options)
    base = Case(
        options.pixels,
        (options.channels, options.channels),
        normalize=options.normalize,
        distance=options.distance,
        device=device,
        threads=torch.get_num_threads(),
    )
    kinds = [(dtype, "highest") for dtype in ("float32", "bfloat16", "float16")]
    if device != "cpu":  # float32 precision only affects GPUs
        kinds[1:1] = [("float32", "high"), ("float32", "medium")]
    for dtype, precision in kinds:
        case = replace(base, dtype=dtype, precision=precision)
        with settings(case):
            rows = [row for noise in NOISES for row in errors_at(noise, case)]
        results.upsert(options.out, rows, KEY)
        print(f"{dtype}, {precision}: " + ", ".join(dict.fromkeys(row["provider"] for row in rows)), flush=True)
    print(options.out)


def errors_at(noise: float, case: Case) -> list[dict[str, Any]]:
    """Return a row with the relative errors of loss and gradient for eager PyTorch and each available backend."""
    teacher, other = features(case)
    student = (teacher.float() + noise * other.float()).to(teacher.dtype)
    expected = gate.float64_result(student, teacher, case)
    rows = []
    for name in ("eager", *BACKENDS):
        provider = PROVIDERS[name]
        if provider.unavailable_reason(case) is not None:
            continue
        found = gate.measure_errors(name, provider.make(case), case, student, teacher, expected)
        rows.append(
            {"provider": name, "noise": noise, "device": machine.device_name(case.device), **case.columns()}
            | {"loss": expected.loss.item(), "loss_error": found.loss, "gradient_error": found.gradient}
            | machine.versions()
        )
    return rows
