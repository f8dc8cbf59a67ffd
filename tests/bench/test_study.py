"""The study: what it trains, what it claims, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from bench import study
from bench.study import plan, report, runs, selection
from bench.study.plan import NOTHING, SETTINGS, Study, spelled, students, teacher
from bench.study.statistics import difference
from srpkd.models.checkpoints import CheckpointError

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")

DOCS = ROOT / "docs"
TINY = {
    "synthetic_size": 16, "synthetic_pairs": 4, "synthetic_test_pairs": 2, "max_dataset_size": 2, "epoch_steps": 1, "n_epochs": 1,
    "n_epochs_decay": 0, "teacher_n_epochs": 1, "teacher_n_epochs_decay": 0, "ngf": 2, "teacher_ngf": 3, "ndf": 2,
    "n_layers_D": 1, "teacher_netG": "resnet_3blocks", "netG": "resnet_3blocks",
}  # fmt: skip


def of(folder, **options) -> Study:
    return Study(str(folder), 2, {"few pairs": 2}, 1, TINY | options)


def test_a_difference_is_student_s_t():
    ours, theirs = [3.0, 5.5, 4.0, 7.0], [2.0, 5.0, 4.5, 4.0]
    found = difference(ours, theirs)
    wanted = scipy_stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.verdict == "no difference shown"
    assert difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).verdict == "helped"
    assert difference([1.0, 1.0, 1.0], [2.0, 2.1, 1.9]).verdict == "hurt"
    assert str(difference([2.0, 4.0], [1.0, 1.0])) == "+2.00 (-10.71 to +14.71)"


def test_one_pair_shows_nothing():
    found = difference([5.0], [1.0])
    assert found.mean == 4.0 and math.isnan(found.low) and math.isnan(found.high)
    assert found.verdict == "too few pairs to say" and str(found) == "+4.00"
    with pytest.raises(ValueError):
        difference([1.0, 2.0], [1.0])


def test_options_in_words():
    assert spelled(NOTHING) == "alone"
    assert spelled(NOTHING | {"lambda_kd": 100.0}) == "kd 100"
    relation = {"lambda_kd": 0.0, "lambda_srp": 0.5, "normalize": "row", "distance": "huber", "delta": 0.03}
    assert spelled(relation) == "srp 0.5 row huber delta 0.03"
    assert spelled(relation | {"layers": {"model.9": "model.9"}}).endswith(" model.9")


def test_runs_of_a_world(tmp_path):
    plan = Study(str(tmp_path), 5, dict.fromkeys(SETTINGS, 8), 1, {})
    taught = teacher(plan, "few pairs", 3)
    assert taught == teacher(plan, "many pairs", 3), "all paired settings share a world's teacher"
    assert taught != teacher(plan, "unpaired", 3) and taught.name != teacher(plan, "unpaired", 3).name
    assert (taught.ngf, taught.max_dataset_size, taught.synthetic_variant, taught.distils) == (24, 600, 3, False)
    few, many = (
        students(plan, setting, 3, 7, 2, NOTHING | {"lambda_srp": 5.0}) for setting in ("few pairs", "many pairs")
    )
    assert (few.max_dataset_size, many.max_dataset_size) == (12, None)
    for run in (few, many):
        assert run.teacher == str(tmp_path / taught.name) and not run.variants and run.time_budget is None
        assert (run.seed, run.seeds, run.synthetic_variant, run.lambda_kd, run.lambda_srp) == (7, 2, 3, 0.0, 5.0)
    assert few.name != many.name
    assert students(plan, "few pairs", 3, 7, 2, NOTHING).teacher is None, "who learns nothing of a teacher needs none"


def test_what_is_chosen_is_judged():
    output, feature = NOTHING | {"lambda_kd": 100.0}, NOTHING | {"lambda_kd": 100.0, "lambda_feature": 30.0}
    relation = output | {"lambda_srp": 10.0, "distance": "huber", "delta": 0.03, "layers": {"a": "a"}}
    steps = [
        {"step": "output distillation", "chosen": output},
        {"step": "feature matching", "chosen": feature},
        {"step": "relation loss: form and weight", "chosen": output | {"lambda_srp": 7.0}},
        {"step": "relation loss: layers", "chosen": relation},
    ]
    variants = selection.variants_of(steps, 0.1)
    assert variants["alone"] == NOTHING and variants["output"] == pytest.approx(NOTHING | {"lambda_kd": 10.0})
    assert variants["output + SRP"] == relation | {"lambda_kd": 10.0, "lambda_srp": 1.0}, (
        "weights are scaled, delta is not"
    )
    assert variants["SRP"] == variants["output + SRP"] | {"lambda_kd": 0.0}
    assert variants["FitNet"] == NOTHING | {"lambda_feature": 3.0}


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(plan, "OUTPUT_WEIGHTS", (10.0, 100.0))
    monkeypatch.setattr(plan, "FEATURE_WEIGHTS", (30.0,))
    monkeypatch.setattr(plan, "RELATION_FORMS", (({"normalize": "row", "distance": "l2"}, (2000.0,)),))
    monkeypatch.setattr(plan, "LAYERS", ((("model.10",), (1.0, 3.0)),))


def test_a_whole_study(tmp_path, few_candidates, monkeypatch, capsys, one_thread):
    arguments = ["--runs_dir", str(tmp_path / "runs"), "--seeds", "2", "--worlds", "2", "3", "--workers", "1"]
    arguments += ["--settings", "few pairs", "unpaired", "--options", yaml.safe_dump(TINY)]
    study.main(arguments)
    first = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "study.json").read_text())
    assert (tmp_path / "runs" / "study.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "runs" / "study.md").read_text()
    assert first == f"{report}\nreport: {tmp_path / 'runs' / 'study.md'}\n"

    steps = {step["step"]: step for step in result["choice"]}
    weights = ["lambda_kd", "lambda_feature", "lambda_srp", "lambda_srp"]
    for step, candidates, weight in zip(steps.values(), (2, 1, 1, 3), weights):
        further = len(step["tried"]) - candidates
        alike = [
            o for o in (entry["options"] for entry in step["tried"]) if o | {weight: 0} == step["chosen"] | {weight: 0}
        ]
        is_largest = step["chosen"][weight] == max(options[weight] for options in alike)
        assert further == plan.EXTENSIONS if is_largest else further <= plan.EXTENSIONS
        means = [sum(entry["scores"]) for entry in step["tried"]]
        assert step["chosen"] == step["tried"][means.index(max(means))]["options"]
        assert all(len(entry["scores"]) == 2 for entry in [step["base"], *step["tried"]])
    assert steps["feature matching"]["base"]["options"] == steps["output distillation"]["chosen"]
    few, unpaired = result["judged"]
    assert "alone" in few["variants"] and unpaired["variants"].keys() == few["variants"].keys() - {"alone"}
    assert len(few["teachers"]) == 2 and not unpaired["teachers"], "a teacher has no likeness to itself"
    assert few["worlds"] == [2, 3] and unpaired["worlds"] == [2, 3, 4]
    assert all(len(variant["scores"]) == 3 for variant in unpaired["variants"].values())
    assert all(len(variant["scores"]) == 2 for variant in few["variants"].values())
    gain = difference(few["variants"]["output + SRP"]["scores"], few["variants"]["output"]["scores"])
    assert f"- output + SRP minus output: {gain}, better in " in report and f"**{gain.verdict}**" in report

    # again: nothing is trained, and the same is found
    monkeypatch.setattr(runs, "run", None)
    study.main([*arguments, "--docs", str(tmp_path / "docs")])
    assert json.loads((tmp_path / "docs" / "study.json").read_text())["judged"] == result["judged"]
    assert (tmp_path / "docs" / "study.md").is_file() and (tmp_path / "docs" / "study.png").is_file()


@pytest.mark.slow
def test_two_runs_at_a_time_give_what_one_gives(tmp_path, one_thread):
    weights = (0.0, 10.0, 100.0)
    found = []
    for workers in (1, 2):
        plan = of(tmp_path / str(workers))._replace(workers=workers)
        runs.train(plan, "few pairs", [teacher(plan, "few pairs", 1)])
        configs = [students(plan, "few pairs", 1, 0, 2, NOTHING | {"lambda_kd": weight}) for weight in weights]
        found.append(runs.train(plan, "few pairs", configs))
        assert (tmp_path / str(workers) / f"{configs[0].name}.log").read_text()
    assert found[0] == found[1] and [len(own) for own in found[0]] == [2, 2, 2]
    untaught = [students(plan, "few pairs", 2, 0, 1, NOTHING | {"lambda_kd": weight}) for weight in (1.0, 2.0)]
    with pytest.raises(CheckpointError, match=r"teacher-pix2pix-world2"):
        runs.train(plan, "few pairs", untaught)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, one_thread):
    plan = of(tmp_path / "whole")
    whole = runs.train(plan, "few pairs", [students(plan, "few pairs", 1, 0, 2, NOTHING)])
    plan = of(tmp_path / "stopped")
    run = students(plan, "few pairs", 1, 0, 2, NOTHING)
    fit = runs.train_one.__globals__["run"].__globals__["fit"]

    def stop(stage, *rest):
        if stage.name.endswith("seed 1"):
            raise KeyboardInterrupt
        return fit(stage, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("srpkd.training.pipeline.fit", stop)
        runs.train(plan, "few pairs", [run])
    assert not runs.is_finished(run)
    (Path(run.runs_dir, run.name) / "report.json").unlink(missing_ok=True)
    assert not runs.is_finished(run), "stopped before its page was written"
    assert runs.train(plan, "few pairs", [run]) == whole


def test_what_is_in_the_way_is_named(tmp_path, one_thread):
    plan = of(tmp_path)
    run = students(plan, "few pairs", 1, 0, 1, NOTHING)
    (tmp_path / run.name).mkdir()
    with pytest.raises(ValueError, match=r"alone is in the way: it is not a run .*; move it away"):
        runs.train(plan, "few pairs", [run])
    (tmp_path / run.name).rmdir()
    runs.train(plan, "few pairs", [run])
    other = students(of(tmp_path, ndf=3), "few pairs", 1, 0, 1, NOTHING)
    with pytest.raises(ValueError, match=r"of another study: ndf was 2 and is 3; take another --runs_dir"):
        runs.train(plan, "few pairs", [other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worlds", "0"], "argument --worlds: '0': expected a whole number above 0"),
        (["--worlds", "3", "4"], "--worlds: expected one number, or 3, one for each of the settings"),
        (["--options", "[1"], "is not YAML"),
        (["--options", "3"], "--options: expected options as `name: value` lines, received int"),
        (["--options", "{nfg: 3}"], "no option 'nfg'; did you mean ngf?"),
        (["--options", "{seed: 3}"], "seed cannot be given, the study sets it"),
        (["--options", "{ngf: many}"], "expected a whole number"),
        (["--settings", "fewer"], "invalid choice: 'fewer'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(["--runs_dir", str(tmp_path / "runs"), *arguments])
    said = f"{stopped.value} {capsys.readouterr().err}"
    assert stopped.value.code not in (0, None) and message in said
    assert not (tmp_path / "runs").exists()


def test_the_docs_show_what_was_found():
    result = json.loads((DOCS / "study.json").read_text())
    assert (DOCS / "study.md").read_text() == report.render(result), "write docs/study.md by srpkd study --docs docs"
    assert (DOCS / "study.png").is_file()
    assert {entry["setting"] for entry in result["judged"]} == set(SETTINGS)
