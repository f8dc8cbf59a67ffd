"""What tests/conftest.py does without a GPU, with FORCE_COLOR, and in the workers of pytest-xdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

# copied beside the real conftest.py's rules: GPU tests, cases of which --core runs two, threads, and messages
PROGRAM = """
import argparse
import os
import pytest
import torch

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_on_a_gpu(number):
    raise AssertionError("runs without a GPU")

@pytest.mark.core(2)
@pytest.mark.parametrize("number", [0, 1, 2, pytest.param(3, marks=pytest.mark.core(0))])
def test_of_the_core(number):
    pass

@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_backend(backend, device):
    assert backend != "triton", "runs without a GPU"

def test_threads():
    assert torch.get_num_threads() == int(os.environ["EXPECTED_THREADS"])
    assert "PYTEST_XDIST_WORKER" not in os.environ or os.environ["OMP_NUM_THREADS"] == os.environ["EXPECTED_THREADS"]

def test_messages_have_no_colours():
    assert argparse.ArgumentParser("program").format_usage() == "usage: program [-h]\\n"
"""


def run_pytest(folder, *arguments: str, threads: int = 2, expected_threads: int = 2) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text("utf-8"))
    (folder / "test_program.py").write_text(PROGRAM)
    options = ["-q", "--color=no", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "FORCE_COLOR": "1", "OMP_NUM_THREADS": str(threads)}
    environment["EXPECTED_THREADS"] = str(expected_threads)
    command = [sys.executable, "-m", "pytest", *options, folder, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.core(0)
def test_gpu_tests_are_deselected_and_counted(tmp_path, workers):
    done = run_pytest(tmp_path, f"-n{workers}", expected_threads=1 if workers else 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b7 passed\b", done.stdout)
    assert done.stdout.count("3 GPU tests deselected: torch sees no CUDA device") == 1
    assert done.stdout.count("1 cases deselected: triton on cpu: it runs on NVIDIA GPUs") == 1
    assert "--core" not in done.stdout


@pytest.mark.slow
def test_cases_beyond_the_core_are_left_out_and_counted(tmp_path):
    done = run_pytest(tmp_path, "--core", "-vv", "-n2", expected_threads=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 GPU tests deselected: torch sees no CUDA device") == 1
    assert done.stdout.count("2 cases left out by --core: make test-all runs them") == 1
    chosen = set(re.findall(r"test_of_the_core\[(\d)\]", done.stdout))
    assert len(chosen) == 2 and "3" not in chosen


@pytest.mark.slow
@pytest.mark.core(0)
def test_a_selection_of_gpu_tests_alone_succeeds(tmp_path):
    done = run_pytest(tmp_path, "-m", "gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 GPU tests deselected: torch sees no CUDA device" in done.stdout
    assert run_pytest(tmp_path, "-k", "no_such_name").returncode == pytest.ExitCode.NO_TESTS_COLLECTED
