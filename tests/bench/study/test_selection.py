"""The selection of weights and layers, and the variants that follow from it."""

from __future__ import annotations

import pytest

from bench.study import selection
from bench.study.plan import NO_DISTILLATION


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
