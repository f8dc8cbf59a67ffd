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
from emulated_kernels import LAYOUTS, draw, every_layout, exact_tiles, pointer, surrounded
from emulated_tiles import (
    COSINE,
    DTYPES,
    ROW,
    TOLERANCE,
    Problem,
    check,
    emulate,
    every_precision,
    exact_scales,
    load_tiles,
)
from helpers import RELATIONS, name_of

from srpkd.kernels import NORMALIZATIONS, Relation
from srpkd.kernels.formulas import scales_of

# layouts and channels: TMA reads lines of a multiple of 8 elements with 16 bits in place; others are copied
IN_PLACE_AND_COPIED = ("nlc", (5, 7)), ("nlc", (8, 72)), ("nchw", (5, 7))
SEEDS = range(1, 10)  # every order of the warps with every delay of asynchronous work


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return load_tiles(compile_emulation)


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


@pytest.mark.parametrize("exponents", [(20, -20), (-20, 20), (0, 30)], ids=str)
@pytest.mark.parametrize("normalize", ["row", "cosine"])
@every_precision
def test_zero_norm_pixels_of_networks_of_any_magnitude(
    library: ctypes.CDLL, precision: str, normalize: str, exponents: tuple[int, int]
) -> None:
    """Each U is right: in row, that of a zero-norm pixel is only the sum of what others contribute."""
    relation = Relation(normalize, "l1", eps=0.0)
    features = draw(DTYPES[precision], 1, 140, (16, 20), "nchw", torch.bfloat16)
    student, teacher = (x * 2.0 ** (e // 4 if precision == "fp16" else e) for x, e in zip(features, exponents))
    student[0, [3, 4, 136]] = 0
    scales = exact_scales(student, teacher, relation)
    tiles = check(library, student, teacher, relation, precision, scales)
    expected = exact_tiles(student, teacher, scales, relation)
    of_pixels = (tiles.U - expected.U).norm(dim=2) / expected.U.norm(dim=2)
    if normalize == "cosine":  # the gradient kernel ignores them
        of_pixels[0, [3, 4, 136]] = 0
    assert of_pixels.max() < 8 * TOLERANCE[precision]


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
