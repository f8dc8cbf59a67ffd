"""The plugin of pytest that orders and records the GPU tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from bench_helpers import outside_of_xdist
from helpers import ROOT

from bench import gpu_tests

PROGRAM = """
import pytest

@pytest.mark.parametrize("backend", ["blocked", "triton", "native"])
def test_backend(backend):
    assert backend != "triton", "a tolerance"

def test_a_thousand_runs():
    pass

def test_skipped():
    pytest.skip("no such GPU")

def test_uncovered():
    raise RuntimeError('SRPKD_CUDA_KERNEL="sm90" does not cover a wide student: use sm80 or auto')
"""


def run_pytest(folder, *arguments: str) -> list[str]:
    """Run the program's tests, and return the names of those that ran, in order."""
    state = folder / "state"
    gpu_tests.start(state)
    before = (state / "tests.jsonl").read_text("utf-8") if (state / "tests.jsonl").exists() else ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu_tests"]
    subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", folder, folder, *arguments],
        cwd=ROOT,
        env=outside_of_xdist() | {gpu_tests.VARIABLE: str(state), "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    lines = (state / "tests.jsonl").read_text("utf-8").removeprefix(before).splitlines()
    return [json.loads(line)["test"].partition("::")[2] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["one process", "xdist"])
@pytest.mark.core(0)
def test_tests_that_passed_are_not_repeated(tmp_path, arguments):
    (tmp_path / "test_backends.py").write_text(PROGRAM)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    arguments = (*arguments, "--continue-on-collection-errors")
    order = [f"test_backend[{name}]" for name in ("native", "triton", "blocked")]
    ran = run_pytest(tmp_path, *arguments)
    assert [name for name in ran if name] == [*order, "test_skipped", "test_uncovered", "test_a_thousand_runs"]
    assert [name for name in run_pytest(tmp_path, *arguments) if name] == [
        "test_backend[triton]", "test_skipped", "test_uncovered",
    ]  # fmt: skip
    text = gpu_tests.summary(tmp_path / "state")
    assert "test_backends.py: 3 passed, 1 failed, 2 skipped" in text
    assert "FAILED 1 x AssertionError: a tolerance" in text and "No module named 'no_such_module'" in text


def test_files_without_gpu_tests_are_not_imported(tmp_path):
    """They may import packages that the machine lacks. A test has the mark itself, or by the fixture ``device``."""
    (tmp_path / "test_marked.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_marked():\n    pass\n")
    (tmp_path / "conftest.py").write_text("""
import pytest

@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
""")
    (tmp_path / "test_device.py").write_text("def test_device(\n    device: str,\n):\n    pass\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n\ndef test_broken(tmp_path):\n    device = 0\n")
    assert sorted(run_pytest(tmp_path, "-m", "gpu")) == ["test_device[cuda]", "test_marked"]


def test_summary_is_short(tmp_path):
    assert gpu_tests.summary(tmp_path) == "no test has run"
    entries = [{"test": f"a.py::test[{i}]", "outcome": "failed", "message": f"message {i % 30}"} for i in range(90)]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = gpu_tests.summary(tmp_path)
    assert text.startswith("a.py: 90 failed\nFAILED 3 x message 0\n    a.py::test[0]\n")
    assert "and 10 more messages" in text and len(text.splitlines()) < 60


def test_a_line_whose_writing_was_cut_off_is_skipped(tmp_path):
    lines = [json.dumps({"test": f"a.py::{i}", "outcome": "passed", "message": ""}) for i in range(2)]
    (tmp_path / "tests.jsonl").write_text("\n".join(lines)[:-9])
    assert list(gpu_tests.results(tmp_path)) == ["a.py::0"] and gpu_tests.start(tmp_path) == 1


def test_the_most_valuable_tests_come_first():
    names = [
        "tests/kernels/test_native_gpu.py::test_error",
        "tests/kernels/triton/test_gpu.py::test_error",
        "tests/kernels/test_backends.py::test_values[cuda-native]",
        "tests/kernels/test_backends.py::test_values[cuda-blocked]",
        "tests/test_other.py::test_values[cuda]",
        "tests/kernels/triton/test_gpu.py::test_a_thousand_runs",
    ]
    assert list(map(gpu_tests.rank, names)) == sorted(map(gpu_tests.rank, names))
    assert len(set(map(gpu_tests.rank, names))) == len(names)
