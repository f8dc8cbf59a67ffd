"""Helpers for the tests of the benchmarks: a command line, wrong providers and invented results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import cases, machine, relation
from bench.__main__ import main
from bench.providers import PROVIDERS
from srpkd.checking import gate
from srpkd.checking.cases import Case
from srpkd.kernels import measured


def run(*arguments: object) -> None:
    """Run ``python -m bench`` in this process."""
    main([str(argument) for argument in arguments])


def parse(module: ModuleType, *words: object) -> argparse.Namespace:
    """Return the options of a command of ``bench``."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def outside_of_xdist() -> dict[str, str]:
    """Return the environment of a process that is no worker of pytest-xdist, as this one may be."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}


def incorrect_loss(kind: str) -> Callable[[Case], Callable[[Tensor, Tensor], Tensor]]:
    """Return a provider's ``make``: the eager loss with an error of this kind."""

    class Incorrect(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student: Tensor) -> Tensor:
            return student.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            right, gradient = gradient, gradient.clone()
            if kind == "missing pixel":
                gradient[0, -1] = 0
            elif kind == "omitted pixel":
                gradient = torch.empty_like(right)
                if not gradient.isnan().all():
                    gradient.copy_(right)  # as an earlier result can leave it
                gradient[:, :-1] = right[:, :-1]
            elif kind == "nan":
                gradient[0, 0, 0] = torch.nan
            elif kind == "scaled":
                gradient *= 1.1
            return gradient

    def make(case: Case):
        eager = PROVIDERS["eager"].make(case)
        return lambda student, teacher: eager(Incorrect.apply(student), teacher) * (1.01 if kind == "loss" else 1)

    return make


def relation_rows(device_type: str = "cpu", **fixed: Any) -> list[dict[str, Any]]:
    """Return rows of the relation benchmark with times that grow as N^2."""
    rows = []
    for pixels in (1024, 2048, 4096):
        case = Case(pixels=pixels, threads=2, **fixed)
        trials = {
            name: relation.Trial("ok", samples=[seconds * pixels**2] * 3, found=gate.Errors(1e-7, 1e-6, 1e-6))
            for name, seconds in (("eager", 4e-8), ("compile", 2e-8), ("native", 5e-9))
        }
        trials["chunked"] = relation.Trial("out of memory", "needs more")
        trials["keops"] = relation.Trial("skipped", "not installed")
        trials["eager"].peak, trials["native"].peak = 6 * cases.matrix_bytes(case), 1000 * pixels
        for name in trials:
            row = relation.as_row(name, case, trials, machine.PeakRates(1e12, 1e11))
            row |= {"device": f"some {device_type}", "device_type": device_type}
            if device_type == "cuda":
                row |= {"capability": "9.0", "kernel_version": measured.kernel_version(name, case.dtype)}
            rows.append(row)
    return rows


def as_read(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return rows as ``bench.results`` reads them from a file."""
    return [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def train_rows() -> list[dict[str, object]]:
    """Return rows of the training benchmark for two devices."""
    common = {
        "model": "cycle_gan", "student": "resnet_9blocks 16", "teacher": "resnet_9blocks 64", "size": 256, "batch": 1,
        "threads": 2, "torch": "2.14", "commit": "abc",
    }  # fmt: skip
    variants = {"without relation loss": (2.0, None), "auto: native": (2.5, 20.0)}
    return [
        common
        | {"device": device, "variant": variant, "median_s": s, "steps_per_s": 1 / s, "srp_percent_of_step": share}
        for device in ("some cpu", "some cuda")
        for variant, (s, share) in variants.items()
    ]
