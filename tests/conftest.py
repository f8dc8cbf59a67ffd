"""What every test gets: a seed, uninitialised memory that shows, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from srpkd.kernels import unavailable_reason

pytest.register_assert_rewrite("helpers")

# read by cuBLAS when it first starts: without it a deterministic product on a GPU warns
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # what compiles kernels takes many processes well: bench/gpu_check.sh starts some, each with its part of the tests
    number, _, parts = os.environ.get("SRPKD_TEST_PART", "0/1").partition("/")
    items[:] = items[int(number) :: int(parts)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    # here and not by markers at collection: all such skips then fold into one line of the summary
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its like give NaN: an output that a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SRPKD_BACKEND", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests on small arrays: on a busy machine threads wait for each other many times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device; a test with a ``backend`` is skipped where that backend cannot run."""
    device = torch.device(request.param)
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if (reason := unavailable_reason(backend, device)) is not None:
            pytest.skip(f"{backend} on {device.type}: {reason}")
    return device
