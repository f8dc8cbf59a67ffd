"""The whole relation loss of csrc/cuda, emulated on the CPU: scales, tiles, correction and the sum of the loss.

The emulation runs the plan and the sequence of kernels that csrc/cuda/operator.cpp launches, and the tests compare its
results with float64. See test_cuda_emulation.py, which tests the tiles alone.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from emulated_kernels import DEVICES, LAYOUTS, PRECISIONS, VIEWS, draw, every_layout, extent, pointer, surrounded
from helpers import FLAG_SETS, RELATIONS, error, name_of
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation
from srpkd.kernels.formulas import gradient_dtype, row_scales
from srpkd.kernels.reference import relation_loss as reference_loss

# features and precision of the products of the tiles; "medium": float32 features that the tiles read as bfloat16
CASES = {
    "bf16": (torch.bfloat16, "bf16"),
    "fp16": (torch.float16, "fp16"),
    "high": (torch.float32, "tf32"),
    "highest": (torch.float32, "tf32x3"),
    "medium": (torch.float32, "bf16"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the relative error of the gradient: K has 11 bits or 22; bfloat16 gradients have 8
TOLERANCE = {"bf16": 4e-3, "fp16": 2e-6, "high": 4e-4, "highest": 2e-6, "medium": 4e-4}
REDUCTIONS = ("mean", "sum", "none")
KERNELS = ("sm80", "sm90", "closed_form")  # of the tiles; the closed form needs none
ROW, COSINE = Relation("row", "l1"), Relation("cosine", "l1")

every_case = pytest.mark.parametrize("case", CASES)


def alternating(names: str, *values: Iterable) -> pytest.MarkDecorator:
    """Parametrise with every combination of the values, and each with one of the layouts: all of both take too long."""
    pairs = zip(itertools.product(*values), itertools.cycle(LAYOUTS))
    return pytest.mark.parametrize(f"{names}, layout", [(*chosen, layout) for chosen, layout in pairs], ids=id_of)


def id_of(value: object) -> str:
    return name_of(value) if isinstance(value, Relation) else str(value)


class Features(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("tile_data", ctypes.c_void_p),
        ("image_stride", ctypes.c_int64),
        ("line_stride", ctypes.c_int64),
        ("extent", ctypes.c_int64),
        ("channels", ctypes.c_int),
    )


class Intermediate(ctypes.Structure):
    _fields_ = (
        ("alpha", ctypes.c_void_p * 2),
        ("moment", ctypes.c_void_p),
        ("weighted", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
    )


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor | None
    alpha: Tensor  # (2, B, N): of the teacher, of the student
    moment: Tensor  # (B, C, C) of the student
    launches: int


def emulate(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    case: str,
    reduction: str = "mean",
    need_grad: bool = True,
    device: str = "sm_90",
    together: bool = False,
    seed: int = 0,
    gradient_layout: Tensor | None = None,
    kernels: str = "sm80",
) -> Result:
    """Compute the loss with the emulated kernels. The strides of the features determine the layout."""
    dtype, precision = CASES[case]
    assert student.dtype == teacher.dtype == dtype
    batch, pixels, channels = student.shape
    pixels_adjacent = student.stride(1) == 1 and student.stride(2) != 1
    features, kept = (Features * 2)(), []
    for i, x in enumerate((teacher, student)):
        assert x.stride(1 if pixels_adjacent else 2) == 1
        flat = x.as_strided((extent(x),), (1,))
        kept.append(flat.bfloat16() if case == "medium" else flat)
        line_stride = x.stride(2 if pixels_adjacent else 1)
        features[i] = Features(x.data_ptr(), kept[i].data_ptr(), x.stride(0), line_stride, len(flat), x.shape[2])
    loss = torch.full((batch,) if reduction == "none" else (), torch.nan)
    like = student if gradient_layout is None else gradient_layout
    gradient = torch.full_like(like, torch.nan, dtype=gradient_dtype(dtype)) if need_grad else None
    alpha = torch.full((2, batch, pixels), torch.nan)
    moment, weighted = torch.full((2, batch, channels, channels), torch.nan)
    size = torch.full((batch, 2), torch.nan)
    intermediate = Intermediate(
        (ctypes.c_void_p * 2)(alpha[0].data_ptr(), alpha[1].data_ptr()), moment.data_ptr(), weighted.data_ptr(),
        size.data_ptr(),
    )  # fmt: skip
    message = library.relation_loss(
        KERNELS.index(kernels), DTYPES.index(dtype), PRECISIONS.index(precision), pixels_adjacent, features, batch,
        pixels,
        NORMALIZATIONS.index(relation.normalize), DISTANCES.index(relation.distance), ctypes.c_double(relation.delta),
        ctypes.c_double(relation.eps), relation.rectify, relation.detach_norms,
        REDUCTIONS.index(reduction), need_grad, (ctypes.c_int * 4)(*DEVICES[device]), together,
        ctypes.c_uint64(seed), pointer(loss), pointer(gradient),
        (ctypes.c_int64 * 3)(*like.stride()), ctypes.byref(intermediate), launches := (ctypes.c_int * 1)(),
    )  # fmt: skip
    assert message == b"", message.decode()
    return Result(loss, gradient, alpha, moment * size[:, 1, None, None] ** 2, launches[0])


def expected_of(student: Tensor, teacher: Tensor, relation: Relation, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of autograd in float64."""
    student = student.double().requires_grad_()
    losses = reference_loss(student, teacher.double(), relation)
    loss = losses if reduction == "none" else getattr(losses, reduction)()
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def check(
    library: ctypes.CDLL, student: Tensor, teacher: Tensor, relation: Relation, case: str, reduction="mean", **options
) -> Result:
    result = emulate(library, student, teacher, relation, case, reduction, **options)
    loss, gradient = expected_of(student, teacher, relation, reduction)
    assert error(result.loss, loss) < 1e-6
    if result.gradient is not None:
        assert result.gradient.dtype == gradient_dtype(student.dtype)
        assert error(result.gradient, gradient) < TOLERANCE[case]
    return result


def launches_of(relation: Relation, need_grad: bool = True, device: str = "sm_90") -> int:
    """Return the number of kernels, without the product in backward.

    The weighted moment has two, or one in a call that fills the GPU, as those here do except on "sm_90". With constant
    norms it has none.
    """
    weighted = 0 if relation.detach_norms or not need_grad else 2 if device == "sm_90" else 1
    return {"row": 5 + weighted, "cosine": 3, "none": 2}[relation.normalize]


# --- the whole loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@every_layout
@every_case
@pytest.mark.core(24)
def test_every_relation(library: ctypes.CDLL, case: str, layout: str, relation: Relation) -> None:
    for device in ("sm_90", "busy"):
        result = check(library, *draw(CASES[case][0], 2, 75, (5, 7), layout), relation, case, device=device)
        assert result.launches == launches_of(relation, device=device)


@pytest.mark.parametrize("flags", FLAG_SETS, ids="-".join)
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.parametrize("case", ["bf16", "highest"])
@pytest.mark.core(12)
def test_flags(library: ctypes.CDLL, case: str, relation: Relation, flags: tuple[str, ...]) -> None:
    student, teacher = draw(CASES[case][0], 2, 75, (5, 7))
    student[:, 3] = teacher[:, 70] = 0
    relation = replace(relation, **dict.fromkeys(flags, True))
    result = check(library, student, teacher, relation, case)
    assert result.launches == launches_of(relation)


# with the tiles for Hopper, K has 8 bits, 11 bits or 22
SM90_TOLERANCE = {"bf16": 4e-3, "fp16": 3e-4, "high": 3e-4, "highest": 2e-6, "medium": 2e-3}


def check_sm90(library: ctypes.CDLL, features: tuple[Tensor, Tensor], relation: Relation, case: str, **options) -> None:
    result = emulate(library, *features, relation, case, kernels="sm90", **options)
    loss, gradient = expected_of(*features, relation, "mean")
    assert error(result.loss, loss) < 2e-6
    if result.gradient is not None:
        assert error(result.gradient, gradient) < SM90_TOLERANCE[case]
        assert result.launches == launches_of(relation, device=options.get("device", "sm_90"))


@pytest.mark.parametrize("relation", RELATIONS[:6], ids=name_of)
@pytest.mark.parametrize("case", ["bf16", "highest"])
@pytest.mark.core(3)
def test_sm90_tiles_with_constant_norms(library: ctypes.CDLL, case: str, relation: Relation) -> None:
    features = draw(CASES[case][0], 2, 150, (5, 7))
    check_sm90(library, features, replace(relation, detach_norms=True), case, seed=1)


@alternating("case, relation", SM90_TOLERANCE, RELATIONS)
@pytest.mark.core(8)
def test_sm90_tiles(library: ctypes.CDLL, case: str, layout: str, relation: Relation) -> None:
    """The same launches, and the gradient from sums in another order."""
    check_sm90(library, draw(CASES[case][0], 2, 150, (5, 7), layout), relation, case, seed=1)


@pytest.mark.slow
@alternating("case, channels", SM90_TOLERANCE, [(64, 70), (70, 8), (3, 5)])
@pytest.mark.core(2)
def test_sm90_tiles_of_many_blocks(library: ctypes.CDLL, case: str, layout: str, channels: tuple[int, int]) -> None:
    for relation in (ROW, COSINE):
        check_sm90(library, draw(CASES[case][0], 1, 300, channels, layout), relation, case)
    check_sm90(library, draw(CASES[case][0], 1, 300, channels, layout), ROW, case, need_grad=False)


@alternating(
    "kernels, device, case, relation",
    KERNELS[:2], ("sm_90", "part"), SM90_TOLERANCE, [ROW, COSINE, Relation("none", "l1")],
)  # fmt: skip
@pytest.mark.core(8)
def test_blocks_of_pixels_and_channels(
    library: ctypes.CDLL, kernels: str, device: str, case: str, layout: str, relation: Relation
) -> None:
    """Several images, and blocks of channels and of pixels, which are larger in a call that fills the GPU ("part")."""
    features = draw(CASES[case][0], 2, 200, (70, 20), layout)
    if kernels == "sm90":
        check_sm90(library, features, relation, case, device=device, seed=1)
    else:
        check(library, *features, relation, case, device=device)


@pytest.mark.parametrize("case", ["fp16", "high", "highest"])
def test_sm90_zero_norm_pixels_have_no_gradient(library: ctypes.CDLL, case: str) -> None:
    """The tiles compute a tiny K for them, which the gradient kernel ignores."""
    student, teacher = draw(CASES[case][0], 2, 140, (9, 10))
    student[:, 3:5] = student[1] = 0
    gradient = emulate(library, student, teacher, COSINE, case, kernels="sm90").gradient
    assert gradient is not None and (gradient[:, 3:5] == 0).all() and (gradient[1] == 0).all()


@pytest.mark.slow
@alternating("case, pixels", CASES, [1, 3, 33, 64, 65, 200, 257])
@pytest.mark.core(8)
def test_any_number_of_pixels(library: ctypes.CDLL, case: str, layout: str, pixels: int) -> None:
    for relation in (ROW, COSINE) if pixels > 1 else (Relation("none", "l2"),):
        check(library, *draw(CASES[case][0], 1, pixels, (5, 4), layout), relation, case)


@pytest.mark.slow
@alternating("case, channels", CASES, [(1, 1), (3, 33), (33, 3), (64, 65), (65, 130), (200, 64), (257, 8)])
@pytest.mark.core(8)
def test_any_number_of_channels(library: ctypes.CDLL, case: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(CASES[case][0], 1, 20, channels, layout)
    if layout == "nchw" and channels == (1, 1):  # with one channel both layouts are the same
        student, teacher = (x.as_strided(x.shape, (20, 1, 20)) for x in (student, teacher))
    # with one channel the relations of row and cosine are signs: their exact gradient is 0
    for relation in (ROW, COSINE) if channels != (1, 1) else (Relation("none", "l2"),):
        check(library, student, teacher, relation, case)


@pytest.mark.parametrize("relation", [ROW, COSINE, Relation("none", "huber")], ids=lambda r: r.normalize)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(library: ctypes.CDLL, reduction: str, relation: Relation) -> None:
    features = draw(torch.float32, 3, 70, (6, 5))
    check(library, *features, relation, "highest", reduction)
    only_loss = check(library, *features, relation, "highest", reduction, need_grad=False)
    assert only_loss.launches == launches_of(relation, need_grad=False)


def test_all_ranges_of_pixels_are_added(library: ctypes.CDLL) -> None:
    """As many as there can be, where the last thread block adds those of the weighted moment."""
    check(library, *draw(torch.float32, 1, 1601, (4, 4)), ROW, "highest", device="eight")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["bf16", "highest"])
@pytest.mark.core(2)
def test_plans_for_several_devices(library: ctypes.CDLL, case: str, device: str) -> None:
    """The plan fits into shared memory, with features that stay there and features that do not."""
    for pixels, channels in ((130, (70, 300)), (20, (10, 600))):
        check(library, *draw(CASES[case][0], 1, pixels, channels, "nchw"), ROW, case, device=device)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@every_case
def test_zero_norm_pixels(library: ctypes.CDLL, case: str, normalize: str) -> None:
    student, teacher = draw(CASES[case][0], 2, 70, (9, 10))
    student[:, 3:5] = teacher[:, 4:6] = student[:, 66] = student[1] = 0
    result = check(library, student, teacher, Relation(normalize, "l1"), case)
    assert normalize != "cosine" or (result.gradient[:, [3, 4, 66]] == 0).all()
    if normalize != "none":
        assert (result.alpha[1][:, [3, 4, 66]] == 0).all() and (result.alpha[0][:, [4, 5]] == 0).all()


@pytest.mark.parametrize("normalize", ["row", "cosine"])
@every_layout
@every_case
@pytest.mark.core(5)
def test_equal_features_give_exactly_zero(library: ctypes.CDLL, case: str, layout: str, normalize: str) -> None:
    student, _ = draw(CASES[case][0], 1, 90, (70, 1), layout)
    result = emulate(library, student, student.clone(), Relation(normalize, "l1"), case)
    assert result.loss == 0 and (result.gradient == 0).all()


@every_case
def test_nan_and_infinity_propagate(library: ctypes.CDLL, case: str) -> None:
    student, teacher = draw(CASES[case][0], 1, 40, (5, 6))
    relations = ROW, COSINE, Relation("none", "l1"), Relation("none", "huber")
    for relation, broken in itertools.product(relations, (student, teacher)):
        before = broken[0, 3, 2].item()
        for value in (math.nan, math.inf):
            broken[0, 3, 2] = value
            result = emulate(library, student, teacher, relation, case)
            assert not result.loss.isfinite()
            assert broken is teacher or not result.gradient.isfinite().all()  # sign(NaN) is 0
            if value is math.nan and relation == Relation("none", "huber"):
                assert not result.gradient.isfinite().any()  # each pixel has a relation to the broken one
        broken[0, 3, 2] = before


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(64, 100), (70, 40)], ids=str)
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.parametrize("case", ["bf16", "fp16", "highest"])
@pytest.mark.core(12)
def test_error_is_as_small_as_that_of_eager(
    library: ctypes.CDLL, case: str, relation: Relation, channels: tuple[int, int]
) -> None:
    """Errors against float64 are at most three times those of eager autograd, on features after a ReLU."""
    student, teacher = (torch.randn(1, c, 100).relu().to(CASES[case][0]).mT for c in channels)
    student[:, 7] = 0

    def eager(student: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        loss = reference_loss(student, teacher.to(student.dtype), relation).mean()
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    (exact_loss, exact), (eager_loss, expected) = eager(student.double()), eager(student)
    result = emulate(library, student, teacher, relation, case)
    assert error(result.gradient, exact) < 3 * error(expected, exact) + 1e-7
    assert error(result.loss, exact_loss) < 3 * error(eager_loss, exact_loss) + 5e-7


def alpha_of(features: Tensor) -> Tensor:
    return row_scales(features, ROW, torch.float64)[0]


@pytest.mark.parametrize("case", ["bf16", "highest"])
def test_networks_of_different_magnitude(library: ctypes.CDLL, case: str) -> None:
    student, teacher = draw(CASES[case][0], 2, 75, (5, 7))
    for relation in (ROW, COSINE):
        check(library, 64 * student, teacher / 64, relation, case)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("case", ["bf16", "highest"])
@every_layout
def test_extreme_magnitudes(library: ctypes.CDLL, layout: str, case: str, magnitude: float) -> None:
    """Squares of squares of features would overflow or underflow."""
    student, teacher = draw(torch.float32, 1, 70, (6, 7), layout)
    student, teacher = ((x * magnitude).to(CASES[case][0]) for x in (student, teacher))
    for relation in (Relation("row", "l1", eps=0), Relation("cosine", "l1", eps=0)):
        result = emulate(library, student, teacher, relation, case)
        loss, _ = expected_of(student, teacher, relation, "mean")
        # the gradient is 1 / magnitude times that of features of ordinary size, which a float holds
        _, gradient = expected_of(student.double() / magnitude, teacher.double() / magnitude, relation, "mean")
        assert error(result.loss, loss) < 1e-6
        # at 1e18, K of row is near the smallest normal number: its second term loses bits
        assert error(result.gradient.double() * magnitude, gradient) < max(TOLERANCE[case], 3e-4)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("mean", [1, 100])
@every_layout
@pytest.mark.parametrize("case", ["bf16", "fp16", "highest"])
@pytest.mark.core(4)
def test_pixels_without_the_common_mean_keep_their_digits(
    library: ctypes.CDLL, case: str, layout: str, mean: float, outliers: bool
) -> None:
    """Computed as q^T M q, their row norms would be small differences of large sums."""
    student, teacher = (torch.randn(1, 300, c) + mean for c in (8, 70))
    for x in (student, teacher):
        x[:, :: 10 if outliers else 299] -= mean
    student, teacher = (x.to(CASES[case][0]) for x in (student, teacher))
    if layout == "nchw":
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    result = emulate(library, student, teacher, ROW, case, need_grad=False)
    for alpha, features in zip(result.alpha, (teacher, student)):
        eager = row_scales(features, ROW, torch.float32)[0]
        exact = alpha_of(features)
        worst = ((alpha - exact) / exact).abs().max()
        assert worst < 3 * ((eager - exact) / exact).abs().max() + 5e-7


@every_case
@pytest.mark.core(2)
def test_moment(library: ctypes.CDLL, case: str) -> None:
    """M of features with a mean, over several ranges of pixels and blocks of channels."""
    student, teacher = draw(CASES[case][0], 1, 500, (100, 4), "nchw")
    student[..., 3] += 50
    result = emulate(library, student, teacher, ROW, case)
    assert error(result.moment, student.double().mT @ student.double()) < 2e-7
    assert error(result.moment[..., 4:, 4:], (student.double().mT @ student.double())[..., 4:, 4:]) < 2e-7


# --- memory and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", [ROW, COSINE], ids=lambda r: r.normalize)
@pytest.mark.parametrize("view", VIEWS)
@every_layout
@pytest.mark.parametrize("case", ["bf16", "fp16", "highest"])
@pytest.mark.core(12)
def test_views_are_read_in_place(library: ctypes.CDLL, case: str, layout: str, view: str, relation: Relation) -> None:
    """NaN surrounds the views, so that a read out of bounds changes the result."""
    index, adjacent = VIEWS[view]
    sizes = (66, (adjacent, adjacent)) if layout == "nlc" else (adjacent, (10, 7))
    student, teacher = (surrounded(x, layout, index) for x in draw(CASES[case][0], 2, *sizes))
    check(library, student, teacher, relation, case, gradient_layout=torch.empty_like(student))


@pytest.mark.parametrize("case", ["bf16", "highest"])
def test_gradient_in_the_other_layout(library: ctypes.CDLL, case: str) -> None:
    """The strides of the gradient may differ from those of the features that the kernels read."""
    student, teacher = draw(CASES[case][0], 2, 70, (9, 10))
    for relation in (ROW, COSINE):
        check(library, student, teacher, relation, case, gradient_layout=student.mT.contiguous().mT)


@alternating("case", CASES)
@pytest.mark.core(1)
def test_deterministic(library: ctypes.CDLL, case: str, layout: str) -> None:
    """Results are bit-identical in any order of blocks and threads."""
    student, teacher = draw(CASES[case][0], 2, 200, (70, 20), layout)
    for relation in (ROW, COSINE):
        first, *others = (emulate(library, student, teacher, relation, case, seed=seed) for seed in range(3))
        for other in others:
            assert torch.equal(first.loss, other.loss) and torch.equal(first.gradient, other.gradient)
            assert torch.equal(first.alpha, other.alpha)
