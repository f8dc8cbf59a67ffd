"""The benchmarks: what they count, refuse, write and draw. How fast anything is decides nothing here."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers import options as loss_options
from torch import Tensor

from bench import cases, gate, measure, plot, providers, relation, results, scaling, table, train
from bench.__main__ import main
from bench.cases import Case, features
from bench.providers import PROVIDERS, CannotRun, Provider, evaluate
from srpkd import relation_loss
from srpkd.kernels import BACKENDS, DISTANCES, NORMALIZATIONS, Relation, auto_backend, dispatch, native

SMALL = Case(pixels=40, channels=(5, 7), batch=2, dtype="float64")


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


# --- cases ------------------------------------------------------------------------------------------------------------


def test_a_sweep_has_every_case_once_and_flags_replace_its_axes():
    full = cases.sweep("full", "cpu", {})
    assert len(full) == len(set(full))
    assert {case.pixels for case in full} == set(cases.PIXELS)
    assert {(case.normalize, case.distance) for case in full} == {(n, d) for n in NORMALIZATIONS for d in DISTANCES}
    assert {case.precision for case in full} == {"highest"}
    assert {case.precision for case in cases.sweep("full", "cuda", {})} == set(cases.PRECISIONS)
    one = cases.sweep("full", "cpu", {"pixels": (7,), "channels": ((2, 3),), "normalize": ("none",)})
    assert {(case.pixels, case.channels, case.normalize) for case in one} == {(7, (2, 3), "none")}


def test_the_fewest_operations_are_counted():
    pixels, (student, teacher) = 8, (3, 5)
    case = Case(pixels=pixels, channels=(student, teacher), batch=2)
    gram = 2 * pixels**2 * (student + teacher) // 2  # a symmetric matrix: half of it
    assert case.operations == 2 * (gram + 2 * pixels**2 * student)
    assert Case(pixels=pixels, channels=(student, teacher), batch=2, mode="forward").operations == 2 * gram
    assert case.bytes_moved == 2 * pixels * (student + teacher + student) * 4
    assert Case(distance="l2").operations < Case().operations / 10


@pytest.mark.parametrize("arguments", [["--pixels", "0"], ["--device", "tpu"], ["--threads", "-1"]])
def test_impossible_cases_are_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*expected"):
        run("relation", "--out", tmp_path / "out.csv", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["64", "64/", "a/b", "0/4"])
def test_channels_are_a_pair(text):
    with pytest.raises(argparse.ArgumentTypeError, match="64/256"):
        cases._channels(text)


# --- peers and the gate -----------------------------------------------------------------------------------------------


def all_relations() -> list[Relation]:
    return [Relation(normalize, distance) for normalize in NORMALIZATIONS for distance in DISTANCES]


@pytest.mark.parametrize("relation", all_relations(), ids=lambda relation: f"{relation.normalize}-{relation.distance}")
def test_peers_and_truth_compute_the_relation_loss(relation, monkeypatch):
    monkeypatch.setattr(providers.peers, "MIN_ROWS", 7)
    monkeypatch.setitem(providers.peers.STRIP_ELEMENTS, "cpu", 1)  # strips of 7 rows, the last of 5
    case = Case(40, (5, 7), 2, "float64", normalize=relation.normalize, distance=relation.distance)
    student, teacher = features(case)
    expected = evaluate(
        lambda s, t: relation_loss(s, t, layout="nlc", backend="reference", **loss_options(case.relation)),
        student, teacher, case,
    )  # fmt: skip
    results = [evaluate(PROVIDERS[name].make(case), student, teacher, case) for name in ("eager", "chunked", "blocked")]
    for loss, gradient in [*results, gate.float64_result(student, teacher, case)]:
        torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-8, atol=1e-12)


def spoilt(kind: str):
    """The eager loss with something wrong in it."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student: Tensor) -> Tensor:
            return student.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            if kind == "forgotten pixel":
                gradient[0, -1] = 0
            elif kind == "nan":
                gradient[0, 0, 0] = torch.nan
            elif kind == "scaled":
                gradient *= 1.1
            return gradient

    def make(case: Case):
        eager = PROVIDERS["eager"].make(case)
        return lambda student, teacher: eager(Spoil.apply(student), teacher) * (1.01 if kind == "loss" else 1)

    return make


@pytest.mark.parametrize("kind", ["loss", "scaled", "forgotten pixel", "nan"])
def test_the_gate_stops_what_is_wrong(kind):
    case = Case(pixels=1024, channels=(8, 8), dtype="float32")
    student, teacher = features(case)
    expected = gate.float64_result(student, teacher, case)
    found = gate.measure_errors(spoilt(kind)(case), case, student, teacher, expected)
    assert gate.failure_reason(found, case) is not None
    found = gate.measure_errors(spoilt("nothing")(case), case, student, teacher, expected)
    assert gate.failure_reason(found, case) is None


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_backends_pass_the_gate(name, dtype):
    case = Case(pixels=200, channels=(8, 16), dtype=dtype)
    student, teacher = features(case)
    found = gate.measure_errors(
        PROVIDERS[name].make(case), case, student, teacher, gate.float64_result(student, teacher, case)
    )
    assert gate.failure_reason(found, case) is None


# --- a measurement ----------------------------------------------------------------------------------------------------


def raises(error: Exception):
    def make(case: Case):
        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            raise error

        return loss

    return make


def test_every_provider_is_a_row_and_only_right_ones_have_numbers(monkeypatch):
    extra = {
        "wrong": Provider(spoilt("scaled")),
        "broken": Provider(raises(RuntimeError("no such kernel"))),
        "unsuited": Provider(raises(CannotRun("nothing to do"))),
        "missing": Provider(raises(AssertionError), lambda case: "it is not installed"),
        "huge": Provider(raises(AssertionError("it was tried")), matrices=lambda case: 10**12),
        "greedy": Provider(raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))),
    }
    for name, provider in extra.items():
        monkeypatch.setitem(PROVIDERS, name, provider)
    names = ["eager", "compile", "blocked", *extra]
    monkeypatch.setitem(PROVIDERS, "compile", PROVIDERS["eager"])  # compiling takes long
    rows = {row["provider"]: row for row in relation.measure_case(SMALL, names, budget=0.05, memory=False)}
    assert list(rows) == names
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "ok", "compile": "ok", "blocked": "ok", "wrong": "wrong", "broken": "failed", "unsuited": "skipped",
        "missing": "skipped", "huge": "out of memory", "greedy": "out of memory",
    }  # fmt: skip
    for row in rows.values():
        timed = [row[name] for name in ("median_s", "p20_s", "p80_s", "times_faster_than_eager", "percent_of_roofline")]
        assert all(value > 0 for value in timed) if row["status"] == "ok" else timed == [None] * 5
        assert row["reason"] or row["status"] == "ok"
        assert len({tuple(row)} | {tuple(rows["eager"])}) == 1
    assert rows["eager"]["times_faster_than_eager"] == 1
    assert rows["huge"]["needed_bytes"] == 10**12 * SMALL.matrix_bytes
    assert rows["wrong"]["gradient_error"] == pytest.approx(0.1)
    assert "no such kernel" in rows["broken"]["reason"]
    for row in rows.values():
        assert relation.describe(row).startswith(row["provider"])


def test_providers_take_turns():
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = measure.interleaved(functions, dict.fromkeys("abc", 1.0), "cpu", budget=0)
    assert "".join(order) == "abcbcacab"
    assert {len(values) for values in samples.values()} == {measure.ROUNDS[0]}
    assert measure.ratio([1.0, 2.0, 100.0], [2.0, 6.0, 100.0]) == 2.0
    assert measure.ratio([4.0], [2.0, 1.0, 3.0]) == 0.5
    assert measure.quantiles([3.0, 1.0, 2.0]) == pytest.approx({"median_s": 2.0, "p20_s": 1.4, "p80_s": 2.6})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory")
def test_peak_memory_is_that_of_the_matrices():
    case = Case(pixels=1024, channels=(8, 8))
    predicted = PROVIDERS["eager"].bytes_needed(case)
    assert predicted == 6 * 1024**2 * 4
    assert 0.95 * predicted <= measure.peak_on_cpu("eager", case) <= 1.3 * predicted
    # blocked holds strips of a fixed size beside the gradient
    assert measure.peak_on_cpu("blocked", Case(pixels=4096, channels=(8, 8))) < 0.5 * 4096**2 * 4


def test_the_command_line_writes_rows_once(tmp_path, capsys):
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
    run(*arguments, "--minutes", 0, "--device", "cpu")
    assert "2 of 2 cases are left" in capsys.readouterr().out


def test_training_steps_are_timed(tmp_path):
    out = tmp_path / "train.csv"
    small = ["--size", 32, "--netG", "resnet_1blocks", "--ngf", 2, "--teacher-ngf", 3, "--budget", 0.1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "auto_backend", lambda device, relation: "blocked")
        speedups = ["--speedups", "channels_last", "bf16"]
        run("train", "--model", "pix2pix", "--device", "cpu", "--out", out, *small, *speedups)
    rows = {row["variant"]: row for row in results.read(out)}
    faster = ["auto: blocked, channels_last", "auto: blocked, bf16"]
    default = "auto, the trainer's cosine l2"
    measured = ["without relation loss", "reference", "auto: blocked", default, *faster, "teacher's own training"]
    assert list(rows) == measured
    assert all(float(row["median_s"]) > 0 for row in rows.values())
    assert [name for name in rows if rows[name]["srp_percent_of_step"]] == ["reference", "auto: blocked", default]
    assert [name for name in rows if rows[name]["times_faster_than_auto"]] == faster


def test_accuracy_writes_errors_and_a_picture(tmp_path):
    run("accuracy", "--pixels", 24, "--channels", 4, "--device", "cpu", "--out", tmp_path / "accuracy.csv")
    rows = results.read(tmp_path / "accuracy.csv")
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {"eager", "blocked"} <= {row["provider"] for row in rows}
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_auto_chunker_needs_no_other_and_never_holds_the_matrices(tmp_path):
    if (reason := PROVIDERS["auto_chunker"].unavailable_reason(Case())) is not None:
        pytest.skip(reason)
    out = tmp_path / "relation.csv"
    arguments = ["--pixels", "48", "--channels", "4/6", "--providers", "auto_chunker", "--no-memory", "--out", str(out)]
    # in a process that compiled nothing before
    done = subprocess.run([sys.executable, "-m", "bench", "relation", "--device", "cpu", *arguments], cwd=ROOT)
    assert done.returncode == 0
    [row] = results.read(out)
    assert row["status"] == "skipped" and row["reason"].startswith("the auto chunker finds nothing to chunk: ")


def test_pytest_benchmark_runs_the_same_cases():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", "-n0", "-k", "256-forward-blocked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


# --- what becomes of results ------------------------------------------------------------------------------------------


def test_rows_are_upserted_by_key(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    assert results.read(path) == []
    results.upsert(path, [{"a": 1, "b": None}, {"a": 2, "b": 0.12345678}], ["a"])
    results.upsert(path, [{"a": 1, "b": "x, y", "c": True}, {"a": 3, "b": 0}], ["a"])
    assert results.read(path) == [
        {"a": "1", "b": "x, y", "c": "True"}, {"a": "2", "b": "0.123457", "c": ""}, {"a": "3", "b": "0", "c": ""},
    ]  # fmt: skip
    assert [results.number(row, "b") for row in results.read(path)[1:]] == [0.123457, 0.0]
    assert results.number({"a": ""}, "a") is None
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.csv"]


def made_up(device_type: str = "cpu", **fixed) -> list[dict]:
    """Rows as the benchmark writes them, of times that grow as N^2."""
    rows = []
    for pixels in (1024, 2048, 4096):
        case = Case(pixels=pixels, threads=2, **fixed)
        trials = {
            name: relation.Trial("ok", samples=[seconds * pixels**2] * 3, found=gate.Errors(1e-7, 1e-6, 1e-6))
            for name, seconds in (("eager", 4e-8), ("compile", 2e-8), ("native", 5e-9))
        }
        trials["chunked"] = relation.Trial("out of memory", "needs more")
        trials["keops"] = relation.Trial("skipped", "not installed")
        for name in trials:
            peak = {"eager": 6 * case.matrix_bytes, "native": 1000 * pixels}.get(name)
            row = relation.as_row(name, case, trials, peak, relation.machine.PeakRates(1e12, 1e11))
            rows.append(row | {"device": f"some {device_type}", "device_type": device_type})
    return rows


@pytest.fixture
def recorded(tmp_path) -> Path:
    path = tmp_path / "relation.csv"
    results.upsert(path, made_up(), relation.KEY)
    return path


def test_exponents(recorded, capsys):
    found = {(fit.row["provider"], fit.measure): fit.exponent for fit in scaling.fits(results.read(recorded))}
    expected = {("eager", "time"): 2, ("native", "time"): 2, ("eager", "memory"): 2, ("native", "memory"): 1}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    run("scaling", "--csv", recorded)
    assert "N^2.00   over N = 1024, 2048, 4096" in capsys.readouterr().out


def test_pictures(recorded, capsys):
    run("plot", "--csv", recorded)
    (picture,) = recorded.parent.glob("*.png")
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(plot.STYLES) == set(PROVIDERS)


def made_up_training() -> list[dict[str, object]]:
    common = {
        "model": "cycle_gan", "student": "resnet_9blocks 16", "teacher": "resnet_9blocks 64", "size": 256, "batch": 1,
        "threads": 2, "torch": "2.14", "commit": "abc",
    }  # fmt: skip
    variants = {"without relation loss": (2.0, None), "auto: native": (2.5, 20.0)}
    return [
        common
        | {"device": device, "variant": variant, "median_s": s, "steps_per_s": 1 / s, "srp_percent_of_step": share}
        for device in ("some cpu", "some cuda")
        for variant, (s, share) in variants.items()
    ]


def test_the_table_of_training(tmp_path):
    results.upsert(tmp_path / "train.csv", made_up_training(), train.KEY)
    text = table.train_table(results.read(tmp_path / "train.csv"))
    assert text.count("| auto: native | 2.50 | 0.400 | 20.0 | – |") == 2
    assert text.count("| without relation loss | 2.00 | 0.500 | – | – |") == 2
    assert text.index("some cpu, 2 threads; cycle_gan, resnet_9blocks 64 to resnet_9blocks 16, 256 x 256 pixels") == 0
    assert table.train_table([]) == ""


@pytest.mark.parametrize("command", ["plot", "scaling", "table"])
def test_nothing_recorded_is_said(command, tmp_path):
    with pytest.raises(SystemExit, match="python -m bench relation"):
        run(command, "--csv", tmp_path / "none.csv")


def test_the_table_goes_into_the_readme(recorded, tmp_path, capsys):
    results.upsert(recorded, made_up("cuda", dtype="bfloat16"), relation.KEY)
    training = tmp_path / "train.csv"
    results.upsert(training, made_up_training(), train.KEY)
    run("table", "--csv", recorded, "--train-csv", training)
    text = capsys.readouterr().out.strip()
    assert text == table.tables(results.read(recorded), results.read(training))
    assert text.startswith(table.table(results.read(recorded)))
    assert text.endswith(table.train_table(results.read(training)))
    assert "some cpu, 2 threads" in text and "some cuda;" in text
    assert "| N = 4,096, C = 64/256, float32, row l1 | eager | 671.09 | 1.00 | 0.50 |" in text
    assert "|  | native | 83.89 | 8.00 | 4.00 | 4.1 |" in text
    assert "out of memory" in text and "keops" not in text
    readme = tmp_path / "README.md"
    readme.write_text("# a\n<!-- bench table: begin (by hand) -->\nold\n<!-- bench table: end -->\nb\n")
    run("table", "--csv", recorded, "--train-csv", training, "--readme", readme)
    assert table.block(readme) == text
    assert readme.read_text().startswith("# a\n<!-- bench table: begin (by hand) -->\n")
    assert readme.read_text().endswith("<!-- bench table: end -->\nb\n")
    readme.write_text("# a\n")
    with pytest.raises(SystemExit, match="expected the markers"):
        run("table", "--csv", recorded, "--readme", readme)


def test_the_gpu_check_says_how_it_is_called(tmp_path):
    script = ROOT / "bench" / "gpu_check.sh"
    for arguments in ([], [tmp_path, "--only", "nothing"], [tmp_path, "tests"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert done.returncode != 0 and "usage: bench/gpu_check.sh" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_part_of_the_tests_is_run_by_one_process(monkeypatch):
    from conftest import pytest_collection_modifyitems as keep_part

    parts = []
    for number in range(3):
        monkeypatch.setenv("SRPKD_TEST_PART", f"{number}/3")
        items = list(range(10))
        keep_part(items)
        assert len(items) in (3, 4)
        parts += items
    assert sorted(parts) == list(range(10))
    monkeypatch.delenv("SRPKD_TEST_PART")
    keep_part(items := [1, 2])
    assert items == [1, 2]


# --- the recorded results of this repository --------------------------------------------------------------------------

RECORDED = results.read(relation.RESULTS)
needs_results = pytest.mark.skipif(not RECORDED, reason=f"nothing is recorded in {relation.RESULTS.name} yet")


def test_the_readme_shows_the_recorded_results():
    shown = table.block(ROOT / "README.md")
    assert shown == table.tables(RECORDED, results.read(train.RESULTS)), "run python -m bench table --readme README.md"


@needs_results
def test_auto_chooses_well_for_every_recorded_shape(monkeypatch):
    """At most 1.3 times the time of the best recorded backend, those available that were recorded.

    By times taken side by side with eager's, where that was recorded: seconds alone are noisy. The reference is left
    out: it holds N x N arrays, which is what auto is there to avoid.
    """
    groups: dict[tuple[str, ...], dict[str, results.Row]] = {}
    for row in RECORDED:
        if row["status"] == "ok" and row["provider"] in BACKENDS and row["provider"] != "reference":
            groups.setdefault(tuple(row[name] for name in relation.KEY[1:]), {})[row["provider"]] = row
    slow = []
    for key, rows in groups.items():
        monkeypatch.setattr(
            dispatch, "unavailable_reason", lambda name, device, rows=rows: None if name in rows else "absent"
        )
        monkeypatch.setattr(native, "is_built", lambda device, rows=rows: "native" in rows)
        some = next(iter(rows.values()))
        choice = auto_backend(
            torch.device(some["device_type"]),
            Relation(some["normalize"], some["distance"]),
            getattr(torch, some["dtype"]),
            int(some["pixels"]),
            cases._channels(some["channels"]),
        )
        speed = {
            name: results.number(row, "times_faster_than_eager") or 1 / results.number(row, "median_s")
            for name, row in rows.items()
        }
        best = max(speed, key=speed.get)
        if choice in rows and 1.3 * speed[choice] < speed[best]:
            slow.append(f"{choice} instead of {best}: {dict(zip(relation.KEY[1:], key))}")
    assert not slow, "\n".join(slow)


@needs_results
def test_recorded_memory_is_linear_in_pixels():
    ours = [
        fit
        for fit in scaling.fits(RECORDED)
        if (fit.measure, fit.axis) == ("memory", "pixels") and fit.row["provider"] in providers.OURS
    ]
    assert all(fit.exponent < 1.25 for fit in ours), [(fit.row["provider"], fit.exponent, fit.points) for fit in ours]
