"""The script bench/gpu_check.sh and its parts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from bench_helpers import outside_of_xdist
from helpers import ROOT

from bench import gpu_check, relation, results
from bench.gpu_check import PARTS, Check
from srpkd.checking.processes import checks

SCRIPT = ROOT / "bench" / "gpu_check.sh"


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script as on a machine without a GPU, and without building the extension."""
    environment = outside_of_xdist() | {"CUDA_VISIBLE_DEVICES": "", "SRPKD_BUILD": "0", "PYTHON": sys.executable}
    command = ["bash", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def stopped_clock(monkeypatch):
    """No time passes for the check, however busy the machine is."""
    monkeypatch.setattr(
        gpu_check, "time", SimpleNamespace(monotonic=lambda: 0.0, strftime=time.strftime, gmtime=time.gmtime)
    )


def test_the_folder_is_required():
    done = run_script()
    assert done.returncode != 0 and "usage: bench/gpu_check.sh OUT" in done.stderr


def test_wrong_arguments_print_the_usage(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main([str(tmp_path), "tests"])
    assert "usage: bench/gpu_check.sh" in capsys.readouterr().err
    assert not (tmp_path / "commit.txt").exists()


@pytest.mark.slow
def test_rehearsal_of_some_parts(tmp_path):
    """Those whose commands no other test runs: the next test, of all parts, takes a minute and a half."""
    done = run_script(tmp_path, "--only", "tests", "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is a rehearsal on the CPU" in done.stdout and "success; the results are in" in done.stdout
    assert "tests/test_finite.py: 15 passed" in part_output(done.stdout, "tests")
    output = part_output(done.stdout, "sanitize")
    assert re.search(r"(32|48) cases ran, 0 were wrong", output) and "closed_form: N=" not in output  # none is skipped


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.core(0)
def test_rehearsal_on_the_cpu(tmp_path):
    """Every part runs to its end and prints its table last; a second call has nothing left to do."""
    done = run_script(tmp_path)
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "this is a rehearsal on the CPU" in output and "success; the results are in" in output
    tables = {name: part_output(output, name) for name in PARTS}
    assert "native" in tables["smoke"] or "closed_form" in tables["smoke"]
    assert "us: call / GPU / host" in tables["table"] and "N=128" in tables["table"]
    assert "tests/test_finite.py: 15 passed" in tables["tests"]
    for name in ("breakdown", "profile", "ablation"):
        part = tables["ablation" if name == "ablation" else "profile"]
        assert f"--- {name}: skipped, needs a GPU: python -m bench {name} " in part
    assert "without relation loss" in tables["train"]
    assert re.search(r"(32|48) cases ran, 0 were wrong", tables["sanitize"])
    assert "N=256" in tables["sweep"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "commit.txt", "gpu_check.log", "relation.csv", "smoke.jsonl", "smoke-overlap.jsonl", "tests", "train.csv",
    }  # fmt: skip
    rows = len(results.read(tmp_path / "relation.csv", relation.KEY))
    lines = [len((tmp_path / name).read_text("utf-8").splitlines()) for name in ("smoke.jsonl", "smoke-overlap.jsonl")]
    assert lines[1] == len(checks("cpu"))

    done = run_script(tmp_path, "--only", "nothing")
    assert done.returncode == 2 and "usage: bench/gpu_check.sh" in done.stdout
    done = run_script(tmp_path, "--only", "smoke", "table", "tests", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 tests have passed before" in done.stdout and "train.csv is recorded" in done.stdout
    assert len(results.read(tmp_path / "relation.csv")) == rows
    assert lines == [
        len((tmp_path / name).read_text("utf-8").splitlines()) for name in ("smoke.jsonl", "smoke-overlap.jsonl")
    ]


def part_output(output: str, name: str) -> str:
    """Return the output of a part, whose table is in its last 60 lines."""
    text = output.partition(f"=== {name}\n")[2].partition(f"\n=== {name}: ")[0]
    return "\n".join(text.splitlines()[-60:])


def test_results_of_another_commit_are_refused(tmp_path):
    assert gpu_check.other_commit(tmp_path, "abc") is None
    assert gpu_check.other_commit(tmp_path, "abc") is None
    assert "has results of commit abc, and this is def: use another folder" in gpu_check.other_commit(tmp_path, "def")


def test_parts_take_at_most_four_minutes_and_ten_in_all():
    together, alone = zip(*(part.seconds for part in PARTS.values()))
    assert sum(together) <= 600 and max(alone) <= 240
    assert all(least <= most for least, most in zip(together, alone))


@pytest.mark.usefixtures("stopped_clock")
def test_a_part_has_more_time_alone(tmp_path, monkeypatch):
    left = []
    part = gpu_check.Part(lambda check: left.append(check.left), (10, 100))
    monkeypatch.setattr(gpu_check, "PARTS", {"a": part, "b": part})
    monkeypatch.setattr(gpu_check, "prepare", lambda check: None)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_check.main([str(tmp_path)]) == gpu_check.main([str(tmp_path), "--only", "b"]) == 0
    assert left == [10, 10, 100]


def test_missing_packages_are_named_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "prepare", lambda check: None)
    ran = []
    parts = {
        "first": gpu_check.Part(lambda check: ran.append("first"), (1, 1), ("no_such_package", "numpy"), ("not_this",)),
        "second": gpu_check.Part(lambda check: ran.append("second"), (1, 1)),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_check.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    before = output.partition("=== first")[0]
    assert "first: skipped without no_such_package\nfirst: reduced without not_this\n" in before
    assert ran == ["second"] and "FAILED: first (skipped: no_such_package not installed)" in output


def test_a_command_stops_at_its_limit_with_its_children(tmp_path, monkeypatch):
    class StartedChild(subprocess.Popen):
        """A command whose limit is reached when it has started a child."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and not (tmp_path / "child").exists():
                time.sleep(0.01)
            return super().wait(timeout and 0.01)

    check = Check(tmp_path, on_gpu=False)
    check.deadline = time.monotonic() + 60
    code = f"sleep 600 & echo $! > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/child; wait"
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", StartedChild)
        assert check.command("slow", "sh", "-c", code, seconds=6) == 124
    assert check.failures == ["slow (stopped after 6 s; repeat with the same OUT to resume)"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until the system has removed it
            os.kill(int((tmp_path / "child").read_text("utf-8")), 0)
            time.sleep(0.05)
    assert check.python("fails", "-c", "raise SystemExit(3)", accepted=(0, 5)) == 3
    assert check.python("no tests are left", "-c", "raise SystemExit(5)", accepted=(0, 5)) == 5
    check.deadline = time.monotonic()
    assert check.python("late", "-c", "") == 1
    assert check.failures[1:] == ["fails (exit status 3)", "late (no time left)"]


def test_kernels_that_crash_are_not_measured(tmp_path, capsys):
    check = Check(tmp_path, on_gpu=True)
    assert gpu_check.sound_kernels(check) == (["native", "closed_form", "triton"], [])
    states = {"native-sm90": ("ok", "hung"), "native-sm80": ("ok", "not covered"), "triton": ("crashed",)}
    entries = [
        {"kernel": kernel, "case": i, "status": status}
        for kernel, own in states.items()
        for i, status in enumerate(own)
    ]
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert gpu_check.sound_kernels(check) == (["native", "closed_form"], ["native-sm80"])
    assert "native-sm90 is left out" in capsys.readouterr().out


class Recorder(Check):
    """Record the commands instead of running them."""

    def __init__(self, out, left: float) -> None:
        super().__init__(out, on_gpu=True)
        self.deadline = gpu_check.time.monotonic() + left
        self.commands: list[tuple[list[str], float | None]] = []
        self.environments: list[Mapping[str, str] | None] = []

    def attempt(self, name, *words, seconds=None, environment=None) -> tuple[int, str]:
        self.commands.append(([str(word) for word in words], seconds))
        self.environments.append(environment)
        return 0, ""


def test_kernels_are_checked_with_and_without_overlap(tmp_path):
    """In two files: a fault of the option, which is off by default, does not stop the kernels from being measured."""
    check = Recorder(tmp_path, 90)
    gpu_check.smoke(check)
    first, second = (words for words, _ in check.commands)
    assert check.environments == [None, {"SRPKD_CUDA_OVERLAP": "1", "SRPKD_CUDA_TOGETHER": "0"}]
    kernels = [words[words.index("--backend") + 1 :] for words in (first, second)]
    assert kernels == [list(gpu_check.GPU_KERNELS), ["native-sm80", "native-sm90", "closed_form"]]
    assert "--full" in second and str(tmp_path / "smoke-overlap.jsonl") in second


@pytest.mark.usefixtures("stopped_clock")
def test_kernels_that_passed_are_measured(tmp_path, monkeypatch):
    entries = [{"kernel": kernel, "case": 0, "status": "ok"} for kernel in ("native-sm80", "native-sm90")]
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    check = Recorder(tmp_path, 200)
    gpu_check.table(check)
    providers = [words[words.index("--providers") + 1 : words.index("--minutes")] for words, _ in check.commands]
    assert providers == [
        ["eager", "compile", "native", "closed_form", "triton", "native-sm90", "native-sm80"],
    ]  # fmt: skip

    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/true")
    check = Recorder(tmp_path, 200)
    gpu_check.sanitize(check)
    tools = [(words[2], words[words.index("bench.sanitize") + 1 :]) for words, _ in check.commands[2:]]
    groups = [["native-sm80"], ["native-sm90"], ["native", "closed_form", "triton"]]
    assert tools == [(tool, group) for tool in ("memcheck", "racecheck") for group in groups]
    shares = [seconds for _, seconds in check.commands[2:]]
    assert shares == [200 / left for left in (6, 5, 4, 3, 2, 1)], "the time that is left"
    for part in ("smoke", "tests", "train", "sweep"):
        check = Recorder(tmp_path, 200)
        PARTS[part].run(check)
        assert check.commands and all(seconds is None or seconds <= 200 for _, seconds in check.commands), part


def test_tests_on_a_gpu_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", "sm80")
    check = Recorder(tmp_path, 100)
    gpu_check.tests(check)
    ((words, _),) = check.commands
    assert words[words.index("gpu") - 1 :][:3] == ["-m", "gpu", "tests"] and "bench.gpu_tests" in words
    assert check.environments == [{"SRPKD_GPU_TESTS": str(tmp_path / "tests-sm80")}]
    assert (tmp_path / "tests-sm80" / "passed.txt").read_text("utf-8") == ""


@pytest.mark.usefixtures("stopped_clock")
def test_a_sanitizer_that_hangs_is_skipped(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    check = Check(tmp_path, on_gpu=True)
    check.deadline = 2.0
    gpu_check.sanitize(check)
    assert not check.failures and "does not work here (stopped after 0 s; repeat" in capsys.readouterr().out


@pytest.mark.usefixtures("stopped_clock")
def test_kernels_are_profiled_and_taken_apart(tmp_path, monkeypatch):
    """Only those that passed the smoke test; the tiles in parts only on a GPU that can run them."""
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    check = Recorder(tmp_path, 60)
    gpu_check.profile(check)
    gpu_check.ablation(check)
    assert [words[4:] for words, _ in check.commands if "triton" in words] == [
        ["breakdown", "--batch", "16", "1", "--providers", "triton"]
    ]
    assert not any(word in words for words, _ in check.commands for word in ("native-sm90", "ablation"))

    (tmp_path / "smoke.jsonl").write_text(json.dumps({"kernel": "native-sm90", "case": 0, "status": "ok"}) + "\n")
    check = Recorder(tmp_path, 60)
    gpu_check.profile(check)
    gpu_check.ablation(check)
    assert [words[4] for words, _ in check.commands] == ["profile", "breakdown", "profile", "breakdown", "ablation"]
    assert check.commands[1][0][-2:] == ["native-sm90", "triton"]
    assert check.commands[0][1] == 36
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (8, 0))
    check = Recorder(tmp_path, 60)
    gpu_check.ablation(check)
    assert not check.commands


@pytest.mark.usefixtures("stopped_clock")
def test_training_steps_that_fit_into_the_time(tmp_path):
    for left, options in (
        (60, ["--budget", "6", "--short"]),
        (200, ["--budget", "40", "--speedups", "channels_last", "bf16"]),
    ):
        check = Recorder(tmp_path, left)
        gpu_check.train(check)
        (words, _), _ = check.commands
        assert words[words.index("--out") + 2 :] == options


def test_times_of_a_gpu_fit_on_a_line(recorded):
    rows = results.read(recorded)
    for row in rows:
        row["gpu_s"], row["host_s"] = "0.0001", "0.0002"
    text = gpu_check.times(rows)
    [line] = [line for line in text.splitlines() if line.startswith("N=4096 C=64/256 B=1 float32 highest row l1")]
    assert "83,886 / 100 / 200" in line and "out of memory" in line


@pytest.mark.slow
def test_measuring_needs_no_optional_package(tmp_path):
    """The relation benchmark and the smoke test run without the packages that a bare machine lacks."""
    code = """
import sys
for name in ("jsonargparse", "matplotlib", "PIL", "torchvision", "jinja2", "yaml", "pandas", "scipy"):
    sys.modules[name] = None  # importing it fails
import bench.gpu_check, bench.sanitize, srpkd.check
from bench.__main__ import main
main(["relation", "--pixels", "8", "--providers", "blocked", "--budget", "0.01", "--no-memory", "--device", "cpu",
      "--out", sys.argv[1]])
"""
    command = [sys.executable, "-c", code, tmp_path / "relation.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
