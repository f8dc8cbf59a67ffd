"""The configurations of the study's runs."""

from __future__ import annotations

from bench.study.plan import NO_DISTILLATION, SETTINGS, Study, describe_options, student_run, teacher_run


def test_describe_options():
    assert describe_options(NO_DISTILLATION) == "no distillation"
    assert describe_options(NO_DISTILLATION | {"lambda_kd": 100.0}) == "kd 100"
    relation = {"lambda_kd": 0.0, "lambda_srp": 0.5, "normalize": "row", "distance": "huber", "delta": 0.03}
    assert describe_options(relation) == "srp 0.5 row huber delta 0.03"
    assert describe_options(relation | {"layers": {"model.9": "model.9"}}).endswith(" model.9")


def test_runs_of_a_data_set(tmp_path):
    study = Study(str(tmp_path), 5, dict.fromkeys(SETTINGS, 8), 1, {})
    teacher = teacher_run(study, "few pairs", 3)
    assert teacher == teacher_run(study, "many pairs", 3), "all paired settings share the teacher of a data set"
    unpaired_teacher = teacher_run(study, "unpaired", 3)
    assert teacher != unpaired_teacher and teacher.name != unpaired_teacher.name
    assert (teacher.ngf, teacher.max_dataset_size, teacher.synthetic_variant, teacher.distils) == (24, 600, 3, False)
    few, many = (
        student_run(study, setting, 3, 7, 2, NO_DISTILLATION | {"lambda_srp": 5.0})
        for setting in ("few pairs", "many pairs")
    )
    assert (few.max_dataset_size, many.max_dataset_size) == (12, None)
    for run in (few, many):
        assert run.teacher == str(tmp_path / teacher.name) and not run.variants and run.time_budget is None
        assert (run.seed, run.seeds, run.synthetic_variant, run.lambda_kd, run.lambda_srp) == (7, 2, 3, 0.0, 5.0)
    assert few.name != many.name
    undistilled = student_run(study, "few pairs", 3, 7, 2, NO_DISTILLATION)
    assert undistilled.teacher is None, "a student without distillation needs no teacher"
