"""Small relation losses on the GPU backends, for compute-sanitizer: ``python -m bench.sanitize [BACKEND ...]``.

The shapes cover typical errors of tiled kernels: a single pixel, one pixel more than a tile, channels that do not fill
a fragment, several images. The results must also pass the gate. Under compute-sanitizer, set
PYTORCH_NO_CUDA_MEMORY_CACHING=1: otherwise an access beyond an array stays inside the allocator's pool and is missed.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch

from srpkd.checking.cases import Case, features, settings
from srpkd.checking.kernels import CannotRun, evaluate
from srpkd.checking.processes import Check, compare
from srpkd.kernels.formulas import Distance, Normalize

from .providers import PROVIDERS

SHAPES = [(1, (1, 1), 1), (65, (16, 64), 2), (129, (20, 33), 1), (200, (64, 256), 1)]  # N, (C_s, C_t), B
FORMATS = [("float32", "highest"), ("float32", "high"), ("bfloat16", "highest"), ("float16", "highest")]
RELATIONS: list[tuple[Normalize, Distance]] = [("row", "l1"), ("cosine", "huber"), ("none", "l1")]


def main(names: list[str]) -> None:
    """Run every case on every backend and exit with status 1 if a result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("torch sees no CUDA device: dry run of the same cases on the CPU")
    cases = [
        Case(pixels, channels, batch, dtype, precision, *relation, device=device)
        for ((pixels, channels, batch), (dtype, precision)), relation in zip(
            itertools.product(SHAPES, FORMATS), itertools.cycle(RELATIONS)
        )
    ]
    ran = wrong = 0
    for name in names or ("native", "triton"):
        if name not in PROVIDERS:
            print(f"{name}: unknown backend")
            continue
        for case in cases:
            if name == "closed_form":
                case = replace(case, distance="l2")  # it has no other
            try:
                with settings(case):
                    problem = check(name, case)
            except CannotRun as error:
                print(f"{name}: {case.describe()}: skipped: {error}")
                continue
            ran += 1
            wrong += problem is not None
            if problem:
                print(f"{name}: {case.describe()}: {problem}")
    print(f"{ran} cases ran, {wrong} were wrong")
    sys.exit(wrong > 0)


def check(name: str, case: Case) -> str | None:
    """Return an error message for a wrong result, or None. Raises CannotRun if the backend cannot run."""
    if (reason := PROVIDERS[name].unavailable_reason(case)) is not None:
        raise CannotRun(reason)
    student, teacher = features(case)
    value, gradient = evaluate(PROVIDERS[name].make(case), student, teacher, case)
    assert gradient is not None
    # on the CPU, because float64 products on the GPU are slow under the sanitizer
    return compare((value.cpu(), gradient.cpu()), Check(case), student.cpu(), teacher.cpu())[2]


if __name__ == "__main__":
    main(sys.argv[1:])
