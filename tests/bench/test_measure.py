"""Time and peak memory."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import machine, measure
from bench.providers import bytes_needed, prepare_call
from srpkd.checking.cases import Case
from srpkd.kernels import build, cpu_info


def test_providers_take_turns():
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = measure.interleaved(functions, dict.fromkeys("abc", 1.0), "cpu", budget=0)
    assert "".join(order) == "abcbcacab"
    assert {len(values) for values in samples.values()} == {measure.ROUNDS[0]}
    assert measure.ratio([1.0, 2.0, 100.0], [2.0, 6.0, 100.0]) == 2.0
    assert measure.ratio([4.0], [2.0, 1.0, 3.0]) == 0.5
    assert measure.quantiles([3.0, 1.0, 2.0]) == pytest.approx({"median_s": 2.0, "p20_s": 1.4, "p80_s": 2.6})


@pytest.mark.parametrize(("budget", "rounds"), [(0.06, 3), (0.26, 10), (9, 50)])
def test_rounds_fill_the_budget(budget, rounds, monkeypatch):
    """A sample takes at least 5 ms: of a fast function it is of several calls."""
    monkeypatch.setattr(measure, "seconds_of", lambda function, device, repeats: repeats)
    samples = measure.interleaved(dict.fromkeys(("a", "b"), None), {"a": 1e-3, "b": 0.02}, "cpu", budget)
    assert samples == {"a": [5] * rounds, "b": [1] * rounds}


def test_seconds_are_those_of_one_call(monkeypatch):
    calls: list[None] = []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 10.0 + 2.0 * len(calls))
    assert measure.seconds_of(lambda: calls.append(None), "cpu", 3) == 2.0 and len(calls) == 3


def test_peak_rates(monkeypatch):
    """Operations of the largest rate, and bytes read plus written."""
    calls = []

    def best(function, device):
        calls.append(function)
        return 1e-3 if len(calls) == 2 else 1.0  # the product of matrices of 1024 x 1024

    monkeypatch.setattr(machine, "_best", best)
    rates = machine.peak_rates.__wrapped__("cpu", torch.float32, "highest", 1)
    assert rates == (2 * 1024**3 / 1e-3, 2 * 4 * 2**26)
    for function in calls[1:]:
        function()
    product, copy = calls[1].keywords["out"], calls[3]()
    assert torch.equal(product, torch.matmul(*calls[1].args)) and torch.equal(copy, calls[3].args[0])


def test_the_fastest_of_enough_calls_counts(monkeypatch):
    seconds = iter([0.1, 0.01, 0.05, 0.06, 0.07, 0.3, 9.0])  # half a second after six calls
    monkeypatch.setattr(machine, "seconds_of", lambda function, device: next(seconds))
    assert machine._best(lambda: None, "cpu") == 0.01 and list(seconds) == [9.0]
    seconds = iter([1.0, 2.0, 3.0, 4.0, 0.5, 9.0])  # at least five
    assert machine._best(lambda: None, "cpu") == 0.5 and list(seconds) == [9.0]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the available memory is known on Linux only")
def test_free_memory_is_in_bytes():
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    assert 0.5 * page * os.sysconf("SC_AVPHYS_PAGES") < machine.free_bytes("cpu") < page * total


def test_gpu_and_host_are_only_timed_on_a_gpu():
    assert measure.gpu_seconds(pytest.fail, "cpu") is measure.host_seconds(pytest.fail, "cpu") is None


def test_a_failed_capture_does_not_change_the_stream(monkeypatch):
    """torch.cuda.graph does not leave its stream if the capture fails: later calls would run there."""

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    class Failing(torch.cuda.graph):
        def __init__(self, graph: object) -> None: ...

        def __enter__(self) -> None:
            current[0] = Stream()

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    default = Stream()
    current = [default]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    assert measure.gpu_seconds(lambda: None, "cuda") is None
    assert current == [default]


@pytest.mark.gpu
def test_times_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    long, short = (functools.partial(torch.matmul, y, y) for y in (x, x[:64, :64]))
    assert measure.gpu_seconds(long, "cuda") > 3 * measure.gpu_seconds(short, "cuda")
    assert measure.host_seconds(long, "cuda") < measure.gpu_seconds(long, "cuda")
    before = torch.cuda.current_stream()
    assert measure.gpu_seconds(lambda: x.sum().item(), "cuda") is None, "a call that synchronises cannot be captured"
    assert torch.cuda.current_stream() == before
    assert measure.gpu_seconds(short, "cuda") > 0, "a failed capture must not affect the next"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux")
def test_peak_memory_matches_the_matrices():
    # so large that the megabytes by which Linux miscounts on processors with many cores, and huge pages, do not matter
    case = Case(pixels=2048, channels=(8, 8))
    predicted = bytes_needed("eager", case)
    assert predicted == 6 * 2048**2 * 4
    peak = measure.peak_on_cpu(functools.partial(prepare_call, "eager", case), threads=1)
    assert 0.9 * predicted <= peak <= 1.3 * predicted
    # blocked stores strips of a fixed size and the gradient
    larger = Case(pixels=4096, channels=(8, 8))
    assert measure.peak_on_cpu(functools.partial(prepare_call, "blocked", larger), threads=1) < 0.75 * 4096**2 * 4


def test_a_cpu_is_named_with_its_instructions(monkeypatch):
    """Rows of processors with other instructions must not replace each other."""
    names = set()
    for instructions in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda instructions=instructions: instructions)
        names.add(machine.device_name("cpu"))
        assert f" with {instructions}, " in machine.device_name("cpu")
    assert len(names) == 2


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_says_whether_the_code_has_changed(tmp_path, monkeypatch):
    """Results do not count as code. Outside of a repository, a variable contains the commit."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("SRPKD_COMMIT", "abc")
    assert machine._commit() == "abc"
    files = [tmp_path / "bench" / name for name in ("results/a.csv", "study/a.py")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = git("rev-parse", "--short", "HEAD")
    for file, expected in zip(files, (commit, f"{commit}+")):
        file.write_text("2\n")
        assert machine._commit() == expected


def test_the_model_of_all_cores_is_named_once(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n\n" * 2)
    monkeypatch.setattr(cpu_info, "PATH", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.device_name("cpu") == f"AMD EPYC with AVX2, {build.available_cores()} cores"


@pytest.mark.parametrize(
    ("models", "name"), [(["Neoverse-V2"], "Neoverse-V2"), (["Cortex-A55", "Cortex-A76"], "Cortex-A55 and Cortex-A76")]
)
def test_arm_processors_have_names(models, name, tmp_path, monkeypatch):
    """Linux tells their numbers only: rows of all of them would replace each other."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    monkeypatch.setattr(cpu_info, "PATH", tmp_path / "cpuinfo")
    lines = "".join(f"  Model name:             {model}\n" for model in models)
    (tmp_path / "lscpu").write_text(f"#!/bin/sh\ncat <<END\nArchitecture:   aarch64\n{lines}    Model:    0\nEND\n")
    (tmp_path / "lscpu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert machine.device_name("cpu") == f"{name}, {build.available_cores()} cores"
