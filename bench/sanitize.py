"""Small relation losses on the GPU backends, to be run under compute-sanitizer: ``python -m bench.sanitize [NAME ...]``.

Shapes are those at which tiles go wrong: a single pixel, one more than a tile, channels that fill no fragment, several
images, strides. The results are put through the gate too. Under compute-sanitizer set PYTORCH_NO_CUDA_MEMORY_CACHING=1,
or an access beyond an array falls into the allocator's pool and is not seen.
"""

from __future__ import annotations

import sys

import torch

from . import gate
from .cases import Case, features, settings
from .providers import PROVIDERS

SHAPES = [(1, (1, 1), 1), (65, (16, 64), 2), (129, (20, 33), 1), (200, (64, 256), 1)]  # N, (C_s, C_t), B
KINDS = [("row", "l1"), ("cosine", "huber"), ("none", "l1")]
NUMBERS = [("float32", "highest"), ("float32", "high"), ("bfloat16", "highest"), ("float16", "highest")]


def main(names: list[str]) -> None:
    """Run every case on every backend; exit with status 1 if a result is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("torch sees no CUDA device: the same cases on the CPU, as a rehearsal")
    wrong = ran = 0
    for name in names or ("native", "triton"):
        if name not in PROVIDERS:
            print(f"{name}: there is no such backend")
            continue
        for pixels, channels, batch in SHAPES:
            for normalize, distance in KINDS:
                for dtype, precision in NUMBERS:
                    case = Case(pixels, channels, batch, dtype, precision, normalize, distance, device=device)
                    if (reason := PROVIDERS[name].why_not(case)) is not None:
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
    expected = gate.truth(student, teacher, case)
    if case.pixels == 1:  # its relation is 1 or -1 whatever it is: loss and gradient are 0 but for rounding
        expected = None
    loss = PROVIDERS[name].make(case)
    if expected is None:
        value = loss(student, teacher)
        return None if value.isfinite() else f"the loss of one pixel is {value.item()}"
    return gate.why_wrong(gate.judge(loss, case, student, teacher, expected), case)


if __name__ == "__main__":
    main(sys.argv[1:])
