"""The Triton kernels on the CPU, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_interpreter.py

The interpreter replaces triton.jit in the whole process, so these tests need a separate process. It is slow: the images
are small.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import DELTA, FLAG_SETS, NARROW, RELATIONS, STRIDES, error, features, name_of, value_and_gradient
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton_scales import triton_scales

from srpkd import relation_loss
from srpkd.kernels import (
    NORMALIZATIONS,
    Relation,
    auto_backend,
    blocked,
    formulas,
    triton,
    unavailable_reason,
)
from srpkd.kernels.triton import configurations, plans, scales, tiles

CPU = torch.device("cpu")
ROW_L1 = Relation("row", "l1")
L1 = [Relation(normalize, "l1", DELTA[normalize]) for normalize in NORMALIZATIONS]
ULP = 2.0**-23  # of float32, added to bounds: the error of eager can be 0 by chance
LEAST = 1e-2  # the smallest norm that errors are relative to: some gradients are 0 up to rounding

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="TRITON_INTERPRET=1 is not set: these tests run in Triton's interpreter, in a separate process",
)


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the plans of other tests: some tests change what plans depend on."""
    monkeypatch.setattr(plans, "_plans", {})


def name(value: object) -> str | None:
    """Return the test id of a dtype or relation."""
    if isinstance(value, Relation):
        return value.normalize
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(student: Tensor, teacher: Tensor, relation: Relation) -> tuple[Tensor, Tensor]:
    """Return the loss of each image and N^2 times the gradient of their sum, which float16 can represent."""
    return value_and_gradient(student, teacher, relation, "triton", upstream=student.shape[1] ** 2)


def assert_as_accurate_as_eager(
    student: Tensor, teacher: Tensor, relation: Relation, eager: AbstractContextManager | None = None
) -> None:
    """Loss, with and without a gradient, and gradient have at most 3 times the error of eager PyTorch in that dtype.

    Eager is backend ``reference``, which computes in float32 for 16-bit features.
    """
    pixels = student.shape[1]
    loss, gradient = run(student, teacher, relation)
    forward = triton.loss_and_gradient(student, teacher, relation, need_grad=False)[0]
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", pixels**2)
    with eager or nullcontext():
        errors = [
            error(one, other, LEAST)
            for one, other in zip(value_and_gradient(student, teacher, relation, "reference", pixels**2), expected)
        ]
    assert error(loss, expected[0], LEAST) <= 3 * errors[0] + ULP
    assert error(forward, expected[0], LEAST) <= 3 * errors[0] + ULP
    assert gradient.dtype == student.dtype
    assert error(gradient, expected[1], LEAST) <= 3 * errors[1] + ULP


class CoarseProduct(torch.autograd.Function):
    """a @ b and its gradient with factors rounded to a mantissa of ``bits`` bits, as TF32 and bfloat16 on a GPU."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.bits = bits
        return _rounded(a, bits) @ _rounded(b, bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        grad = _rounded(grad, ctx.bits)
        return grad @ _rounded(b, ctx.bits).mT, _rounded(a, ctx.bits).mT @ grad, None


class CoarseProducts(TorchFunctionMode):
    """Replace every matrix product by a ``CoarseProduct``."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.matmul:
            with torch._C.DisableTorchFunction():
                return CoarseProduct.apply(*args, self.bits)
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Round float32 x to a mantissa of ``bits`` bits."""
    step = 2 ** (23 - bits)
    return ((x.contiguous().view(torch.int32) + step // 2) & -step).view(torch.float32)


def test_available_but_not_chosen_by_auto():
    assert unavailable_reason("triton", CPU) is None
    assert auto_backend(CPU, ROW_L1) != "triton"


@pytest.mark.parametrize("dtype", NARROW, ids=name)
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.core(9)
def test_error_of_every_relation(relation, dtype):
    # for "row" two row blocks, the second of them incomplete, and split columns
    pixels = 130 if relation.normalize == "row" else 70
    assert_as_accurate_as_eager(*features(relation, 1, pixels, (24, 40), dtype), relation)


@pytest.mark.parametrize("flags", FLAG_SETS, ids="-".join)
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.core(6)
def test_flags(relation, flags):
    """Two blocks of pixels, with zero-norm pixels in both networks."""
    relation = replace(relation, **dict.fromkeys(flags, True))
    student, teacher = features(relation, 1, 140, (5, 7), torch.float32, apart=1e-8)
    student[:, 3] = teacher[:, 135] = 0
    assert_as_accurate_as_eager(student, teacher, relation)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.core(1)
def test_a_rectified_nan_is_not_hidden(normalize):
    for broken in range(2):
        pair = features(None, 2, 40, (5, 7), torch.float32)
        pair[broken][1, 2, 3] = math.nan
        loss, _ = run(*pair, Relation(normalize, "l2", rectify=True))
        assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("relation", L1, ids=name)
@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
@pytest.mark.core(2)
def test_float32_follows_the_matmul_precision(precision, bits, relation, set_precision):
    """The error is at most 3 times that of eager PyTorch on a GPU, which multiplies in TF32 or bfloat16."""
    student, teacher = features(relation, 1, 70, (24, 40), torch.float32)
    set_precision(precision)
    assert configurations.number_format(torch.float32) == precision
    assert_as_accurate_as_eager(student, teacher, relation, CoarseProducts(bits))


@pytest.mark.parametrize("pixels", [2, 15, 33, 128, 129])
def test_any_number_of_pixels(pixels):
    relation = ROW_L1
    assert_as_accurate_as_eager(*features(relation, 1, pixels, (5, 7), torch.float32), relation)


# blocks of 32, 64 and 128 channels: incomplete, full, and several; for the student also U in several programs
@pytest.mark.parametrize("channels", [(2, 1), (17, 64), (65, 100), (140, 70)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=name)
@pytest.mark.core(3)
def test_any_number_of_channels(channels, dtype):
    relation = ROW_L1
    assert_as_accurate_as_eager(*features(relation, 1, 20, channels, dtype), relation)


@pytest.mark.parametrize("relation", L1[1:], ids=name)
def test_looped_channels_of_symmetric_relations(relation):
    assert_as_accurate_as_eager(*features(relation, 1, 20, (130, 260), torch.bfloat16), relation)


def test_one_pixel():
    """Its relation to itself is 1 up to rounding, for any features."""
    loss, gradient = run(*features(None, 1, 1, (5, 7), torch.float32), ROW_L1)
    assert loss.item() < 4 * ULP
    assert gradient.norm().item() < 1e-5


@pytest.fixture(scope="module")
def contiguous() -> tuple[Tensor, ...]:
    """Return features (B, C, H, W), their loss and their gradient."""
    student, teacher = (torch.rand(2, channels, 5, 7) for channels in (6, 9))
    return student, teacher, *value_and_gradient(student, teacher, ROW_L1, "triton", layout="nchw")


@pytest.mark.parametrize("make", [make for key, make in STRIDES.items() if key != "contiguous"])
@pytest.mark.core(3)
def test_strides_are_read_in_place(make, contiguous):
    """The memory between the features is NaN, so that a read outside them fails the test."""
    student, teacher, *expected = contiguous
    loss, gradient = value_and_gradient(make(student), make(teacher), ROW_L1, "triton", layout="nchw")
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.core(1)
def test_reductions(need_grad):
    """The loss is reduced in the kernels; the gradient is that of each image's own loss."""
    student, teacher = features(None, 3, 50, (24, 40), torch.bfloat16)
    losses, gradient = triton.loss_and_gradient(student, teacher, ROW_L1, need_grad)
    for reduction, expected in (("mean", losses.double().mean()), ("sum", losses.double().sum())):
        loss, same = triton.loss_and_gradient(student, teacher, ROW_L1, need_grad, reduction)
        assert loss.shape == ()
        assert error(loss, expected) < 4 * ULP
        assert (same is None and gradient is None) or torch.equal(same, gradient)


def test_two_runs_give_the_same_bits(monkeypatch):
    """Also if several programs share every sum."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 64)
    student, teacher = features(None, 1, 130, (8, 8), torch.float32)
    (loss, gradient), (again, gradient_again) = (run(student, teacher, ROW_L1) for _ in range(2))
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("slots", [1, 64])
def test_split_columns_add_up(slots, monkeypatch):
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: slots)
    relation = ROW_L1
    student, teacher = features(relation, 1, 130, (8, 8), torch.bfloat16)
    assert_as_accurate_as_eager(student, teacher, relation)
    launches = [launch for plan in plans._plans.values() for launch in plan.launches]
    place = tiles.relation_kernel.arg_names.index("column_splits")
    splits = [launch.arguments[place] for launch in launches if launch.kernel is tiles.relation_kernel]
    assert splits == [1 if slots == 1 else 2] * 2


@pytest.mark.parametrize("flags", [(), *FLAG_SETS], ids="-".join)
@pytest.mark.parametrize("relation", L1, ids=name)
@pytest.mark.core(4)
def test_relation_tiles(relation, flags):
    """The primitive with the scales of formulas.py equals that of ``blocked`` in float64."""
    relation = replace(relation, **dict.fromkeys(flags, True))
    student, teacher = features(relation, 2, 70, (24, 40), torch.float32)
    rounded = formulas.scales_of(student, teacher, relation, torch.float32)
    actual = triton.relation_tiles(student, teacher, rounded, relation, need_grad=True)
    exact = formulas.scales_of(student.double(), teacher.double(), relation, torch.float64)
    expected = blocked.relation_tiles(student.double(), teacher.double(), exact, relation, need_grad=True)
    assert actual.loss.shape == (2,)
    assert (actual.h is None) == (relation.normalize == "none" or relation.detach_norms)
    for one, other in zip(actual, expected):
        assert one is other is None or error(one, other) < 1e-6


@pytest.mark.parametrize("relation", L1[:2], ids=name)
@pytest.mark.parametrize("dtype", NARROW, ids=name)
def test_scales(relation, dtype, set_precision):
    """Scales have float32 precision for every dtype and matmul precision."""
    student, teacher = features(None, 2, 70, (24, 70), dtype)
    set_precision("medium")
    actual = triton_scales(student, teacher, relation)
    expected = formulas.scales_of(student.double(), teacher.double(), relation, torch.float64)
    for one, other in zip(actual, expected):
        assert one is other is None or error(one, other) < 3e-7


def test_forward_visits_only_tiles_on_and_above_the_diagonal():
    student, teacher = features(None, 1, 200, (8, 8), torch.float32)
    student[0, 0] = torch.nan  # in the first row block, which the second row block reads only below the diagonal
    chosen = configurations.configuration((9, 0), "highest", 8, 8)
    none, no_scales = Relation("none", "l1"), scales.PlannedScales()
    for need_grad, expected in ((True, [True, True]), (False, [True, False])):
        plan = plans.Plan(CPU)
        arrays = plan.argument(student), plan.argument(teacher)
        partials = tiles.plan_tiles(plan, *arrays, no_scales, none, chosen, need_grad)
        loss = partials.loss.of(plan.run(student, teacher))
        assert loss.view(-1, 2).isnan().any(0).tolist() == expected


def test_images_are_independent():
    student, teacher = features(None, 3, 50, (24, 40), torch.bfloat16)
    loss, gradient = run(student, teacher, ROW_L1)
    for image in range(3):
        alone = slice(image, image + 1)
        expected, expected_gradient = run(student[alone], teacher[alone], ROW_L1)
        assert torch.equal(loss[alone], expected)
        assert torch.equal(gradient[alone], expected_gradient)


@pytest.mark.parametrize("relation", L1, ids=name)
@pytest.mark.parametrize("dtype", NARROW, ids=name)
@pytest.mark.core(3)
def test_loss_and_gradient_of_equal_features_are_zero(relation, dtype):
    student, _ = features(None, 1, 40, (24, 24), dtype)
    loss, gradient = run(student, student.clone(), relation)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("relation", L1[:2], ids=name)
def test_zero_norm_pixels(relation):
    """Zero pixels in the student, the teacher or both are treated as in the reference: no gradient of 1 / eps."""
    student, teacher = features(relation, 1, 70, (24, 40), torch.float32)
    student[:, [3, 69]] = teacher[:, [7, 69]] = 0
    assert_as_accurate_as_eager(student, teacher, relation)


@pytest.mark.parametrize("relation", L1[:2], ids=name)
def test_pixels_of_norms_up_to_eps(relation):
    """They count as zero-norm pixels, although their features and Gram matrices are not 0."""
    relation = replace(relation, eps=0.1)
    student, teacher = features(None, 1, 70, (24, 40), torch.float32)
    student[:, [3, 69]] *= 1e-4
    teacher[:, [7, 69]] *= 1e-4
    assert_as_accurate_as_eager(student, teacher, relation)


def test_the_diagonal_of_cosine_is_a_tie():
    student, teacher = features(None, 1, 1, (24, 40), torch.float32)
    for one in (student, torch.zeros_like(student)):
        loss, gradient = run(one, teacher, Relation("cosine", "l2"))
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("size", [1e-3, 200.0])
@pytest.mark.parametrize("relation", L1[:2], ids=name)
def test_float16_of_any_size(relation, size):
    """K has the magnitude of 1 / sum_j G_ij^2, which is outside the range of float16."""
    student, teacher = (size * x for x in features(None, 1, 60, (24, 40), torch.float16))
    assert_as_accurate_as_eager(student, teacher, replace(relation, eps=0.0))


@pytest.mark.parametrize("size", [1e-15, 1e-9, 1e10, 1e15])
@pytest.mark.parametrize("relation", L1[:2], ids=name)
@pytest.mark.core(3)
def test_float32_of_any_size(relation, size):
    """Relations do not depend on the size of features. Squared row norms grow with its fourth power, beyond float32."""
    student, teacher = features(relation, 2, 60, (24, 70), torch.float32)
    expected = value_and_gradient(student.double(), teacher.double(), replace(relation, eps=0.0), "reference")
    # a power of two, so that rounding does not change
    size = 2.0 ** round(math.log2(size))
    loss, gradient = value_and_gradient(size * student, size * teacher, replace(relation, eps=0.0), "triton")
    assert error(loss, expected[0]) < 1e-6
    assert error(gradient.double() * size, expected[1]) < 2e-6


def test_differences_of_tiny_features_have_a_sign():
    """Without a normalisation, the l1 gradient is proportional to the size of the features, however small."""
    relation, size = Relation("none", "l1"), 2.0**-55
    student, teacher = features(relation, 1, 40, (5, 7), torch.float32)
    _, expected = run(student, teacher, relation)
    _, gradient = run(size * student, size * teacher, relation)
    assert torch.equal(gradient, size * expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about the overflow
@pytest.mark.parametrize("relation", L1[:2], ids=name)
def test_overflow_gives_nan(relation):
    """The loss is NaN if Gram matrices overflow float32."""
    student, teacher = (1e20 * x for x in features(relation, 1, 40, (5, 7), torch.float32))
    assert triton.loss_and_gradient(student, teacher, relation, need_grad=False)[0].isnan().all()


def test_a_nan_is_not_clamped():
    """Each pixel has a relation to the broken one, which the Huber distance does not bound."""
    student, teacher = features(None, 1, 40, (5, 7), torch.float32)
    student[0, 2, 3] = math.nan
    loss, gradient = run(student, teacher, Relation("none", "huber"))
    assert loss.isnan().all() and gradient.isnan().all()


def test_the_gradient_has_the_strides_of_the_features():
    for layout in (torch.contiguous_format, torch.channels_last):
        student = torch.randn(2, 6, 5, 7).to(memory_format=layout).requires_grad_()
        (gradient,) = torch.autograd.grad(relation_loss(student, torch.randn(2, 9, 5, 7), backend="triton"), student)
        assert gradient.stride() == student.stride()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("dtype", NARROW, ids=name)
def test_product_of_backward(dtype, stored):
    """Bit-equal to the product in float32, with the strides of the gradient; more elements than a program has."""
    contiguous = torch.randn(3, 70, 65).to(stored)
    for gradient in (contiguous, contiguous.mT, contiguous[:1]):
        images = gradient.shape[0]
        of_images = torch.rand(2 * images)
        for upstream in (torch.rand(()), torch.rand(()).expand(images), of_images[::2]):
            actual = triton.scaled_gradient(gradient, upstream, dtype, 1 / 3)
            assert torch.equal(actual, (gradient.float() * (upstream * (1 / 3)).view(-1, 1, 1)).to(dtype))
            assert actual.stride() == gradient.stride()


def test_products_of_backward_that_pytorch_computes():
    gradient = torch.randn(3, 7, 5)
    assert triton.scaled_gradient(gradient.transpose(0, 1), torch.rand(7), torch.float32, 1.0) is None
    assert triton.scaled_gradient(gradient[:, ::2], torch.rand(()), torch.float32, 1.0) is None
    assert triton.scaled_gradient(gradient.double(), torch.rand((), dtype=torch.float64), torch.float64, 1.0) is None
    assert triton.scaled_gradient(gradient[:0], torch.rand(()), torch.float32, 1.0) is None


def test_float64_is_an_error():
    student, teacher = features(None, 1, 10)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, received float64"):
        relation_loss(student, teacher, layout="nlc", backend="triton")
