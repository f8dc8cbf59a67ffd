"""Backends in PyTorch compute the images of a batch in groups on a CPU: what they store should stay in the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srpkd.kernels import Relation, TileSums, blocked, closed_form, dispatch

BACKENDS = {"blocked": blocked, "closed_form": closed_form}


@pytest.mark.parametrize(("at_once", "groups"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (None, [5])])
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_the_results_of_the_batch(
    backend: str, need_grad: bool, at_once: int | None, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BACKENDS[backend]
    # float16, whose gradient is float32
    student, teacher = torch.randn(5, 3, 7).half().mT, torch.randn(5, 4, 7).half().mT
    relation = Relation("row", "l2")
    loss, gradient = dispatch.compute_loss(student, teacher, relation, backend, need_grad)
    tiles, found = module.relation_tiles, []

    def record(student: Tensor, *others: object) -> TileSums:
        found.append(len(student))
        return tiles(student, *others)

    monkeypatch.setattr(module, "relation_tiles", record)
    monkeypatch.setattr(module, "images_at_once", lambda student, teacher: at_once)
    loss_of_groups, gradient_of_groups = dispatch.compute_loss(student, teacher, relation, backend, need_grad)
    assert found == groups
    torch.testing.assert_close(loss_of_groups, loss)
    torch.testing.assert_close(gradient_of_groups, gradient)
    if need_grad:
        assert gradient_of_groups.stride() == gradient.stride() == student.stride()


@pytest.mark.parametrize(
    ("backend", "pixels", "expected"),
    [("blocked", 4096, 2), ("blocked", 65536, 1), ("closed_form", 256, 6), ("closed_form", 4096, 1)],
)
def test_fewer_images_at_once_if_they_are_large(backend: str, pixels: int, expected: int) -> None:
    student, teacher = torch.empty(16, pixels, 64), torch.empty(16, pixels, 256)
    assert BACKENDS[backend].images_at_once(student, teacher) == expected
    on_other_device = (features.to("meta") for features in (student, teacher))
    assert BACKENDS[backend].images_at_once(*on_other_device) is None
