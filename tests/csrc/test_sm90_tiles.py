"""The tiles for Hopper (csrc/cuda/sm90), emulated on the CPU, against the float64 primitive.

The emulation schedules warps and asynchronous work from a seed, and reports races; see test_hopper_emulation.py. The
kernel runs as on a GPU with a few multiprocessors.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from emulated_kernels import LAYOUTS, PRECISIONS, draw, every_layout, extent, pointer, surrounded
from helpers import RELATIONS, error, name_of
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, Scales, TileSums
from srpkd.kernels.blocked import relation_tiles as blocked_tiles
from srpkd.kernels.formulas import scales_of

# tf32: one float16 term of float32 features; tf32x3: two
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32x3": torch.float32}
# the error of U relative to float64 if G is exact: K is rounded to 8 bits, 11 bits, or two terms of 11 bits
TOLERANCE = {"bf16": 2e-3, "fp16": 3e-4, "tf32": 3e-4, "tf32x3": 1e-6}
ROW, COSINE = Relation("row", "l1"), Relation("cosine", "l1")
# layouts and channels: TMA reads lines of a multiple of 8 elements with 16 bits in place; others are copied
IN_PLACE_AND_COPIED = ("nlc", (5, 7)), ("nlc", (8, 72)), ("nchw", (5, 7))
SEEDS = range(1, 10)  # every order of the warps with every delay of asynchronous work

every_precision = pytest.mark.parametrize("precision", DTYPES)


class Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("images", "pixels", "student_channels", "teacher_channels")),
        *((name, ctypes.c_int) for name in ("precision", "grad", "normalize", "distance")),
        ("delta", ctypes.c_float),
    )


class Features(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("bytes", ctypes.c_int64),
        ("element_bytes", ctypes.c_int),
    )


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    result = compile_emulation("sm90_library.cpp", "sm90_kernels.cpp")
    result.relation_tiles.restype = result.uncovered.restype = ctypes.c_char_p
    return result


def emulate(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    scales: Scales,
    relation: Relation,
    precision: str,
    need_grad: bool = True,
    multiprocessors: int = 2,
    seed: int = 1,
) -> TileSums:
    """Compute the primitive with the emulated kernel."""
    batch, pixels, channels = student.shape
    problem = Problem(
        *(batch, pixels, channels, teacher.shape[2], PRECISIONS.index(precision), need_grad),
        *(NORMALIZATIONS.index(relation.normalize), DISTANCES.index(relation.distance), relation.delta),
    )
    features, kept = [], []
    for x, alpha in ((student, scales.student), (teacher, scales.teacher)):
        kept.append(None if alpha is None else alpha.float().contiguous())
        strides, size = (ctypes.c_int64 * 3)(*x.stride()), x.element_size()
        features.append(Features(x.data_ptr(), pointer(kept[-1]), strides, extent(x) * size, size))
    loss = torch.full((batch,), torch.nan, dtype=torch.float64)
    U = torch.full((batch, pixels, channels), torch.nan) if need_grad else None
    h = torch.full((batch, pixels), torch.nan) if need_grad and relation.normalize != "none" else None
    message = library.relation_tiles(
        ctypes.byref(problem), ctypes.byref(features[0]), ctypes.byref(features[1]), multiprocessors,
        ctypes.c_uint64(seed), pointer(loss), pointer(U), pointer(h),
    )  # fmt: skip
    assert message == b"", message.decode()
    return TileSums(loss, U, h)


def check(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    precision: str,
    scales: Scales | None = None,
    **options,
) -> TileSums:
    """Compare with the float64 primitive, computed with the same scales."""
    scales = scales or scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision, **options)
    exact = Scales(*(None if x is None else x.double() for x in scales))
    expected = blocked_tiles(student.double(), teacher.double(), exact, relation, tiles.U is not None)
    assert error(tiles.loss, expected.loss) < 1e-6
    if tiles.U is not None:
        assert error(tiles.U, expected.U) < TOLERANCE[precision]
    if tiles.h is not None:
        assert error(tiles.h, expected.h) < 2e-6
    return tiles


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@every_precision
@pytest.mark.core(9)
def test_every_relation(library: ctypes.CDLL, precision: str, relation: Relation) -> None:
    for layout, channels in IN_PLACE_AND_COPIED:
        check(library, *draw(DTYPES[precision], 1, 200, channels, layout), relation, precision)


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [1, 8, 127, 128, 129, 385])
@every_precision
@pytest.mark.core(5)
def test_any_number_of_pixels(library: ctypes.CDLL, precision: str, pixels: int) -> None:
    relation = ROW if pixels > 1 else Relation("none", "l1")  # normalised, a single pixel has D = 1 - 1 = 0
    for layout in LAYOUTS:
        check(library, *draw(DTYPES[precision], 2, pixels, (3, 4), layout), relation, precision, multiprocessors=3)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(1, 1), (8, 65), (64, 256), (65, 33), (130, 70), (256, 8), (8, 1024)], ids=str)
@every_precision
@pytest.mark.core(6)
def test_any_number_of_channels(library: ctypes.CDLL, precision: str, channels: tuple[int, int]) -> None:
    """Features that do not fit into shared memory pass through the ring."""
    for layout in LAYOUTS:
        check(library, *draw(DTYPES[precision], 1, 136, channels, layout), ROW, precision)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@every_precision
def test_forward_only(library: ctypes.CDLL, precision: str, normalize: str) -> None:
    for distance, (layout, channels) in itertools.product(("l1", "huber"), IN_PLACE_AND_COPIED):
        features = draw(DTYPES[precision], 1, 300, channels, layout)
        check(library, *features, Relation(normalize, distance), precision, need_grad=False)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@every_precision
def test_zero_norm_pixels(library: ctypes.CDLL, precision: str, normalize: str) -> None:
    student, teacher = draw(DTYPES[precision], 3, 140, (9, 10), "nchw")
    student[0, 3:5] = teacher[0, 4:6] = student[0, 136] = 0
    student[1] = teacher[2] = 0
    tiles = check(library, student, teacher, Relation(normalize, "l1"), precision)
    if tiles.h is not None:
        assert (tiles.h[0, [3, 4, 136]] == 0).all() and (tiles.h[1] == 0).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [8, 200])
@every_precision
@pytest.mark.core(4)
def test_equal_features_give_exactly_zero(library: ctypes.CDLL, precision: str, channels: int, normalize: str) -> None:
    student, _ = draw(DTYPES[precision], 1, 136, (channels, 1), "nchw")
    relation = Relation(normalize, "l1")
    scales = scales_of(student, student, relation, torch.float32)
    tiles = emulate(library, student, student.clone(), scales, relation, precision)
    assert (tiles.loss == 0).all() and (tiles.U == 0).all()


@every_precision
def test_extreme_magnitudes(library: ctypes.CDLL, precision: str) -> None:
    """Signs are right for any difference, and K, which is scaled for float16, neither overflows nor underflows."""
    for magnitude in (2.0**-12, 2.0**10) if precision == "fp16" else (2.0**-56, 2.0**50):
        student, teacher = (x * magnitude for x in draw(DTYPES[precision], 1, 140, (6, 6), "nchw"))
        for normalize in NORMALIZATIONS:
            check(library, student, teacher, Relation(normalize, "l1"), precision)


@every_layout
@every_precision
@pytest.mark.core(2)
def test_views_are_read_in_place_or_copied(library: ctypes.CDLL, precision: str, layout: str) -> None:
    """NaN surrounds the views. TMA cannot read those that are misaligned."""
    every = slice(None)
    for index in ((slice(1, None, 2), every, every), (every, slice(1, None, 2), every), (every, every, slice(1, None))):
        student, teacher = (surrounded(x, layout, index) for x in draw(DTYPES[precision], 2, 136, (10, 7), "nlc"))
        check(library, student, teacher, ROW, precision)


@every_layout
@pytest.mark.parametrize(
    ("precision", "relation", "expected"),
    [
        ("bf16", COSINE, 0), ("fp16", ROW, 0), ("fp16", COSINE, 2), ("fp16", Relation("none", "huber"), 0),
        ("fp16", Relation("none", "huber", delta=2.0), 2), ("fp16", Relation("none", "l2"), 2), ("tf32", ROW, 2),
    ],
)  # fmt: skip
def test_which_networks_are_copied(
    library: ctypes.CDLL, precision: str, relation: Relation, expected: int, layout: str
) -> None:
    check(library, *draw(DTYPES[precision], 1, 136, (8, 8), layout), relation, precision)
    assert library.copied() == expected, "features that TMA can read in place are only copied to be divided by units"


# --- features in units: powers of two by which pixels are divided -----------------------------------------------------

in_units = pytest.mark.parametrize("precision", ["fp16", "tf32", "tf32x3"])


def errors_of_image(found: TileSums, expected: TileSums, image: int) -> list[float]:
    """Return the errors of one pixel's U, at worst, of U, of the loss and of h, if there is one."""
    used = expected.U[image].norm(dim=-1) > 0
    U, exact = found.U[image, used].double(), expected.U[image, used]
    of_pixels = (U - exact).norm(dim=-1) / exact.norm(dim=-1)
    sums = [(found.loss, expected.loss)] + ([] if found.h is None else [(found.h, expected.h)])
    return [of_pixels.max().item(), error(U, exact), *(error(x[image], y[image]) for x, y in sums)]


def check_in_units(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    precision: str,
    scales: Scales | None = None,
) -> None:
    """Errors are at most three times those of float32 arithmetic plus four units, for U of each image and pixel.

    A unit is that of K: 2^-23 if it has two terms, 2^-12 if it has one. The gradient kernel ignores U of zero-norm
    pixels with cosine.
    """
    unit = 2.0**-23 if precision == "tf32x3" else 2.0**-12
    scales = scales or scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision)
    eager = blocked_tiles(student.float(), teacher.float(), scales, relation, True)
    exact = Scales(*(None if x is None else x.double() for x in scales))
    expected = blocked_tiles(student.double(), teacher.double(), exact, relation, True)
    least = 4 * unit, 4 * unit, 2**-22, 2**-22
    for image in range(len(student)):
        found = errors_of_image(tiles, expected, image)
        limits = [3 * x + y for x, y in zip(errors_of_image(eager, expected, image), least)]
        assert all(x < limit for x, limit in zip(found, limits)), f"image {image}: errors {found}, limits {limits}"


def draw_for(precision: str, pixels: int = 200, channels: tuple[int, int] = (20, 70)) -> tuple[Tensor, Tensor]:
    """Return features with no more bits than their terms: with more, one term would only be as accurate as TF32."""
    values = torch.float32 if precision == "tf32x3" else torch.bfloat16
    return draw(DTYPES[precision], 1, pixels, channels, "nchw", values)


def powers_of_two(least: int, most: int, pixels: int = 200) -> Tensor:
    return 2.0 ** torch.randint(least, most + 1, (1, pixels, 1))


def in_range(exponent: int, precision: str) -> float:
    """Return a power of two, with an eighth of the exponent for float16."""
    return 2.0 ** (exponent // 8 if precision == "fp16" else exponent)


@in_units
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.core(5)
def test_features_are_as_accurate_as_eager(library: ctypes.CDLL, relation: Relation, precision: str) -> None:
    check_in_units(library, *draw_for(precision, 300), relation, precision)


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
def test_one_term_is_as_accurate_as_tf32(library: ctypes.CDLL, relation: Relation) -> None:
    """Errors are about those of rounding the features to 11 bits, and K, which alone makes one of 2^-12."""
    student, teacher = draw_for("tf32x3", 300)
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, "tf32")

    def tf32(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    exact = Scales(*(None if x is None else x.double() for x in scales))
    expected = blocked_tiles(student.double(), teacher.double(), exact, relation, True)
    rounded = blocked_tiles(tf32(student), tf32(teacher), exact, relation, True)
    assert error(tiles.loss, expected.loss) < 1.5 * error(rounded.loss, expected.loss) + 1e-6
    assert error(tiles.U, expected.U) < 1.5 * error(rounded.U, expected.U) + 2**-12


@in_units
@pytest.mark.parametrize("relation", RELATIONS[:6], ids=name_of)
@pytest.mark.core(6)
def test_pixels_of_any_magnitude(library: ctypes.CDLL, relation: Relation, precision: str) -> None:
    """A normalised relation does not depend on the pixels' norms, nor does its accuracy.

    The exception is row with one term, where K of float16 needs a limit.
    """
    most = 11 if relation.normalize == "row" and precision == "tf32" else 20
    pixels = powers_of_two(-16, 3) if precision == "fp16" else powers_of_two(-most, most)
    student, teacher = (x * pixels.to(x.dtype) for x in draw_for(precision))
    check_in_units(library, student, teacher, relation, precision)


@in_units
def test_outliers_without_normalisation(library: ctypes.CDLL, precision: str) -> None:
    """K in float16 has room for products that are much larger than the others."""
    student, teacher = draw_for(precision)
    student[:, 7], teacher[:, 9] = 128 * student[:, 7], 128 * teacher[:, 9]
    for distance in ("l1", "l2"):
        scales = scales_of(student, teacher, relation := Relation("none", distance), torch.float32)
        tiles = emulate(library, student, teacher, scales, relation, precision)
        expected = blocked_tiles(student.double(), teacher.double(), scales, relation, True)
        assert error(tiles.loss, expected.loss) < 2e-6
        limit = 2e-5 if precision == "tf32x3" else 2e-3
        assert ((tiles.U - expected.U).norm(dim=-1) < limit * expected.U.norm(dim=-1)).all()


@in_units
@pytest.mark.parametrize(("normalize", "eps"), [("row", 100.0), ("cosine", 5.0)])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_zero_norm_pixels_that_have_features(
    library: ctypes.CDLL, distance: str, normalize: str, eps: float, precision: str
) -> None:
    """With a large eps, many pixels have relation 0 but still contribute to the rows of others."""
    student, teacher = draw_for(precision, channels=(20, 24))
    relation = Relation(normalize, distance, eps=eps)
    for features in (student, student * powers_of_two(-10, 10).to(student.dtype)):
        scales = scales_of(features, teacher, relation, torch.float32)
        assert 0.1 < (scales.student == 0).double().mean() < 0.9 and (scales.teacher == 0).any()
        check_in_units(library, features, teacher, relation, precision, scales)


@in_units
@pytest.mark.parametrize("normalize", ["row", "cosine"])
@pytest.mark.parametrize("exponents", [(-56, 50), (50, -56), (-60, -60)], ids=str)
def test_networks_of_any_magnitude(
    library: ctypes.CDLL, exponents: tuple[int, int], normalize: str, precision: str
) -> None:
    student, teacher = (x * in_range(exponent, precision) for x, exponent in zip(draw_for(precision), exponents))
    relation = Relation(normalize, "l1", eps=0.0)
    exact = scales_of(student.double(), teacher.double(), relation, torch.float64)
    scales = Scales(*(None if x is None else x.float() for x in exact))
    check_in_units(library, student, teacher, relation, precision, scales)


@in_units
@pytest.mark.parametrize("exponent", [-33, -30, 27])
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_any_magnitude_without_normalisation(
    library: ctypes.CDLL, distance: str, exponent: int, precision: str
) -> None:
    """K, which is in proportion to a square of the features here, is in the range of float16."""
    magnitude = in_range(exponent, precision)
    student, teacher = (x * magnitude for x in draw_for(precision))
    relation = Relation("none", distance, delta=3 * magnitude**2)
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision)
    expected = blocked_tiles(student.double(), teacher.double(), scales, relation, True)
    if magnitude > 2.0**-33:  # there the squares are denormal
        assert error(tiles.loss / magnitude**4, expected.loss / magnitude**4) < 2e-6
    assert error(tiles.U.double() / magnitude**3, expected.U / magnitude**3) < 2 * TOLERANCE[precision]


@in_units
@pytest.mark.parametrize(("channels", "magnitudes"), [(63, (1, 1)), (64, (1, 1)), (63, (128, 1)), (63, (1, 128))])
def test_the_largest_weights(
    library: ctypes.CDLL, channels: int, magnitudes: tuple[float, float], precision: str
) -> None:
    """All products are the largest that units allow; those of some pairs have opposite signs in the two networks."""
    student = torch.full((1, 140, channels), 1.9921875 * magnitudes[0], dtype=DTYPES[precision])
    signs = 1 - 2.0 * (torch.arange(140) % 3 == 0)[:, None]
    teacher = student * (signs * magnitudes[1] / magnitudes[0]).to(student.dtype)
    check_in_units(library, student, teacher, Relation("none", "l2"), precision)


@in_units
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_images_of_any_magnitude(library: ctypes.CDLL, normalize: str, precision: str) -> None:
    """Each image has its own units and its own scale of K."""
    student, teacher = (x.expand(3, -1, -1) for x in draw_for(precision))
    magnitudes = torch.tensor([in_range(exponent, precision) for exponent in (0, -24, 24)]).to(student.dtype)
    student, teacher = (x.mT.mul(magnitudes[:, None, None]).mT for x in (student, teacher))
    relation = Relation(normalize, "l2", eps=0.0)
    check_in_units(library, student, teacher, relation, precision)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_denormal_features(library: ctypes.CDLL, precision: str) -> None:
    """Their products are 0 in float32, yet their differences have signs."""
    student, teacher = (x * 2.0**-130 for x in draw_for(precision))
    relation = Relation("none", "l1")
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision)
    expected = blocked_tiles(student.double(), teacher.double(), scales, relation, True)
    assert error(tiles.loss * 2.0**260, expected.loss * 2.0**260) < 1e-6
    assert error(tiles.U.double() * 2.0**130, expected.U * 2.0**130) < TOLERANCE[precision]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@in_units
@pytest.mark.core(4)
def test_features_that_are_not_finite(library: ctypes.CDLL, normalize: str, value: float, precision: str) -> None:
    student, teacher = draw_for(precision, 140)
    for features in (student, teacher):
        kept, features[0, 7, 3] = features[0, 7, 3].clone(), value
        for need_grad in (True, False):
            relation = Relation(normalize, "l2")
            scales = scales_of(student, teacher, relation, torch.float32)
            loss = emulate(library, student, teacher, scales, relation, precision, need_grad).loss
            assert loss.isnan()
        features[0, 7, 3] = kept


@every_precision
def test_a_nan_is_not_clamped(library: ctypes.CDLL, precision: str) -> None:
    """Each pixel has a relation to the broken one, which the Huber distance does not bound."""
    student, teacher = draw(DTYPES[precision], 1, 140, (20, 70))
    student[0, 7, 3] = math.nan
    relation = Relation("none", "huber")
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision)
    assert tiles.loss.isnan().all() and not tiles.U.isfinite().any()


# the fields of Problem
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ((1, 2**19, 256, 1024, 0, 1, 0, 0, 1), ""),
        ((1, 2**19 + 1, 8, 8, 0, 1, 0, 0, 1), "more than 2^19 pixels"),
        ((2**16, 8, 8, 8, 0, 1, 0, 0, 1), "more than 2^16 images"),
        ((2**15, 8, 65, 8, 0, 1, 0, 0, 1), "more than 2^16 images"),  # for each 64 channels of U
        ((1, 8, 257, 8, 0, 1, 0, 0, 1), "a student with more than 256 channels"),
        ((1, 8, 8, 1025, 0, 1, 0, 0, 1), "a teacher with more than 1024 channels"),
    ],
)
def test_which_problems_are_covered(library: ctypes.CDLL, problem: tuple[float, ...], reason: str) -> None:
    message = library.uncovered(ctypes.byref(Problem(*problem)), 132).decode()
    assert reason in message and bool(reason) == bool(message)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 7, 40])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 8, 66])
def test_work_is_divided_among_thread_blocks(library: ctypes.CDLL, blocks: int, images: int) -> None:
    """Each pair of blocks is visited once, each segment has its own part, and additions have an order."""
    groups = set()
    for multiprocessors in (1, 2, 5, 132):
        problem = images, blocks * 128 - 1, multiprocessors
        library.walk(*problem, sizes := (ctypes.c_int * 4)(), None, None, None)
        visits = torch.zeros(images, blocks, blocks, dtype=torch.int32)
        segments = torch.zeros(images, blocks, sizes[3], dtype=torch.int32)
        order = torch.full_like(visits, -1)
        library.walk(*problem, sizes, pointer(visits), pointer(segments), pointer(order))
        assert sizes[0] == blocks and 1 <= sizes[2] <= multiprocessors
        assert (visits + visits.mT == 1 + torch.eye(blocks)).all()
        assert (segments.amax(2) == 1).all() and (segments <= 1).all()
        for column, additions in enumerate(visits.sum(1)[0] - 1):
            assert (order[:, column, :additions] >= 0).all() and (order[:, column, additions:] == -1).all()
            assert (order[:, column, :additions].diff() > 0).all()
        groups.add(sizes[1])
    assert max(groups) == max(1, min(images, images * blocks * (blocks + 1) // 2 // 16))  # of one thread block


# pixels, channels, multiprocessors: each column block has one copy and several additions; the ring is as short as
# possible and used several times in each tile; many segments
SCHEDULES = {"additions": (7 * 128, (8, 8), 2), "ring": (264, (70, 600), 2), "segments": (5 * 128, (64, 64), 5)}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("relation", [ROW, Relation("cosine", "l2")], ids=lambda r: r.normalize)
@pytest.mark.core(1)
def test_bits_do_not_depend_on_the_schedule(library: ctypes.CDLL, relation: Relation, schedule: str) -> None:
    pixels, channels, multiprocessors = SCHEDULES[schedule]
    student, teacher = draw(torch.bfloat16, 1, pixels, channels, "nchw")
    first = check(library, student, teacher, relation, "bf16", multiprocessors=multiprocessors, seed=0)
    scales = scales_of(student, teacher, relation, torch.float32)
    for seed in SEEDS:
        other = emulate(library, student, teacher, scales, relation, "bf16", True, multiprocessors, seed)
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.slow
@pytest.mark.parametrize("need_grad", [False, True])
@every_precision
@pytest.mark.core(1)
def test_races(library: ctypes.CDLL, precision: str, need_grad: bool) -> None:
    """The ring is used several times in each tile, by every kind of kernel."""
    student, teacher = draw(DTYPES[precision], 1, 264, (8, 700), "nchw")
    scales = scales_of(student, teacher, ROW, torch.float32)
    for seed in SEEDS:
        tiles = emulate(library, student, teacher, scales, ROW, precision, need_grad, seed=seed)
        assert math.isfinite(tiles.loss.item())
