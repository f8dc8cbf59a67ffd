"""The command ``python -m bench.smoke``."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from bench_helpers import incorrect_loss

from bench import smoke
from bench.providers import PROVIDERS, CannotRun, Provider
from srpkd.kernels import DISTANCES, NORMALIZATIONS

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKS = smoke.checks("cpu")
RANDOM = next(check for check in CHECKS if check.kind == "random" and check.case.need_grad)


def test_cases_cover_every_relation_and_format():
    cases = [check.case for check in smoke.checks("cuda")]
    assert len(set(smoke.checks("cuda"))) == 43
    assert {(case.normalize, case.distance) for case in cases} == {(n, d) for n in NORMALIZATIONS for d in DISTANCES}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.precision for case in cases if case.dtype == "float32"} == {"highest", "high", "medium"}
    assert {case.device for case in cases} == {"cuda"}


@pytest.mark.parametrize("kind", ["random", "zero norm", "tokens", "close"])
def test_a_right_kernel_passes(kind):
    [check] = [check for check in smoke.checks("cuda") if check.kind == kind][:1]
    check = check._replace(case=smoke.replace(check.case, device="cpu"))
    found = smoke.outcome("blocked", check)
    assert found["status"] == "ok" and found["reason"] == ""
    assert 0 < found["gradient"] < 0.003


@pytest.mark.parametrize("kind", ["loss", "scaled", "missing pixel", "nan"])
def test_a_wrong_kernel_fails(kind, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "blocked", Provider(incorrect_loss(kind)))
    # float32: eager PyTorch, in which the error is put, rounds matrices of 16 bits
    check = RANDOM._replace(case=smoke.replace(RANDOM.case, dtype="float32"))
    found = smoke.outcome("blocked", check)
    assert found["status"] == "wrong" and "relative error" in found["reason"]


def test_different_bits_are_found(monkeypatch):
    calls = []

    def make(case):
        exact = PROVIDERS["reference"].make(case)
        return lambda student, teacher: exact(student, teacher) * (1 + 1e-6 * len(calls.append(0) or calls))

    monkeypatch.setitem(PROVIDERS, "blocked", Provider(make))
    assert smoke.outcome("blocked", RANDOM)["status"] == "bits differ"


def test_other_outcomes(monkeypatch):
    def make_raising(error):
        def loss(student, teacher):
            raise error

        return Provider(lambda case: loss)

    monkeypatch.setitem(PROVIDERS, "blocked", make_raising(CannotRun("more than 256 channels")))
    assert smoke.outcome("blocked", RANDOM) == {"status": "not covered", "reason": "more than 256 channels"}
    monkeypatch.setitem(PROVIDERS, "blocked", make_raising(RuntimeError("an illegal\nmemory access")))
    crashed = {"status": "crashed", "reason": "RuntimeError: an illegal memory access"}
    assert smoke.outcome("blocked", RANDOM) == crashed


def test_a_single_pixel_must_be_finite():
    [check] = [check for check in smoke.checks("cuda") if check.case.pixels == 1]
    features = torch.ones(1, 1, 64), torch.ones(1, 1, 256)
    assert smoke.compare((torch.tensor(0.0), torch.zeros(1)), check, *features)[1] is None
    for result in ((torch.tensor(torch.nan), torch.zeros(1)), (torch.tensor(0.0), torch.tensor([torch.inf]))):
        assert "not finite" in smoke.compare(result, check, *features)[1]


# --- processes ------------------------------------------------------------------------------------------------------

# stands in for ``python -m bench.smoke --worker``: case 1 ends the process, case 2 never returns
FAKE = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for number in map(int, options["--cases"].split(",")):
    print(json.dumps({"case": number}), flush=True)
    if number == 1:
        print("illegal instruction", file=sys.stderr)
        os._exit(7)
    if number == 2:
        time.sleep(600)
    print(json.dumps({"case": number, "status": "ok", "reason": "", "gradient": 1e-3}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    monkeypatch.setattr(smoke, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setattr(smoke, "SHARDS", {})
    return tmp_path


def test_crashes_and_hangs_do_not_hide_other_results(fake, monkeypatch):
    monkeypatch.setattr(smoke, "SILENCE", 3.0)
    runner = smoke.Runner(fake, "cpu", 60)
    runner.run(["native", "triton"], 4)
    expected = ["ok", "crashed", "hung", "ok"]
    for kernel in ("native", "triton"):
        assert [runner.results[kernel, number]["status"] for number in range(4)] == expected
    assert "exit status 7: illegal instruction" in runner.results["native", 1]["reason"]
    assert smoke.failed(runner.results, ["native"], 4)
    assert smoke.recorded(fake / "smoke.jsonl") == runner.results
    text = smoke.summary(runner.results, ["native", "triton"], CHECKS[:4])
    assert "native: crashed: exit status 7: illegal instruction" in text and "triton: hung: no result for 3 s" in text
    assert len(text.splitlines()) < 60


def test_missing_cases_are_run_again(fake, monkeypatch):
    first = smoke.Runner(fake, "cpu", 0)  # no time
    first.run(["native"], 4)
    assert not first.results
    (fake / "smoke.jsonl").write_text(
        "".join(
            json.dumps({"kernel": "native", "case": number, "status": status}) + "\n"
            for number, status in enumerate(["wrong", "ok", "not covered", "crashed"])
        )
    )
    second = smoke.Runner(fake, "cpu", 60)
    second.run(["native"], 5)
    assert [second.results["native", n]["status"] for n in range(5)] == ["wrong", "ok", "not covered", "ok", "ok"]
    assert smoke.failed(second.results, ["native"], 5)
    assert not smoke.failed({("native", 0): {"status": "not covered"}}, ["native"], 1)
