"""The relation benchmark as tests of pytest-benchmark: ``pytest bench --benchmark-only``.

Providers must pass the gate and are skipped for the same reasons as in ``python -m bench relation``. Without arguments,
``pytest`` does not collect this folder.
"""

from __future__ import annotations

import pytest
import torch

from srpkd.checking import gate
from srpkd.checking.cases import Case, features
from srpkd.checking.kernels import CannotRun, evaluate
from srpkd.devices import synchronize

from . import cases, machine
from .providers import PROVIDERS, bytes_needed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = cases.sweep("quick", DEVICE, {"mode": cases.MODES, "threads": (torch.get_num_threads(),)})


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.pixels}-{case.mode}")
def test_relation(benchmark, case: Case, name: str) -> None:
    benchmark.group = case.describe()
    provider = PROVIDERS[name]
    if (reason := provider.unavailable_reason(case)) is not None:
        pytest.skip(reason)
    if (needed := bytes_needed(name, case)) > machine.free_bytes(case.device):
        pytest.skip(f"needs at least {needed / 1e9:.1f} GB")
    torch._dynamo.reset()  # the number of graphs per function is limited
    student, teacher = features(case)
    loss = provider.make(case)
    try:
        expected = gate.float64_result(student, teacher, case)
        found = gate.measure_errors(name, loss, case, student, teacher, expected)
    except CannotRun as error:
        pytest.skip(str(error))
    assert gate.failure_reason(found, case) is None

    def call() -> None:
        evaluate(loss, student, teacher, case)
        synchronize(case.device)

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
