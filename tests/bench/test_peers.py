"""The peers, and the float64 results to which all providers are compared."""

from __future__ import annotations

import pytest
import torch
from helpers import RELATIONS, name_of
from helpers import options as loss_options

from bench.providers import PROVIDERS
from srpkd import relation_loss
from srpkd.checking import gate
from srpkd.checking.cases import Case, features
from srpkd.checking.kernels import evaluate


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
def test_peers_and_float64_result_compute_the_relation_loss(relation, monkeypatch):
    monkeypatch.setattr(gate, "MIN_ROWS", 7)
    monkeypatch.setitem(gate.STRIP_ELEMENTS, "cpu", 1)  # strips of 7 rows; the last has 5
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
