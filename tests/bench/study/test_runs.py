"""Training, resuming and reusing the study's runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.study import runs
from bench.study.plan import NO_DISTILLATION, student_run, teacher_run
from srpkd.models.checkpoints import CheckpointError
from srpkd.training import pipeline


@pytest.mark.slow
@pytest.mark.core(0)
def test_two_workers_give_the_scores_of_one(tmp_path, tiny_study):
    weights = (0.0, 10.0, 100.0)
    found = []
    for workers in (1, 2):
        study = tiny_study(tmp_path / str(workers), workers)
        runs.train(study, "few pairs", [teacher_run(study, "few pairs", 1)])
        configs = [
            student_run(study, "few pairs", 1, 0, 2, NO_DISTILLATION | {"lambda_kd": weight}) for weight in weights
        ]
        found.append(runs.train(study, "few pairs", configs))
        assert (tmp_path / str(workers) / f"{configs[0].name}.log").read_text("utf-8")
    assert found[0] == found[1] and [len(scores) for scores in found[0]] == [2, 2, 2]
    without_teacher = [
        student_run(study, "few pairs", 2, 0, 1, NO_DISTILLATION | {"lambda_kd": weight}) for weight in (1.0, 2.0)
    ]
    with pytest.raises(CheckpointError, match=r"teacher-pix2pix-dataset2"):
        runs.train(study, "few pairs", without_teacher)


def test_resumed_run_ends_as_an_uninterrupted_one(tmp_path, tiny_study, monkeypatch):
    study = tiny_study(tmp_path / "uninterrupted")
    expected = runs.train(study, "few pairs", [student_run(study, "few pairs", 1, 0, 2, NO_DISTILLATION)])
    study = tiny_study(tmp_path / "stopped")
    run = student_run(study, "few pairs", 1, 0, 2, NO_DISTILLATION)
    fit = pipeline.fit

    def stop_at_seed_1(stage, *rest):
        if stage.name.endswith("seed 1"):
            raise KeyboardInterrupt
        return fit(stage, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "fit", stop_at_seed_1)
        runs.train(study, "few pairs", [run])
    assert not runs.is_finished(run)
    (Path(run.runs_dir, run.name) / "report.json").unlink(missing_ok=True)
    assert not runs.is_finished(run), "stopped before it wrote its page"
    assert runs.train(study, "few pairs", [run]) == expected


def test_folder_with_other_contents_is_an_error(tmp_path, tiny_study):
    study = tiny_study(tmp_path)
    run = student_run(study, "few pairs", 1, 0, 1, NO_DISTILLATION)
    (tmp_path / run.name).mkdir()
    with pytest.raises(ValueError, match=r"distillation is not a run that can be resumed: move or remove this folder"):
        runs.train(study, "few pairs", [run])
    (tmp_path / run.name).rmdir()
    runs.train(study, "few pairs", [run])
    other = student_run(tiny_study(tmp_path, ndf=3), "few pairs", 1, 0, 1, NO_DISTILLATION)
    with pytest.raises(ValueError, match=r"belongs to another study: ndf was 2 and is 3; choose another --runs_dir"):
        runs.train(study, "few pairs", [other])
