"""The wgmma kernels of backend ``native`` on a Hopper GPU, against float64 and with equal bits twice.

They are compared in a process of their own: a fault on the device would fail all later tests of this one.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from helpers import DELTA, error, value_and_gradient

from srpkd import relation_loss
from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, unavailable_reason

pytestmark = pytest.mark.gpu
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
# the errors of loss and gradient relative to float64: of bfloat16 and float16 gradients; of signs of l1 close to ties,
# which products with 22 bits do not resolve, or with the 11 bits of "high" ("tf32")
TOLERANCE = {"bfloat16": (1e-4, 5e-3), "float16": (1e-4, 2e-3), "float32": (1e-4, 2e-3), "tf32": (1e-3, 2e-2)}


class Case(NamedTuple):
    dtype: str
    normalize: str
    distance: str
    batch: int = 2
    pixels: int = 304
    channels: tuple[int, int] = (64, 256)
    layout: str = "nchw"
    zeros: bool = False  # zero-norm pixels


def cases() -> list[Case]:
    every = [Case(*names) for names in itertools.product(DTYPES, NORMALIZATIONS, DISTANCES)]
    shapes = [
        {"pixels": 1000, "channels": (16, 64)},
        {"pixels": 1001, "channels": (16, 64)},  # TMA cannot read it in place
        {"pixels": 129, "batch": 1},
        {"channels": (130, 520)},  # does not fit into shared memory
        {"layout": "nlc"},
        {"layout": "nlc", "channels": (100, 72)},
        {"zeros": True},
        {"pixels": 4096, "batch": 8},
    ]
    return every + [
        Case(dtype, normalize, "l1", **shape)
        for shape in shapes
        for dtype, normalize in (("bfloat16", "row"), ("float16", "cosine"), ("float32", "row"), ("tf32", "row"))
    ]


def failures() -> list[str]:
    """Return a line for each case whose results are wrong or differ the second time."""
    lines = []
    for seed, case in enumerate(cases()):
        torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (case.batch, case.pixels)
        pair = (torch.randn(*shape, c, device="cuda", generator=generator) + 0.5 for c in case.channels)
        student, teacher = (x.to(DTYPES[case.dtype]) for x in pair)
        if case.zeros:
            student[:, 5:9] = teacher[:, 7:11] = 0
        if case.layout == "nchw":
            student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
        relation = Relation(case.normalize, case.distance, DELTA[case.normalize])
        # of the loss, so that float16 gradients neither underflow nor overflow
        scale = float(case.pixels) ** (1 if case.normalize == "none" else 2)
        exact = value_and_gradient(student.double(), teacher.double(), relation, "reference", scale)
        first, second = (value_and_gradient(student, teacher, relation, "native", scale) for _ in range(2))
        errors = [error(x, y, least=1e-6) for x, y in zip(first, exact)]
        if any(found > limit for found, limit in zip(errors, TOLERANCE[case.dtype])):
            lines.append(f"{case}: errors {errors}")
        if not all(torch.equal(x, y) for x, y in zip(first, second)):
            lines.append(f"{case}: different bits the second time")
    return lines


@pytest.fixture(autouse=True)
def _available() -> None:
    if (reason := unavailable_reason("native", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")


def test_wgmma_tiles() -> None:
    command = [sys.executable, "-c", "import json, test_sm90_gpu; print(json.dumps(test_sm90_gpu.failures()))"]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        command, env=os.environ | {"SRPKD_CUDA_KERNEL": "sm90", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_first_launch_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver encodes tensor maps only for a thread with a context. normalize="none" needs no kernel before."""
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", "sm90")
    student, teacher = (torch.randn(1, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def loss() -> torch.Tensor:
        return relation_loss(student, teacher, normalize="none", distance="l1", layout="nlc", backend="native")

    expected = loss().item()  # leaves memory for the thread, whose allocations would make a context current
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(loss).result().item() == expected
