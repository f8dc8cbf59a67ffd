"""The selection of weights and layers, and the variants that follow from it."""

from __future__ import annotations

import math

import pytest

from bench.study import selection
from bench.study.plan import NO_DISTILLATION, Study, student_run

WEIGHTS = ("lambda_kd", "lambda_feature", "lambda_srp", "lambda_srp")


@pytest.fixture
def trained(monkeypatch):
    """Replace training by scores that are the best at certain options, and return what was trained."""
    runs = []

    def scores(config):
        if config.lambda_kd == 10:
            return [100.0, -1000.0]  # the mean counts
        score = -abs(math.log((config.lambda_kd or 1e-3) / 300)) + math.log(config.lambda_feature or 1)
        if config.lambda_srp:
            at_model_6 = config.layers == {"model.6": "model.6"}
            score += at_model_6 - abs(math.log(config.lambda_srp / (600 if at_model_6 else 200)))
            score += 5 * (config.normalize == "cosine") + (config.distance == "l2")
        return [score + seed for seed in range(config.seeds)]

    def train(study, setting, configs):
        runs.extend((setting, config) for config in configs)
        return [scores(config) for config in configs]

    monkeypatch.setattr(selection, "train", train)
    return runs


def test_the_best_weights_are_selected(tmp_path, trained):
    """Larger weights are tried while the largest of the kind is the best, at most three times."""
    study = Study(str(tmp_path), 2, {}, 1, {})
    steps = selection.select(study)
    output = NO_DISTILLATION | {"lambda_kd": 300.0}
    relation = output | {"normalize": "cosine", "distance": "l2", "lambda_srp": 200.0}
    layers = relation | {"lambda_srp": 600.0, "layers": {"model.6": "model.6"}}
    assert [step["chosen"] for step in steps] == [output, output | {"lambda_feature": 2700.0}, relation, layers]
    assert [step["base"]["options"] for step in steps] == [NO_DISTILLATION, output, output, output]
    weights = [[entry["options"][name] for entry in step["tried"]] for step, name in zip(steps, WEIGHTS)]
    assert weights[0] == [10.0, 30.0, 100.0, 300.0, 900.0] and weights[1] == [10.0, 30.0, 100.0, 300.0, 900.0, 2700.0]
    assert len(weights[2]) == sum(len(own) for _, own in selection.RELATION_FORMS)
    assert weights[3] == [200.0, 200.0, 200.0, 200.0, 200.0, 600.0, 200.0, 600.0, 1800.0]
    for step in steps:
        for entry in (step["base"], *step["tried"]):
            config = student_run(study, "few pairs", 1, 0, 2, entry["options"])
            assert ("few pairs", config) in trained and len(entry["scores"]) == 2


def test_selected_options_are_evaluated():
    output = NO_DISTILLATION | {"lambda_kd": 100.0}
    feature = output | {"lambda_feature": 30.0}
    relation = output | {"lambda_srp": 10.0, "distance": "huber", "delta": 0.03, "layers": {"a": "a"}}
    steps = [
        {"step": "output distillation", "chosen": output},
        {"step": "feature matching", "chosen": feature},
        {"step": "relation loss: form and weight", "chosen": output | {"lambda_srp": 7.0}},
        {"step": "relation loss: layers", "chosen": relation},
    ]
    variants = selection.variants_of(steps, 0.1)
    assert variants["alone"] == NO_DISTILLATION
    assert variants["output"] == pytest.approx(NO_DISTILLATION | {"lambda_kd": 10.0})
    scaled = relation | {"lambda_kd": 10.0, "lambda_srp": 1.0}
    assert variants["output + SRP"] == scaled, "weights are scaled, delta is not"
    assert variants["SRP"] == scaled | {"lambda_kd": 0.0}
    assert variants["FitNet"] == NO_DISTILLATION | {"lambda_feature": 3.0}
