"""Plugin of pytest for ``python -m bench.gpu_check``: the most valuable tests first, without those that have passed.

    SRPKD_GPU_TESTS=FOLDER python -m pytest -p bench.gpu_tests ...

With -m gpu, files without such tests are not imported. With SRPKD_CUDA_KERNEL, a test of a case that the selected
kernel declares as not covered is skipped.

Every result is a line of FOLDER/tests.jsonl as soon as it is known. Tests that are listed in FOLDER/passed.txt are
deselected: ``start`` writes that file from the results so far, once, so that all workers of pytest-xdist read the same.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Generator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from srpkd.checking.kernels import KERNEL_VARIABLE
from srpkd.checking.processes import append_line, read_lines

VARIABLE = "SRPKD_GPU_TESTS"
NOT_COVERED = re.compile(KERNEL_VARIABLE + r'="\w+" does not cover [^:]*')  # csrc/cuda/choose_kernel.h
# a test that needs a GPU: it has the mark, or the fixture `device`, whose values have it
GPU_TEST = re.compile(r"\bmark\.gpu\b|^def \w+\([^)]*\bdevice\b", re.MULTILINE)
# parts of test names; a test belongs to the first that its name contains
ORDER = (
    "test_native_gpu.py", "triton/test_gpu.py", "test_backends.py", "test_loss.py", "tests/bench", "tests/training",
    "test_launches_gpu.py",
)  # fmt: skip
BACKENDS = ("native", "triton", "closed_form", "blocked", "reference")
LAST = ("test_a_thousand_runs", "beyond_32_bits", "test_autotuning", "test_memory_of_a_large_map")


def start(folder: Path) -> int:
    """Write the list of the tests that have passed, and return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    passed = [name for name, entry in results(folder).items() if entry["outcome"] == "passed"]
    (folder / "passed.txt").write_text("\n".join(passed), encoding="utf-8")
    return len(passed)


def results(folder: Path) -> dict[str, dict[str, str]]:
    """Return the newest result of each test: its outcome and message."""
    return {entry.pop("test"): entry for entry in read_lines(folder / "tests.jsonl")}


def rank(name: str) -> tuple[bool, int, int]:
    """Return the place of a test in the order: long tests last, then by file, then by backend."""
    file = next((i for i, part in enumerate(ORDER) if part in name), len(ORDER))
    backend = next((i for i, part in enumerate(BACKENDS) if part in name), len(BACKENDS))
    return any(part in name for part in LAST), file, backend


def summary(folder: Path) -> str:
    """Return counts by file, then the failures by message, in less than 60 lines."""
    found = results(folder)
    counts: dict[str, Counter[str]] = {}
    messages: dict[str, list[str]] = {}
    for name, entry in found.items():
        counts.setdefault(name.partition("::")[0], Counter())[entry["outcome"]] += 1
        if entry["outcome"] == "failed":
            messages.setdefault(entry["message"], []).append(name)
    lines = [f"{file}: " + ", ".join(f"{n} {name}" for name, n in own.items()) for file, own in counts.items()]
    for message, names in sorted(messages.items(), key=lambda item: -len(item[1]))[:20]:
        lines.append(f"FAILED {len(names)} x {message}")
        lines.append(f"    {names[0]}")
    if len(messages) > 20:
        lines.append(f"and {len(messages) - 20} more messages, see tests.jsonl")
    return "\n".join(lines) or "no test has run"


# --- hooks ------------------------------------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file without GPU tests: most need packages that a GPU machine may lack, and together half a minute."""
    if config.option.markexpr != "gpu" or not fnmatch(collection_path.name, "test_*.py"):
        return None
    return True if GPU_TEST.search(collection_path.read_text(encoding="utf-8")) is None else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that have passed, and sort the others."""
    passed = set((Path(os.environ[VARIABLE]) / "passed.txt").read_text(encoding="utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = sorted((item for item in items if item.nodeid not in passed), key=lambda item: rank(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a test as skipped if the kernel that SRPKD_CUDA_KERNEL selects does not cover its case."""
    report = yield
    reason = " ".join(str(call.excinfo.value).split()) if call.excinfo else ""
    if report.failed and (found := NOT_COVERED.search(reason)):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, found[0])
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Record the results in the process that has them all: not in the workers of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(os.environ[VARIABLE]) / "tests.jsonl"))


class Recorder:
    """Append the result of each test, and of each file that cannot be imported, to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record(report)

    def record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        message = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = " ".join(str(crash.message if crash else report.longrepr).split())[-200:]
        append_line(self.file, {"test": report.nodeid, "outcome": report.outcome, "message": message})
