"""The command ``python -m bench relation``, and its cases in pytest-benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench_helpers import incorrect_loss, outside_of_xdist, run
from helpers import ROOT
from torch import Tensor

from bench import cases, relation, results
from bench.__main__ import main
from bench.providers import MATRICES, PROVIDERS
from srpkd.checking.cases import Case
from srpkd.checking.kernels import CannotRun, Provider
from srpkd.kernels import measured

SMALL = Case(pixels=40, channels=(5, 7), batch=2)


@pytest.fixture(autouse=True)
def _quick_peak_rates(monkeypatch):
    """Measuring them takes seconds."""
    monkeypatch.setattr(relation.machine, "peak_rates", lambda *_: relation.machine.PeakRates(1e9, 1e8))


def raises(error: Exception):
    def make(case: Case):
        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            raise error

        return loss

    return make


def test_every_provider_has_a_row_and_only_correct_ones_are_timed(monkeypatch):
    extra = {
        "wrong": Provider(incorrect_loss("scaled")),
        "broken": Provider(raises(RuntimeError("no such kernel"))),
        "unsuited": Provider(raises(CannotRun("nothing to do"))),
        "missing": Provider(raises(AssertionError), lambda case: "it is not installed"),
        "huge": Provider(raises(AssertionError("it was tried"))),
        "greedy": Provider(raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))),
        "greedy on a GPU": Provider(raises(torch.OutOfMemoryError("CUDA out of memory"))),
    }
    for name, provider in extra.items():
        monkeypatch.setitem(PROVIDERS, name, provider)
    monkeypatch.setitem(MATRICES, "huge", lambda case: 10**12)
    names = ["eager", "compile", "blocked", *extra]
    monkeypatch.setitem(PROVIDERS, "compile", PROVIDERS["eager"])  # compiling is slow
    rows = {row["provider"]: row for row in relation.measure_case(SMALL, names, budget=0.05, memory=False)}
    assert list(rows) == names
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "ok", "compile": "ok", "blocked": "ok", "wrong": "wrong", "broken": "failed", "unsuited": "skipped",
        "missing": "skipped", "huge": "out of memory", "greedy": "out of memory", "greedy on a GPU": "out of memory",
    }  # fmt: skip
    for row in rows.values():
        timed = [row[name] for name in ("median_s", "p20_s", "p80_s", "times_faster_than_eager", "percent_of_roofline")]
        assert all(value > 0 for value in timed) if row["status"] == "ok" else timed == [None] * 5
        assert row["reason"] or row["status"] == "ok"
        assert len({tuple(row)} | {tuple(rows["eager"])}) == 1
        roofs = cases.operations(SMALL) / 1e9, cases.bytes_moved(SMALL) / 1e8
        assert (row["roofline_matmul_s"], row["roofline_copy_s"]) == roofs
        if row["status"] == "ok":
            assert row["percent_of_roofline"] == pytest.approx(100 * max(roofs) / row["median_s"])
    assert rows["eager"]["times_faster_than_eager"] == 1
    assert rows["huge"]["needed_bytes"] == 10**12 * cases.matrix_bytes(SMALL)
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.1)
    assert "no such kernel" in rows["broken"]["reason"]
    for row in rows.values():
        assert relation.describe(row).startswith(row["provider"])
    assert re.search(
        r" ms \(.* rounds\)  +1\.00 x eager's speed  +[\d.]+ % of roofline$", relation.describe(rows["eager"])
    )


def test_rows_of_a_gpu_have_the_version_of_its_kernels(monkeypatch):
    monkeypatch.setattr(relation.machine, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(relation.machine, "capability", lambda device: "9.0")
    case, trials = replace(SMALL, device="cuda"), {"triton": relation.Trial("skipped")}
    row = relation.as_row("triton", case, trials, relation.machine.PeakRates(1e9, 1e8))
    assert row["kernel_version"] == measured.kernel_version("triton", "float32") is not None
    assert (row["device"], row["device_type"], row["capability"]) == ("some GPU", "cuda", "9.0")


@pytest.mark.parametrize(("dtype", "mode"), [("float16", "forward+backward"), ("float32", "forward")])
def test_scaled_gradients_and_losses_without_one_pass_the_gate(dtype, mode):
    case = replace(SMALL, dtype=dtype, mode=mode)
    (row,) = relation.measure_case(case, ["blocked"], budget=0.01, memory=False)
    assert row["status"] == "ok" and (row["gradient_error"] is None) == (mode == "forward")


def test_a_case_is_measured_with_its_settings(monkeypatch):
    case, seen = replace(SMALL, threads=2, precision="medium"), set()
    exact = PROVIDERS["blocked"].make(case)

    def loss(student, teacher):
        seen.add((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return exact(student, teacher)

    monkeypatch.setitem(PROVIDERS, "blocked", Provider(lambda case: loss))
    monkeypatch.setattr(relation.measure, "host_seconds", lambda call, device: call() and 1e-3)
    monkeypatch.setattr(relation.measure, "gpu_seconds", lambda call, device: call() and 2e-3)
    (row,) = relation.measure_case(case, ["blocked"], budget=0.01, memory=False)
    assert row["rounds"] >= 3 and (row["gpu_s"], row["host_s"]) == (2e-3, 1e-3)
    assert "gpu 2.000 ms  host 1.000 ms" in relation.describe(row)
    assert seen == {(2, "medium")}


def test_slow_calls_are_timed_once(monkeypatch):
    monkeypatch.setattr(relation, "SLOW", 0.0)
    monkeypatch.setattr(relation.measure, "seconds_of", pytest.fail)
    for row in relation.measure_case(SMALL, ["blocked", "eager"], budget=1e3, memory=False):
        assert (row["status"], row["reason"], row["rounds"]) == ("ok", "timed once", 1)
        assert row["median_s"] == row["p20_s"] == row["p80_s"] > 0


def test_the_gate_fills_the_memory_of_our_kernels(monkeypatch):
    """An omitted pixel whose memory contains the right value is found."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # conftest.py sets it
    for name in ("compile", "blocked"):
        monkeypatch.setitem(PROVIDERS, name, Provider(incorrect_loss("omitted pixel")))
    rows = relation.measure_case(SMALL, ["compile", "blocked"], budget=0.01, memory=False)
    assert [row["status"] for row in rows] == ["ok", "wrong"]


def test_command_updates_rows(tmp_path, capsys):
    out = tmp_path / "relation.csv"
    arguments = ["relation", "--out", out, "--pixels", 48, 64, "--providers", "eager", "blocked", "--budget", 0.01]
    run(*arguments, "--no-memory", "--device", "cpu", "--threads", 1, "--channels", "4/6")
    run(*arguments, "--no-memory", "--device", "cpu", "--threads", 1, "--channels", "4/6")
    rows = results.read(out)
    assert [(row["pixels"], row["provider"]) for row in rows] == [
        ("48", "eager"), ("48", "blocked"), ("64", "eager"), ("64", "blocked"),
    ]  # fmt: skip
    assert all(row["status"] == "ok" and row["commit"] and row["torch"] == torch.__version__ for row in rows)
    capsys.readouterr()
    run(*arguments, "--missing", "--device", "cpu", "--threads", 1, "--channels", "4/6")
    assert "eager" not in capsys.readouterr().out
    another = ["--providers", "eager", "reference", "--missing", "--no-memory"]  # one of them is recorded
    run(*arguments, *another, "--device", "cpu", "--threads", 1, "--channels", "4/6", "--minutes", 0)
    assert "2 of 2 cases are left" in capsys.readouterr().out
    run(*arguments, "--minutes", 0, "--device", "cpu")
    assert "2 of 2 cases are left" in capsys.readouterr().out


def test_ctrl_c_keeps_the_cases_that_are_measured(tmp_path, monkeypatch, capsys):
    measure_case = relation.measure_case

    def stop_at_the_second(case: Case, *rest):
        if case.pixels == 64:
            raise KeyboardInterrupt
        return measure_case(case, *rest)

    monkeypatch.setattr(relation, "measure_case", stop_at_the_second)
    out = tmp_path / "relation.csv"
    words = ["relation", "--pixels", "48", "64", "--providers", "blocked", "--budget", "0", "--no-memory", "--out", out]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, words), "--device", "cpu"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyboardInterrupt) as stopped:
        main()
    sys.excepthook(stopped.type, stopped.value, stopped.tb)
    assert capsys.readouterr().err == "", "a traceback would hide what was printed before"
    assert [row["pixels"] for row in results.read(out)] == ["48"]


@pytest.mark.slow
@pytest.mark.core(0)
def test_pytest_benchmark_runs_the_same_cases():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", "-k", "256-forward-blocked"]
    # in a worker of pytest-xdist, pytest-benchmark measures nothing
    done = subprocess.run(command, cwd=ROOT, env=outside_of_xdist(), capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
