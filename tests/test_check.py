"""The command ``srpkd check``: its cases, its processes and its verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_kernel
import pytest
import torch
from bench_helpers import incorrect_loss

from srpkd import check as command
from srpkd import relation_loss
from srpkd.checking import gate, processes
from srpkd.checking.cases import Case
from srpkd.checking.kernels import KERNELS, CannotRun, Provider
from srpkd.checking.processes import Check
from srpkd.kernels import DISTANCES, NORMALIZATIONS, native
from srpkd.structures import to_device

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKS = processes.checks("cpu")
RANDOM = next(check for check in CHECKS if check.kind == "random" and check.case.need_grad)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_expected_results_are_those_of_the_definition_in_strips_of_rows(monkeypatch, normalize, distance):
    monkeypatch.setattr(gate, "MIN_ROWS", 3)
    monkeypatch.setattr(gate, "STRIP_ELEMENTS", {"cpu": 1})
    case = Case(pixels=8, channels=(2, 3), batch=2, normalize=normalize, distance=distance)
    student, teacher = torch.randn(2, 8, 2, dtype=torch.float64), torch.randn(2, 8, 3, dtype=torch.float64)
    assert [rows.stop - rows.start for rows, _ in gate.strips(student)] == [3, 3, 2]
    found = gate.float64_result(student, teacher, case)
    leaf = student.clone().requires_grad_()
    options = {"normalize": normalize, "distance": distance, "delta": case.relation.delta, "backend": "reference"}
    loss = relation_loss(leaf.mT[..., None], teacher.mT[..., None], **options)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(loss, leaf)[0])


def test_a_missing_row_of_the_gradient_is_an_error():
    """It hardly changes the error of the whole gradient."""
    loss, gradient = torch.tensor(2.0, dtype=torch.float64), torch.ones(2, 10000, 3, dtype=torch.float64)
    spoiled = gradient.clone()
    spoiled[1, 7:9] = 0
    errors = gate.relative_errors(gate.Result(1.001 * loss, spoiled), gate.Result(loss, gradient))
    assert errors == pytest.approx((1e-3, 10000**-0.5, 1.0))
    reason = gate.failure_reason(errors._replace(loss=0.0), Case())
    assert reason == "the relative error of one pixel's gradient against float64 is 1, expected at most 0.5"


@pytest.mark.parametrize(
    ("dtype", "precision", "kind"),
    [("float32", "highest", "float32"), ("float32", "high", "tf32"), ("float32", "medium", "medium")]
    + [(dtype, "high", dtype) for dtype in ("bfloat16", "float16")],
)
def test_limits(dtype, precision, kind):
    assert gate.limits_of(Case(dtype=dtype, precision=precision), gate.LIMITS) is gate.LIMITS[kind]


def test_cases_cover_every_relation_and_format():
    assert len({check.identity for check in processes.checks("cuda", full=True)}) == 52
    assert processes.checks("cuda", full=True)[:28] == processes.checks("cuda")
    cases = [check.case for check in processes.checks("cuda")]
    assert len(cases) == 28 and len(CHECKS) == 26
    assert {check.kind for check in processes.checks("cuda")} == {"random", "zero norm", "tokens"}
    assert {(case.normalize, case.distance) for case in cases} == {(n, d) for n in NORMALIZATIONS for d in DISTANCES}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.precision for case in cases if case.dtype == "float32"} == {"highest", "high", "medium"}
    assert {case.device for case in cases} == {"cuda"}
    assert {case.flags for case in cases} == {(), ("rectify",), ("detach_norms",)}


@pytest.mark.parametrize("kind", ["random", "zero norm", "tokens", "close"])
def test_a_right_kernel_passes(kind):
    [check] = [check for check in processes.checks("cuda", full=True) if check.kind == kind][:1]
    check = check._replace(case=replace(check.case, device="cpu"))
    found = processes.outcome("blocked", check)
    assert found["status"] == "ok" and found["reason"] == ""
    assert 0 < found["gradient"] < 0.003
    assert 0 < found["share"] < 0.3


def test_kinds_of_features():
    kinds = {check.kind: check for check in processes.checks("cpu", full=True)}
    student, teacher = processes.inputs(kinds["zero norm"])
    assert not student[:, ::3].any() and not teacher[:, 1::4].any()
    assert student[:, 1::3].any(2).all() and teacher[:, ::4].any(2).all()
    student, teacher = processes.inputs(kinds["tokens"])
    assert student.is_contiguous() and teacher.stride(2) == 2
    student, teacher = processes.inputs(kinds["close"])
    assert 0.02 < (student - teacher).norm() / teacher.norm() < 0.04


@pytest.mark.parametrize("check", [check for check in CHECKS if check.case.flags], ids=Check.describe)
def test_a_kernel_that_ignores_an_option_fails(check, monkeypatch):
    assert processes.outcome("blocked", check)["status"] == "ok"
    exact = KERNELS["reference"].make(replace(check.case, flags=()))
    monkeypatch.setitem(KERNELS, "blocked", Provider(lambda case: exact))
    assert processes.outcome("blocked", check)["status"] == "wrong"


@pytest.mark.parametrize("kind", ["loss", "scaled", "missing pixel", "nan"])
def test_a_wrong_kernel_fails(kind, monkeypatch):
    monkeypatch.setitem(KERNELS, "blocked", Provider(incorrect_loss(kind)))
    # float32: eager PyTorch, in which the error is put, rounds matrices of 16 bits
    check = RANDOM._replace(case=replace(RANDOM.case, dtype="float32"))
    found = processes.outcome("blocked", check)
    assert found["status"] == "wrong" and "relative error" in found["reason"]
    assert not found["share"] <= 1 or kind == "nan"


def test_an_omitted_pixel_is_found_where_its_memory_contains_the_right_value(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # conftest.py sets both
    torch.use_deterministic_algorithms(False)
    monkeypatch.setitem(KERNELS, "blocked", Provider(incorrect_loss("omitted pixel")))
    check = RANDOM._replace(case=replace(RANDOM.case, dtype="float32"))
    assert processes.outcome("blocked", check)["status"] == "wrong"
    assert not torch.utils.deterministic.fill_uninitialized_memory and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(processes, "poisoned_memory", nullcontext)
    assert processes.outcome("blocked", check)["status"] == "ok", "the memory contains another value"


def test_different_bits_of_the_gradient_are_found(monkeypatch):
    calls = []

    def make(case):
        exact = KERNELS["reference"].make(case)

        def loss(student, teacher):
            calls.append(torch.get_float32_matmul_precision())
            return exact(student, teacher) + 1e-12 * len(calls) * (student.sum() - student.sum().detach())

        return loss

    monkeypatch.setitem(KERNELS, "blocked", Provider(make))
    check = RANDOM._replace(case=replace(RANDOM.case, dtype="float32", precision="medium"))
    assert processes.outcome("blocked", check)["status"] == "bits differ"
    assert calls == ["medium", "medium"]


def test_other_outcomes(monkeypatch):
    def make_raising(error):
        def loss(student, teacher):
            raise error

        return Provider(lambda case: loss)

    monkeypatch.setitem(KERNELS, "blocked", make_raising(CannotRun("more than 256 channels")))
    assert processes.outcome("blocked", RANDOM) == {"status": "not covered", "reason": "more than 256 channels"}
    monkeypatch.setitem(KERNELS, "blocked", Provider(lambda case: pytest.fail(), lambda case: "no such GPU"))
    assert processes.outcome("blocked", RANDOM) == {"status": "not covered", "reason": "no such GPU"}
    monkeypatch.setitem(KERNELS, "blocked", make_raising(RuntimeError("an illegal\nmemory access")))
    crashed = {"status": "crashed", "reason": "RuntimeError: an illegal memory access"}
    assert processes.outcome("blocked", RANDOM) == crashed


def test_a_single_pixel_must_be_finite():
    [check] = [check for check in processes.checks("cuda") if check.case.pixels == 1]
    features = torch.ones(1, 1, 64), torch.ones(1, 1, 256)
    assert processes.compare((torch.tensor(0.0), torch.zeros(1)), check, *features) == (gate.Errors(0.0), 0.0, None)
    assert processes.compare((torch.tensor(0.0), None), check, *features)[2] is None
    for result in ((torch.tensor(torch.nan), torch.zeros(1)), (torch.tensor(0.0), torch.tensor([0.0, torch.inf]))):
        assert "not finite" in processes.compare(result, check, *features)[2]


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "work", fake_kernel.work)
    monkeypatch.setattr(processes, "SHARDS", {})
    return tmp_path


def test_a_process_ends_after_an_error(tmp_path, monkeypatch):
    """After an error of CUDA, it cannot use the GPU any more."""
    for module, function in ((processes.os, "dup2"), (processes.signal, "signal")):
        monkeypatch.setattr(module, function, lambda *_: None)
    monkeypatch.setattr(processes, "outcome", lambda kernel, check: {"status": "crashed", "reason": ""})
    sent = []
    with pytest.raises(SystemExit):
        processes.work("blocked", CHECKS, [3, 4], SimpleNamespace(send=sent.append), tmp_path / "stderr")
    assert [(entry["case"], entry.get("status")) for entry in sent] == [(3, None), (3, "crashed")]


def test_processes_of_a_kernel_share_the_cases(monkeypatch):
    monkeypatch.setattr(processes, "SHARDS", {"triton": 3})
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
    parts = []
    monkeypatch.setattr(processes.Runner, "run_shard", lambda self, *arguments: parts.append(arguments))
    processes.Runner(CHECKS[:5], 60, 15).run(["triton", "native"])
    assert sorted(parts) == [("native", [*range(5)]), ("triton", [0, 3]), ("triton", [1, 4]), ("triton", [2])]


class SilentInCase2:
    """The end of a pipe, on which the result of case 2 never comes; others may take long, as processes start slowly."""

    def __init__(self, receiver, waits: list[float]) -> None:
        self.receiver, self.waits, self.last = receiver, waits, {}

    def poll(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.last != {"case": 2} and self.receiver.poll(300)

    def recv(self) -> dict:
        self.last = self.receiver.recv()
        return self.last


def test_crashes_and_hangs_do_not_hide_other_results(fake, monkeypatch):
    pipe, waits = processes.CONTEXT.Pipe, []

    def silent_pipe(duplex: bool):
        receiver, sender = pipe(duplex=duplex)
        return SilentInCase2(receiver, waits), sender

    monkeypatch.setattr(processes.CONTEXT, "Pipe", silent_pipe)
    runner = processes.Runner(CHECKS[:4], 300, 8, fake / "smoke.jsonl")
    runner.run(["native", "triton"])
    assert set(waits) == {8}
    expected = ["ok", "crashed", "hung", "ok"]
    for kernel in ("native", "triton"):
        assert [runner.results[kernel, number]["status"] for number in range(4)] == expected
    assert "exit status 7: illegal instruction" in runner.results["native", 1]["reason"]
    assert processes.verdict(runner.results, "native", 4) == "FAILED"
    assert processes.recorded(fake / "smoke.jsonl") == runner.results
    text = command.summary(runner.results, ["native", "triton"], CHECKS[:4])
    assert "native: crashed: exit status 7: illegal instruction" in text
    assert "triton: hung: no result for 8 s: run it again, with a larger --silence" in text
    assert len(text.splitlines()) < 60


def test_missing_cases_are_run_again(fake):
    first = processes.Runner(CHECKS[:4], 0, 60, fake / "smoke.jsonl")  # no time
    first.run(["native"])
    assert not first.results
    (fake / "smoke.jsonl").write_text(
        "".join(
            json.dumps({"kernel": "native", "case": number, "check": CHECKS[number].identity, "status": status}) + "\n"
            for number, status in enumerate(["wrong", "ok", "not covered", "crashed"])
        )
        + '{"kernel": "nat'  # its writing was cut off
    )
    second = processes.Runner(CHECKS[:5], 300, 60, fake / "smoke.jsonl")
    second.run(["native"])
    assert [second.results["native", n]["status"] for n in range(5)] == ["wrong", "ok", "not covered", "ok", "ok"]
    assert processes.recorded(fake / "smoke.jsonl") == second.results
    assert processes.verdict(second.results, "native", 5) == processes.verdict(second.results, "native", 6) == "FAILED"
    results = {("native", 0): {"status": "not covered"}, ("native", 1): {"status": "ok"}}
    assert processes.verdict(results, "native", 2) == "right"
    assert processes.verdict(results, "native", 3) == "not finished"


def test_results_of_other_cases_are_refused(tmp_path):
    """Such as those of another device, or of another version: their numbers would be taken for these cases."""
    file = tmp_path / "results.jsonl"
    runner = processes.Runner(CHECKS, 60, 15, file)
    runner.add("blocked", {"case": 0, "status": "ok"})
    assert processes.Runner(processes.checks("cpu", full=True), 60, 15, file).results == runner.results
    with pytest.raises(ValueError, match=r"results.jsonl has results of other cases, such as N=200 .*cpu"):
        processes.Runner(processes.checks("cuda:0"), 60, 15, file)
    file.write_text(json.dumps({"kernel": "blocked", "case": 0, "status": "ok"}) + "\n")
    with pytest.raises(SystemExit, match=r"error: .*results.jsonl has results of other cases.*use another file"):
        command.main(["--device", "cpu", "--backend", "blocked", "--out", str(file)])


@pytest.mark.parametrize("content", [b"5", b'{"case": 0}', b"\x89PNG\xff"])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: .*file has no results of srpkd check: use another file"):
        command.main(["--device", "cpu", "--backend", "blocked", "--out", str(file)])
    assert file.read_bytes() == content


def test_a_file_in_the_home_folder():
    assert command.parser().parse_args(["--out=~/results.jsonl"]).out == Path.home() / "results.jsonl"


@pytest.mark.parametrize("name", [".", "missing/results.jsonl"])
def test_a_file_that_cannot_be_written_is_reported_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(processes.Runner, "run", lambda *_: pytest.fail("it ran kernels whose results it cannot keep"))
    with pytest.raises(SystemExit, match=r"error: .* cannot be written: "):
        command.main(["--device", "cpu", "--backend", "blocked", "--out", str(tmp_path / name)])


def test_an_error_of_a_thread_is_raised(fake, monkeypatch):
    """Such as that of a full disk: the kernel would count as not finished, for lack of time."""

    def fail(*_):
        raise OSError("disk full")

    runner = processes.Runner(CHECKS[:4], 60, 60, fake / "smoke.jsonl")
    monkeypatch.setattr(runner, "add", fail)
    with pytest.raises(OSError, match="disk full"):
        runner.run(["native", "triton"])
    for process in runner.running:
        process.join(30)
        assert process.exitcode is not None


def works_in(folder: Path) -> bool:
    """Tell whether a process has the working directory."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if link.readlink() == folder:
                return True
    return False


@pytest.mark.core(0)
def test_an_interrupt_ends_the_processes(tmp_path):
    """At once, and without a result: neither a restart nor a crash."""
    log = tmp_path / "log"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.Popen(
        [sys.executable, fake_kernel.__file__],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        while not log.exists() or log.read_text("utf-8").count("crashed") < 2:  # case 2 hangs next
            assert done.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(done.pid, signal.SIGINT)  # as the terminal does
        assert "KeyboardInterrupt" in done.communicate(timeout=60)[1]
        end = time.monotonic() + 60
        while works_in(tmp_path):  # the server that forked them ends after the command
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)
    assert log.read_text("utf-8").count("crashed") == 2


# --- the command ----------------------------------------------------------------------------------------------------

# puts a fault into a backend of the command and of its worker processes
FAULTY = """
import os, sys
sys.path[:0] = [{tests!r}, os.path.dirname({tests!r})]
from bench_helpers import incorrect_loss
from srpkd import check
from srpkd.checking.kernels import KERNELS, Provider

def crash(case):
    os.abort()

KERNELS["blocked"] = Provider(dict(crash=crash, scaled=incorrect_loss("scaled"))[{fault!r}])
if __name__ == "__main__":
    check.main(sys.argv[1:])
"""


def test_right_backends_exit_with_status_0():
    done = subprocess.run([sys.executable, "-m", "srpkd", "check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    backends = ["reference", "blocked", "closed_form", *(["native"] if native.load_existing()[0] else [])]
    for name in backends:
        assert any(line.split()[0] == name and line.endswith("right") for line in done.stdout.splitlines() if line)
    assert "triton: not checked: it runs on NVIDIA GPUs" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("All backends that are available are right on cpu")


@pytest.mark.parametrize("fault", ["scaled", "crash"])
@pytest.mark.core(1)
def test_a_faulty_backend_is_reported_and_hides_no_other(fault: str, tmp_path: Path):
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY.format(tests=str(Path(__file__).parent), fault=fault))
    words = [sys.executable, str(program), "--device", "cpu", "--backend", "blocked", "reference"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    verdicts = {line.split()[0]: line.split()[-1] for line in lines if line.endswith(("right", "FAILED"))}
    assert verdicts == {"blocked": "FAILED", "reference": "right"}
    problem = next(line for line in lines if line.startswith("blocked: "))
    assert ("wrong: the relative error" if fault == "scaled" else "crashed: exit status -6") in problem
    assert "Do not use blocked here." in lines
    assert any("Set SRPKD_BACKEND=reference" in line for line in lines)
    assert lines[-1].startswith("FAILED on cpu. Please report it") and command.ISSUES in lines[-1]


def test_advice():
    assert command.advice([], ["native", "triton"]) == []
    others = ["triton", "blocked"]
    assert "SRPKD_CUDA_KERNEL=sm80" in command.advice(["native-sm90", "native"], ["native-sm80", *others])[1]
    assert "SRPKD_BACKEND=triton" in command.advice(["native-sm80", "native"], ["native-sm90", *others])[1]
    assert "SRPKD_BACKEND=native," in command.advice(["triton"], ["native", "blocked"])[1]
    assert command.advice(["blocked"], []) == ["Do not use blocked here."]


def test_too_little_time_is_no_failure(capsys):
    """Such as on a machine with few cores, where Triton compiles for minutes."""
    with pytest.raises(SystemExit) as caught:
        command.main(["--device", "cpu", "--backend", "blocked", "--seconds", "0"])
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert "not finished" in output and "Do not use" not in output and "FAILED" not in output
    assert output.splitlines()[-1].startswith("Not finished on cpu in 0 s: use a larger --seconds")


def test_an_extension_that_is_not_built_is_not_built_without_being_asked(monkeypatch):
    monkeypatch.setattr(native, "load_existing", lambda: (None, None))
    monkeypatch.setattr(native.build, "unavailable_reason", lambda: None)
    assert "builds it" in command.kernel_unavailable_reason("native", CHECKS, build=False)
    built = []
    monkeypatch.setattr(native, "extension", lambda: built.append(1))
    assert command.kernel_unavailable_reason("native", CHECKS, build=True) is None and built
    monkeypatch.setattr(native.build, "unavailable_reason", lambda: "no compiler")
    assert command.kernel_unavailable_reason("closed_form", CHECKS, build=False) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:7"], "--device cuda:7: expected one of cpu"),
        (["--device", "tpu"], "--device tpu: expected one of cpu"),
        (["--device", "cpu", "cpu", "--out", "results"], "--out takes the results of one device, received cpu, cpu"),
    ],
)
def test_wrong_options(arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        command.main(arguments)


def test_every_gpu_is_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.all_devices() == ["cpu", "cuda:0", "cuda:1"]
    assert command.checked_device("cuda") == "cuda:0"
    assert command.checked_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert command.all_devices() == ["cpu", "mps:0"]
    assert command.checked_device("mps") == "mps:0"


@pytest.mark.parametrize("check", [CHECKS[0], next(check for check in CHECKS if not check.case.need_grad)])
def test_results_of_a_device_without_float64_are_compared_on_the_cpu(check, monkeypatch):
    moved = []
    monkeypatch.setattr(processes, "has_float64", lambda device: False)
    monkeypatch.setattr(processes, "to_device", lambda value, device: moved.append(device) or to_device(value, device))
    assert processes.outcome("blocked", check)["status"] == "ok"
    assert moved == [torch.device("cpu")]


def test_processes_end_with_a_command_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import time
from srpkd.checking import processes

def child():
    processes.exit_with_parent()
    print("started", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    processes.CONTEXT.Process(target=child).start()
    time.sleep(600)
"""
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    parent.kill()
    output, _ = parent.communicate(timeout=60)  # the child has the same stdout: it ends when the child ends
    assert output == ""
