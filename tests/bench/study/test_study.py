"""The command ``python -m bench study``."""

from __future__ import annotations

import json

import pytest
import yaml

from bench.__main__ import main
from bench.study import runs, selection
from bench.study.comparison import paired_difference

pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(selection, "OUTPUT_WEIGHTS", (10.0, 100.0))
    monkeypatch.setattr(selection, "FEATURE_WEIGHTS", (30.0,))
    monkeypatch.setattr(selection, "RELATION_FORMS", (({"normalize": "row", "distance": "l2"}, (2000.0,)),))
    monkeypatch.setattr(selection, "LAYERS", ((("model.10",), (1.0, 3.0)),))


@pytest.mark.slow
@pytest.mark.core(0)
def test_whole_study(tmp_path, tiny_options, few_candidates, monkeypatch, capsys):
    arguments = ["study", "--runs_dir", str(tmp_path / "runs"), "--seeds", "2", "--datasets", "2", "3"]
    arguments += ["--workers", "1", "--settings", "few pairs", "unpaired", "--options", yaml.safe_dump(tiny_options)]
    main(arguments)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "study.json").read_text("utf-8"))
    assert (tmp_path / "runs" / "study.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "runs" / "study.md").read_text("utf-8")
    assert printed == f"{report}\nreport: {tmp_path / 'runs' / 'study.md'}\n"
    assert result["command"].startswith(f"python -m bench study --runs_dir {tmp_path}")

    steps = {step["step"]: step for step in result["choice"]}
    weights = ["lambda_kd", "lambda_feature", "lambda_srp", "lambda_srp"]
    for step, candidates, weight in zip(steps.values(), (2, 1, 1, 3), weights):
        extensions = len(step["tried"]) - candidates
        tried = [entry["options"] for entry in step["tried"]]
        same_kind = [options for options in tried if options | {weight: 0} == step["chosen"] | {weight: 0}]
        is_largest = step["chosen"][weight] == max(options[weight] for options in same_kind)
        maximum = selection.MAX_EXTENSIONS
        assert extensions == maximum if is_largest else extensions <= maximum
        sums = [sum(entry["scores"]) for entry in step["tried"]]
        assert step["chosen"] == tried[sums.index(max(sums))]
        assert all(len(entry["scores"]) == 2 for entry in [step["base"], *step["tried"]])
    assert steps["feature matching"]["base"]["options"] == steps["output distillation"]["chosen"]
    few, unpaired = result["judged"]
    assert "alone" in few["variants"] and unpaired["variants"].keys() == few["variants"].keys() - {"alone"}
    assert len(few["teachers"]) == 2 and not unpaired["teachers"], "a teacher has no PSNR to itself"
    assert few["datasets"] == [2, 3] and unpaired["datasets"] == [2, 3, 4]
    assert all(len(variant["scores"]) == 3 for variant in unpaired["variants"].values())
    assert all(len(variant["scores"]) == 2 for variant in few["variants"].values())
    gain = paired_difference(few["variants"]["output + SRP"]["scores"], few["variants"]["output"]["scores"])
    assert f"- output + SRP minus output: {gain}, better on " in report and f"**{gain.verdict}**" in report

    # a second call trains nothing and gives the same result
    monkeypatch.setattr(runs, "run", None)
    main([*arguments, "--report", str(tmp_path / "docs")])
    assert json.loads((tmp_path / "docs" / "study.json").read_text("utf-8"))["judged"] == result["judged"]
    assert (tmp_path / "docs" / "study.md").is_file() and (tmp_path / "docs" / "study.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasets", "0"], "argument --datasets: '0': expected "),
        (["--datasets", "3", "4"], "--datasets: received 2 numbers, expected one number or 3, one per setting"),
        (["--options", "[1"], "invalid YAML"),
        (["--options", "3"], "--options: expected options as `name: value` lines, received int"),
        (["--options", "{nfg: 3}"], "option 'nfg'; did you mean ngf?"),
        (["--options", "{seed: 3}"], "--options: remove seed: the study sets it for every run"),
        (["--options", "{ngf: many}"], "--ngf many: expected "),
        (["--settings", "fewer"], "invalid choice: 'fewer'"),
    ],
)
def test_invalid_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", "--runs_dir", str(tmp_path / "runs"), *arguments])
    printed = f"{stopped.value} {capsys.readouterr().err}"
    assert stopped.value.code not in (0, None) and message in printed
    assert not (tmp_path / "runs").exists()
