"""Features that are more than 2^31 elements apart: offsets do not fit into 32 bits."""

from __future__ import annotations

import pytest
import torch
from helpers import dtypes, error, far_apart, features, few_cases, value_and_gradient

from srpkd.kernels import Relation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dim", range(3), ids=["images", "pixels", "channels"])
@pytest.mark.parametrize(("backend", "relation"), few_cases())
def test_strides_beyond_32_bits(backend: str, relation: Relation, dim: int, device: torch.device) -> None:
    """The results are those of the same features close together."""
    if device.type != "cpu":
        pytest.skip("no memory for what is between; the tests of the GPU backends have one such case")
    for dtype in dtypes(backend, device):
        student, teacher = features(relation, batch=2, pixels=20, channels=(18, 17), dtype=dtype)
        expected = value_and_gradient(student, teacher, relation, backend)
        actual = value_and_gradient(far_apart(student, dim), far_apart(teacher, dim), relation, backend)
        for one, other in zip(actual, expected):
            assert error(one, other) < 100 * torch.finfo(dtype).eps
