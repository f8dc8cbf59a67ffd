"""Rules for every test: fixed seeds, uninitialised memory filled with NaN, GPU tests only where there is a GPU, --core.

Up to Python 3.11, coverage counts the lines that the tests not marked slow execute, see ``uncounted``.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tapped import network
from torch import Tensor, nn

from srpkd.kernels import dispatch, formulas, native, op, unavailable_reason

pytest.register_assert_rewrite("helpers")

# cuBLAS reads it when it starts: without it, deterministic products on a GPU warn
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# FORCE_COLOR would colour tracebacks, and from Python 3.14 on the messages of argparse, which tests compare
os.environ["PYTHON_COLORS"] = "0"

# pytest-xdist sets it in its workers. They share the machine's cores; OMP_NUM_THREADS passes the limit to subprocesses.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# a shell's background jobs ignore SIGINT, and so would all processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# answers about devices, some of which tests only pretend to have
OF_DEVICES = (
    dispatch.cached_auto_backend,
    dispatch.check_supported,
    formulas._multiplies_float64,
    native._can_run,
    op._gpu_kernels,
)
DESELECTED = pytest.StashKey[dict[str, int]]()  # numbers of tests, by what is said about them


# --- selection --------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core", action="store_true", help="of tests with the marker core(n), run n cases, as `make test` does"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here, since to skip thousands takes long, and then the cases beyond --core."""
    gpu = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    deselect(config, items, "GPU tests deselected: torch sees no CUDA device", gpu)
    for reason, cases in without_backend(items).items():
        deselect(config, items, f"cases deselected: {reason}", cases)
    if config.getoption("core"):
        deselect(config, items, "cases left out by --core: make test-all runs them", beyond_core(items))


def deselect(config: pytest.Config, items: list[pytest.Item], what: str, left_out: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=left_out)
    chosen = set(items) - set(left_out)
    items[:] = [item for item in items if item in chosen]
    config.stash.setdefault(DESELECTED, {})[what] = len(left_out)


def without_backend(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Return the tests whose parameter ``backend`` cannot run on their device, by the reason.

    The device is that of the fixture ``device``, or a GPU for a test with the mark ``gpu``.
    """
    reason_of = functools.cache(unavailable_reason)
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        backend, device = parameters.get("backend"), parameters.get("device")
        device = device or ("cuda" if item.get_closest_marker("gpu") else None)
        if backend and device and (reason := reason_of(backend, torch.device(device))) is not None:
            found.setdefault(f"{backend} on {device}: {reason}", []).append(item)
    return found


def beyond_core(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the cases that --core leaves out: all but n of each test with the marker core(n).

    The n cases are drawn at random, so that they differ in every parameter, and are the same in each run.
    """
    tests: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("core"):
            (count,) = marker.args
            tests.setdefault((item.nodeid.partition("[")[0], count), []).append(item)
    return [
        item
        for (name, count), cases in tests.items()
        for item in random.Random(name).sample(cases, max(0, len(cases) - count))
    ]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    deselected = session.config.stash.get(DESELECTED, {})
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, which reports to its controller
        session.config.workeroutput["deselected"] = deselected
    if any(deselected.values()) and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all that were selected need a GPU: no error, as if they were skipped


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the numbers of a worker of pytest-xdist: all workers collect the same tests."""
    if output := getattr(node, "workeroutput", None):  # None after a crash
        node.config.stash[DESELECTED] = output["deselected"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for what, count in config.stash.get(DESELECTED, {}).items():
        if count:
            terminalreporter.write_line(f"{count} {what}")


# --- coverage ---------------------------------------------------------------------------------------------------------


@contextmanager
def uncounted() -> Iterator[None]:
    """Suspend the trace function of coverage, with which all code takes twice as long up to Python 3.11."""
    counter = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(counter)
        (lambda: None)()  # only from the next call on, it counts in functions that have already started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("slow") is None:
        return (yield)
    with uncounted():
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _libraries_uncounted() -> Iterator[None]:
    """Exports and the options of the trainer spend most of their time in the Python code of torch and jsonargparse."""
    if sys.gettrace() is None:
        yield
        return
    from jsonargparse import ArgumentParser  # here, because it needs the extra `train`

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch.onnx, "export"), (torch.export, "export"), (ArgumentParser, "add_class_arguments")):
            patch.setattr(owner, name, uncounted()(getattr(owner, name)))
        yield


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill the memory of ``torch.empty`` and similar functions with NaN, which shows values that a kernel omits."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _no_backend_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` choose by what this test finds, not by the environment or by what an earlier test pretended."""
    monkeypatch.delenv("SRPKD_BACKEND", raising=False)
    for answers in OF_DEVICES:
        answers.cache_clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test with one thread: for small arrays, threads on a busy machine wait far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what torch.compile has compiled, before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def set_precision() -> Iterator[Callable[[str], None]]:
    """Set the precision of float32 products, until the end of the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def student() -> nn.Sequential:
    """A network with layers to tap."""
    return network(4)


@pytest.fixture
def teacher() -> nn.Sequential:
    """A wider network with the same layers."""
    return network(6)


@pytest.fixture
def image() -> Tensor:
    """Two images for ``student`` and ``teacher``."""
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device; a test that also has a parameter ``backend`` is deselected where that backend cannot run."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of ``wrong_files.make_files``, for tests that only read them."""
    from wrong_files import make_files  # here, because it needs the extra `train`

    return make_files(tmp_path_factory.mktemp("files"))
