"""Small relation losses on the GPU backends, for compute-sanitizer: ``python -m bench.sanitize [NAME ...]``.

Shapes are those at which tiles go wrong: a single pixel, one more than a tile, channels that fill no fragment, several
images. The results are put through the gate too. Under compute-sanitizer set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or an
access beyond an array falls into the allocator's pool and is not seen.
"""

from __future__ import annotations

import itertools
import sys

import torch

from . import gate
from .cases import Case, features, settings
from .providers import PROVIDERS, evaluate

SHAPES = [(1, (1, 1), 1), (65, (16, 64), 2), (129, (20, 33), 1), (200, (64, 256), 1)]  # N, (C_s, C_t), B
NUMBERS = [("float32", "highest"), ("float32", "high"), ("bfloat16", "highest"), ("float16", "highest")]
KINDS = itertools.cycle([("row", "l1"), ("cosine", "huber"), ("none", "l1")])


def main(names: list[str]) -> None:
    """Run every case on every backend; exit with status 1 if a result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("torch sees no CUDA device: the same cases on the CPU, as a rehearsal")
    cases = [
        Case(pixels, channels, batch, dtype, precision, *next(KINDS), device=device)
        for (pixels, channels, batch), (dtype, precision) in itertools.product(SHAPES, NUMBERS)
    ]
    ran = wrong = 0
    for name in names or ("native", "triton"):
        if name not in PROVIDERS:
            print(f"{name}: there is no such backend")
            continue
        for case in cases:
            if (reason := PROVIDERS[name].unavailable_reason(case)) is not None:
                print(f"{name}: {case.describe()}: skipped: {reason}")
                continue
            with settings(case):
                problem = check(name, case)
            ran += 1
            wrong += problem is not None
            if problem:
                print(f"{name}: {case.describe()}: {problem}")
    print(f"{ran} cases ran, {wrong} were wrong")
    sys.exit(wrong > 0)


def check(name: str, case: Case) -> str | None:
    """What is wrong with a backend's result, None if nothing is."""
    student, teacher = features(case)
    loss = PROVIDERS[name].make(case)
    if case.pixels == 1:  # its relations are 1 whatever it is: there is nothing for an error to be relative to
        value, gradient = evaluate(loss, student, teacher, case)
        return None if value.isfinite() and gradient.isfinite().all() else "one pixel gives what is not finite"
    # on the CPU: under the sanitizer, float64 products on the GPU would take most of the time
    expected = gate.truth(student.cpu(), teacher.cpu(), case)
    expected = gate.Result(*(part.to(case.device) for part in expected))
    return gate.why_wrong(gate.judge(loss, case, student, teacher, expected), case)


if __name__ == "__main__":
    main(sys.argv[1:])
