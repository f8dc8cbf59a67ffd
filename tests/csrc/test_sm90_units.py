"""The tiles for Hopper, emulated on the CPU: features that are divided by powers of two, their units.

These are all float32 features, which become one float16 term (tf32) or two (tf32x3), and float16 features whose K has a
wide range.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from emulated_kernels import draw, every_layout, exact_tiles
from emulated_tiles import DTYPES, TOLERANCE, emulate, exact_scales, load_tiles
from helpers import RELATIONS, error, name_of
from torch import Tensor

from srpkd.kernels import NORMALIZATIONS, Relation, Scales, TileSums
from srpkd.kernels.blocked import relation_tiles as blocked_tiles
from srpkd.kernels.formulas import scales_of

in_units = pytest.mark.parametrize("precision", ["fp16", "tf32", "tf32x3"])


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return load_tiles(compile_emulation)


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
    expected = exact_tiles(student, teacher, scales, relation)
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

    expected = exact_tiles(student, teacher, scales, relation)
    rounded = exact_tiles(tf32(student), tf32(teacher), scales, relation)
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
        expected = exact_tiles(student, teacher, scales, relation)
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
@pytest.mark.parametrize("exponent", [-120, -64, -40, 0])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_images_whose_norms_are_all_zero(library: ctypes.CDLL, distance: str, exponent: int, precision: str) -> None:
    """Of a student that is smaller than eps, only the teacher's relations count, whatever its features are."""
    student, teacher = draw_for(precision, 140)
    student *= in_range(exponent, precision)
    relation = Relation("row", distance)
    scales = scales_of(student, teacher, relation, torch.float32)
    scales = scales._replace(student=torch.zeros_like(scales.teacher))
    tiles = emulate(library, student, teacher, scales, relation, precision)
    expected = exact_tiles(student, teacher, scales, relation, False)
    assert error(tiles.loss, expected.loss) < 1e-6
    assert tiles.h is not None and (tiles.U == 0).all() and (tiles.h.abs() < 1e-11).all()


@in_units
@pytest.mark.parametrize("normalize", ["row", "cosine"])
@pytest.mark.parametrize("exponents", [(-56, 50), (50, -56), (-60, -60)], ids=str)
def test_networks_of_any_magnitude(
    library: ctypes.CDLL, exponents: tuple[int, int], normalize: str, precision: str
) -> None:
    student, teacher = (x * in_range(exponent, precision) for x, exponent in zip(draw_for(precision), exponents))
    relation = Relation(normalize, "l1", eps=0.0)
    scales = exact_scales(student, teacher, relation)
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
    expected = exact_tiles(student, teacher, scales, relation)
    if magnitude > 2.0**-33:  # there the squares are denormal
        assert error(tiles.loss / magnitude**4, expected.loss / magnitude**4) < 2e-6
    assert error(tiles.U.double() / magnitude**3, expected.U / magnitude**3) < 2 * TOLERANCE[precision]


@in_units
@pytest.mark.parametrize("exponent", [0, -24])
def test_a_network_without_features_does_not_bound_the_weights(
    library: ctypes.CDLL, exponent: int, precision: str
) -> None:
    """Otherwise K is 0 in float16."""
    student, teacher = draw_for(precision, channels=(20, 256))
    student *= in_range(exponent, precision)
    check_in_units(library, student, torch.zeros_like(teacher), Relation("none", "l2"), precision)


@in_units
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_an_image_of_a_student_without_features(library: ctypes.CDLL, distance: str, precision: str) -> None:
    """Its units are the teacher's, and thread blocks agree on them in whatever order they run."""
    student, teacher = (x * 2.0**-10 for x in draw_for(precision, 300))
    student.zero_()
    relation = Relation("none", distance)
    scales = scales_of(student, teacher, relation, torch.float32)
    expected = exact_tiles(student, teacher, scales, relation)
    for seed in range(6):
        tiles = emulate(library, student, teacher, scales, relation, precision, multiprocessors=6, seed=seed)
        assert error(tiles.loss, expected.loss) < 2e-6 and (tiles.U == 0).all()


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("exponents", [(-20, 30), (30, -20), (-20, 24), (24, -20)], ids=str)
def test_networks_of_any_magnitude_without_normalisation(
    library: ctypes.CDLL, exponents: tuple[int, int], precision: str
) -> None:
    """G_t in units of a much smaller student is finite."""
    student, teacher = (x * 2.0**exponent for x, exponent in zip(draw_for(precision), exponents))
    check_in_units(library, student, teacher, Relation("none", "l1"), precision)


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
@every_layout
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.core(6)
def test_channels_of_any_magnitude(library: ctypes.CDLL, normalize: str, layout: str, precision: str) -> None:
    """Units are those of the last channel, in both layouts and in the second image, also without a gradient."""
    student, teacher = draw(DTYPES[precision], 2, 72, (40, 70), layout)
    for features, exponent in ((student, 24), (teacher, -24)):
        features *= 2.0 ** torch.linspace(-8, 0, features.shape[2]).round()
        features[1] *= in_range(exponent, precision)
    relation = Relation(normalize, "l2", eps=0.0)
    check_in_units(library, student, teacher, relation, precision)
    scales = scales_of(student, teacher, relation, torch.float32)
    loss = emulate(library, student, teacher, scales, relation, precision, need_grad=False).loss
    expected = exact_tiles(student, teacher, scales, relation, False).loss
    assert (loss / expected - 1).abs().max() < 2e-6


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
    expected = exact_tiles(student, teacher, scales, relation)
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
