"""The closed form's kernels on an NVIDIA GPU: those of csrc/cuda and those of Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import NARROW, error, value_and_gradient
from torch import Tensor

from srpkd.kernels import Relation, native, unavailable_reason

CUDA = torch.device("cuda")
RELATIONS = [Relation("cosine", "l2"), Relation("none", "l2")]
# Tensor cores round sums of up to 64 pixels or channels towards zero. As the student converges, the gradient is a
# difference of products with large factors: on an H100 its error was 6e-7 / noise.
LOSS_BOUND, GRADIENT_BOUND = 1e-6, 1e-6

pytestmark = pytest.mark.gpu
every_relation = pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.normalize)
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
Kernels = Callable[[Tensor, Tensor, Relation, bool], tuple[Tensor, Tensor | None]]


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Return the loss of each image and its gradient, as a function of student, teacher, relation and need_grad."""
    if (reason := unavailable_reason(request.param, CUDA)) is not None:
        pytest.skip(reason)
    if request.param == "native":
        return lambda *arguments: native.loss_and_gradient(*arguments, method="closed_form")
    from srpkd.kernels.triton import closed_form

    return closed_form.loss_and_gradient


def draw(
    pixels: int, channels: tuple[int, int], dtype: torch.dtype, batch: int = 1, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return random features; with noise, a student that differs from its teacher by that."""
    teacher = torch.randn(batch, pixels, channels[1], device=CUDA) + 0.5
    student = torch.randn(batch, pixels, channels[0], device=CUDA) + 0.5
    if noise:
        student = teacher + noise * torch.randn_like(teacher)
    return student.to(dtype), teacher.to(dtype)


def check(kernels: Kernels, student: Tensor, teacher: Tensor, relation: Relation, noise: float = 1.0) -> None:
    """The errors against float64 are at most 3 times those of eager PyTorch plus what tensor cores add."""
    # a scale with which eager's float16 gradient neither underflows nor overflows
    scale = 1 if relation.normalize == "none" else student.shape[1] ** 2
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", scale)
    eager = value_and_gradient(student, teacher, relation, "reference", scale)
    loss, gradient = kernels(student, teacher, relation, True)
    assert gradient is not None
    forward, _ = kernels(student, teacher, relation, False)
    assert error(forward, loss) < 2e-7  # the order of its last, float64 sum may differ
    assert error(loss, expected[0]) <= 3 * error(eager[0], expected[0]) + LOSS_BOUND + (
        1e-8 / noise if noise < 1 else 0
    )
    gradient = gradient.double() * scale
    assert error(gradient, expected[1]) <= 3 * error(eager[1], expected[1]) + GRADIENT_BOUND / noise


@pytest.mark.parametrize("channels", [(64, 256), (64, 64), (3, 5), (130, 70), (256, 256)], ids=str)
@every_dtype
@every_relation
def test_errors(kernels: Kernels, relation: Relation, dtype: torch.dtype, channels: tuple[int, int]) -> None:
    check(kernels, *draw(1000, channels, dtype, batch=2), relation)


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@every_dtype
@every_relation
def test_near_convergence(kernels: Kernels, relation: Relation, dtype: torch.dtype, noise: float) -> None:
    check(kernels, *draw(1000, (64, 64), dtype, noise=noise), relation, noise)


@every_relation
def test_equal_features_give_zero(kernels: Kernels, relation: Relation) -> None:
    _, teacher = draw(1000, (64, 64), torch.bfloat16)
    loss, gradient = kernels(teacher.clone(), teacher, relation, True)
    assert loss.item() == 0
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.parametrize("channels", [(64, 256), (64, 64)], ids=str)
def test_zero_norm_pixels(kernels: Kernels, channels: tuple[int, int]) -> None:
    student, teacher = draw(500, channels, torch.float32)
    student[:, 3:60] = teacher[:, 50:90] = 0
    check(kernels, student, teacher, RELATIONS[0])


@pytest.mark.parametrize("channels", [(64, 256), (64, 64)], ids=str)
def test_two_runs_and_a_cuda_graph_give_the_same_bits(kernels: Kernels, channels: tuple[int, int]) -> None:
    student, teacher = draw(4096, channels, torch.bfloat16, batch=3)
    first, second = (kernels(student, teacher, RELATIONS[0], True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(student, teacher, RELATIONS[0], True)
    graph.replay()
    for one, *others in zip(first, second, captured):
        assert all(torch.equal(one, other) for other in others)
