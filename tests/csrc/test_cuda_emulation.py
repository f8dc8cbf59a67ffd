"""The CUDA kernels, emulated on the CPU: csrc/cuda compiled for the host with cuda_emulation/.

The emulation executes index arithmetic, masks, copies, barriers and fragment layouts as a GPU does, at small sizes, and
the tests compare the results with the float64 primitive. It reports races, copies that no thread waited for and
addresses out of bounds. It does not cover nvcc's code generation or performance.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import emulated_kernels
import pytest
import torch
from emulated_kernels import DEVICES, PRECISIONS, VIEWS, every_layout, exact_tiles, extent, pointer, surrounded
from helpers import RELATIONS, error, name_of
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, Scales, TileSums
from srpkd.kernels.formulas import gradient_of, scales_of
from srpkd.kernels.reference import relation_loss as reference_loss

TILE = 64
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32x3": torch.float32}
# the error of U relative to float64 if G is exact: K has 11 bits or 22
TOLERANCE = {"bf16": 4e-4, "fp16": 1e-6, "tf32": 4e-4, "tf32x3": 1e-6}
ROW = Relation("row", "l1")

every_precision = pytest.mark.parametrize("precision", PRECISIONS)


class Plan(NamedTuple):
    shared: int
    resident: int
    u_channels: int
    channel_splits: int
    splits: int


class Features(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("image_stride", ctypes.c_int64),
        ("line_stride", ctypes.c_int64),
        ("channels", ctypes.c_int),
    )


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    result = compile_emulation("sm80_library.cpp", "sm80_kernels.cpp")
    result.relation_tiles.restype = result.mistake.restype = result.share.restype = ctypes.c_char_p
    return result


def emulate(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    scales: Scales,
    relation: Relation,
    precision: str,
    need_grad: bool = True,
    splits: int = 1,
    shared_limit: int = 2**30,
    seed: int = 0,
) -> TileSums:
    """Compute the primitive with the emulated kernels. The strides of the features determine the layout."""
    batch, pixels, channels = student.shape
    pixels_adjacent = student.stride(1) == 1 and student.stride(2) != 1
    features, extents, kept = (Features * 2)(), (ctypes.c_int64 * 2)(), []
    for i, (x, alpha) in enumerate(((teacher, scales.teacher), (student, scales.student))):
        kept.append(None if alpha is None else alpha.float().contiguous())
        line_stride = x.stride(2 if pixels_adjacent else 1)
        assert x.stride(1 if pixels_adjacent else 2) == 1
        features[i] = Features(x.data_ptr(), pointer(kept[i]), x.stride(0), line_stride, x.shape[2])
        extents[i] = extent(x) * x.element_size()
    loss = torch.full((batch, splits, math.ceil(pixels / TILE)), torch.nan, dtype=torch.float64)
    U = torch.full((splits, batch, pixels, channels), torch.nan) if need_grad else None
    h = torch.full((splits, batch, pixels), torch.nan) if need_grad and relation.normalize != "none" else None
    if U is not None and pixels_adjacent:
        U = U.mT.contiguous().mT
    strides = (ctypes.c_int64 * 4)(*(U.stride() if U is not None else (0,) * 4))
    message = library.relation_tiles(
        PRECISIONS.index(precision), pixels_adjacent, need_grad, features, extents, batch, pixels, splits, shared_limit,
        DISTANCES.index(relation.distance), relation.normalize == "row", relation.normalize == "cosine",
        relation.rectify, ctypes.c_float(relation.delta), pointer(loss), pointer(U), strides, pointer(h),
        ctypes.c_uint64(seed),
    )  # fmt: skip
    assert message == b"", message.decode()
    return TileSums(loss.sum((1, 2)), None if U is None else U.sum(0), None if h is None else h.sum(0))


def draw(
    precision: str,
    batch: int,
    pixels: int,
    channels: tuple[int, int],
    layout: str = "nlc",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return random features (B, N, C) of student and teacher in a layout.

    Float32 features have bfloat16 values unless ``dtype`` is given. One tf32 represents them exactly, so their Gram
    matrices are as exact as those of 16-bit features.
    """
    values = dtype or (torch.bfloat16 if precision.startswith("tf32") else DTYPE[precision])
    return emulated_kernels.draw(DTYPE[precision], batch, pixels, channels, layout, values)


def assert_equal_to_float64(
    actual: TileSums, student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, precision: str
) -> None:
    """Compare with the float64 primitive, computed with the same scales."""
    expected = exact_tiles(student, teacher, scales, relation, actual.U is not None)
    assert error(actual.loss, expected.loss) < 5e-7
    if actual.U is not None:
        assert error(actual.U, expected.U) < TOLERANCE[precision]
    if actual.h is not None:
        assert error(actual.h, expected.h) < 1e-6


def check(
    library: ctypes.CDLL, student: Tensor, teacher: Tensor, relation: Relation, precision: str, **options
) -> TileSums:
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision, **options)
    assert_equal_to_float64(tiles, student, teacher, scales, relation, precision)
    return tiles


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@every_layout
@every_precision
@pytest.mark.core(24)
def test_every_relation(library: ctypes.CDLL, precision: str, layout: str, relation: Relation) -> None:
    check(library, *draw(precision, 1, 75, (5, 7), layout), relation, precision)


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@every_layout
@every_precision
@pytest.mark.core(18)
def test_rectified(library: ctypes.CDLL, precision: str, layout: str, relation: Relation, need_grad: bool) -> None:
    """Tiles on and off the diagonal, and zero-norm pixels, with 64 or 128 channels per thread block."""
    student, teacher = draw(precision, 1, 75, (5, 7) if relation.distance == "l1" else (70, 7), layout)
    student[:, 3] = teacher[:, 70] = 0
    check(library, student, teacher, replace(relation, rectify=True), precision, need_grad=need_grad)


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [1, 2, 63, 64, 65, 129])
@every_layout
@every_precision
@pytest.mark.core(8)
def test_any_number_of_pixels(library: ctypes.CDLL, precision: str, layout: str, pixels: int) -> None:
    relation = ROW if pixels > 1 else Relation("none", "l1")  # normalised, a single pixel has D = 1 - 1 = 0
    check(library, *draw(precision, 2, pixels, (3, 4), layout), relation, precision)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(1, 1), (8, 65), (64, 32), (65, 33), (150, 70), (260, 8)], ids=str)
@every_layout
@every_precision
@pytest.mark.core(8)
def test_any_number_of_channels(library: ctypes.CDLL, precision: str, layout: str, channels: tuple[int, int]) -> None:
    student, teacher = draw(precision, 1, 20, channels, layout)
    if layout == "nchw" and channels == (1, 1):  # with one channel both layouts are the same
        student, teacher = (x.as_strided(x.shape, (20, 1, 20)) for x in (student, teacher))
    check(library, student, teacher, ROW, precision)


@every_layout
@every_precision
@pytest.mark.core(2)
def test_blocks_of_pixels_and_channels(library: ctypes.CDLL, precision: str, layout: str) -> None:
    """Each thread block has one of two images, of two blocks of pixels, and of two blocks of channels."""
    check(library, *draw(precision, 2, 70, (150, 7), layout), ROW, precision)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@every_precision
def test_zero_norm_pixels(library: ctypes.CDLL, precision: str, normalize: str) -> None:
    student, teacher = draw(precision, 1, 70, (9, 10))
    student[:, 3:5] = teacher[:, 4:6] = student[:, 66] = 0
    tiles = check(library, student, teacher, Relation(normalize, "l1"), precision)
    if tiles.h is not None:
        assert (tiles.h[:, [3, 4, 66]] == 0).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [8, 200])
@every_layout
@every_precision
@pytest.mark.core(12)
def test_equal_features_give_exactly_zero(
    library: ctypes.CDLL, precision: str, layout: str, channels: int, normalize: str
) -> None:
    """D is exactly 0, whichever channels of U a thread block computes."""
    student, _ = draw(precision, 1, 33, (channels, 1), layout, torch.float32)
    relation = Relation(normalize, "l1")
    scales = scales_of(student, student, relation, torch.float32)
    tiles = emulate(library, student, student.clone(), scales, relation, precision)
    assert (tiles.loss == 0).all() and (tiles.U == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(64, 100), (70, 40)], ids=str)
@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32x3"])
@pytest.mark.core(12)
def test_error_is_as_small_as_that_of_eager(
    library: ctypes.CDLL, precision: str, relation: Relation, channels: tuple[int, int]
) -> None:
    """Errors against float64 are at most three times those of eager autograd, on features after a ReLU."""
    student, teacher = (x.relu() for x in draw(precision, 1, 100, channels, "nchw", DTYPE[precision]))
    student[:, 7] = 0

    def eager(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        loss = reference_loss(student, teacher, relation)
        return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]

    exact_loss, exact = eager(student.double(), teacher.double())
    eager_loss, expected = eager(student, teacher)
    scales = scales_of(student, teacher, relation, torch.float32)
    tiles = emulate(library, student, teacher, scales, relation, precision)
    loss, gradient = tiles.loss / student.shape[1] ** 2, gradient_of(student, tiles, scales, relation)
    assert error(gradient, exact) < 3 * error(expected, exact) + 1e-7
    assert error(loss, exact_loss) < 3 * error(eager_loss, exact_loss) + 5e-7


def test_float16_with_extreme_magnitudes(library: ctypes.CDLL) -> None:
    """K of such large or small features exceeds the range of float16, and so does the ratio of two pixels' K."""
    for magnitude in (2.0**-12, 2.0**10):
        student, teacher = draw("fp16", 1, 40, (6, 6))
        student, teacher = student * magnitude, teacher * magnitude
        student[:, 5] *= 2**-6
        for normalize in NORMALIZATIONS:
            check(library, student, teacher, Relation(normalize, "l1"), "fp16")


@every_precision
def test_nan_and_infinity_propagate(library: ctypes.CDLL, precision: str) -> None:
    student, teacher = draw(precision, 1, 20, (5, 6))
    relation = Relation("none", "l1")
    for broken in (student, teacher):
        before = broken[0, 3, 2].item()
        for value in (math.nan, math.inf):
            broken[0, 3, 2] = value
            scales = scales_of(student, teacher, relation, torch.float32)
            tiles = emulate(library, student, teacher, scales, relation, precision)
            assert not tiles.loss.isfinite().any()
            assert broken is teacher or not tiles.U[0].isfinite().all()
        broken[0, 3, 2] = before


@every_precision
def test_nan_in_one_channel_reaches_the_others(library: ctypes.CDLL, precision: str) -> None:
    """Each pixel has a NaN in a row of K, and so in all channels of U."""
    student, teacher = draw(precision, 1, 20, (5, 6))
    student[0, 3, 2] = math.nan
    for distance in ("l2", "huber"):
        relation = Relation("none", distance)
        scales = scales_of(student, teacher, relation, torch.float32)
        assert emulate(library, student, teacher, scales, relation, precision).U.isnan().all()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@every_layout
@every_precision
@pytest.mark.core(8)
def test_views_are_read_in_place(library: ctypes.CDLL, precision: str, layout: str, view: str) -> None:
    """NaN surrounds the views, so that a read out of bounds changes the result."""
    index, adjacent = VIEWS[view]
    sizes = (66, (adjacent, adjacent)) if layout == "nlc" else (adjacent, (10, 7))
    student, teacher = (surrounded(x, layout, index) for x in draw(precision, 2, *sizes))
    check(library, student, teacher, ROW, precision)


@every_layout
@every_precision
@pytest.mark.core(3)
def test_rows_that_are_not_resident_pass_through_the_ring(library: ctypes.CDLL, precision: str, layout: str) -> None:
    """Results are bit-identical for any number of resident row panels."""
    student, teacher = draw(precision, 1, 70, (60, 400), layout)
    scales = scales_of(student, teacher, ROW, torch.float32)
    whole = emulate(library, student, teacher, scales, ROW, precision)
    for resident in (0, 1, 3):
        limit = 8192 * resident + (3 + 64 * student.element_size() // 128) * (2 * 8192 + 512)
        part = emulate(library, student, teacher, scales, ROW, precision, shared_limit=limit)
        assert plan(library, precision, True, 70, (60, 400), (1, limit, limit, 0)).resident == resident
        assert all(torch.equal(a, b) for a, b in zip(whole, part))


# --- the schedule -----------------------------------------------------------------------------------------------------


@every_layout
@every_precision
def test_deterministic(library: ctypes.CDLL, precision: str, layout: str) -> None:
    """Results are bit-identical in any order of the threads."""
    student, teacher = draw(precision, 1, 70, (30, 20), layout)
    scales = scales_of(student, teacher, ROW, torch.float32)
    first, *others = (emulate(library, student, teacher, scales, ROW, precision, seed=seed) for seed in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("precision", ["bf16", "tf32x3"])
def test_column_splits(library: ctypes.CDLL, precision: str, splits: int) -> None:
    for need_grad in (True, False):
        check(library, *draw(precision, 2, 200, (5, 6)), ROW, precision, splits=splits, need_grad=need_grad)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("pixels", "layout"), [(40, "nlc"), (100, "nchw"), (190, "nchw"), (256, "nlc")])
@every_precision
def test_forward_only(library: ctypes.CDLL, precision: str, pixels: int, layout: str, normalize: str) -> None:
    """Each pair of blocks is visited once, for odd and even numbers of blocks."""
    relation = Relation(normalize, "l1")
    check(library, *draw(precision, 1, pixels, (6, 5), layout), relation, precision, need_grad=False)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_walk_visits_every_pair_of_blocks(library: ctypes.CDLL, blocks: int, splits: int) -> None:
    visits = torch.zeros(blocks, blocks, dtype=torch.int32)
    library.walk(blocks, True, splits, pointer(visits))
    assert (visits == 1).all()
    library.walk(blocks, False, splits, pointer(visits.zero_()))
    assert (visits.diagonal() == 1).all()
    assert (visits + visits.T + torch.eye(blocks) >= 1).all() and (visits.triu(1) + visits.tril(-1).T <= 1).all()
    assert visits.sum(1).max() - visits.sum(1).min() <= 1  # row blocks have equal work


def plan(
    library: ctypes.CDLL, precision: str, grad: bool, pixels: int, channels: tuple[int, int], device: tuple
) -> Plan:
    library.plan_of(
        PRECISIONS.index(precision),
        grad,
        1,
        pixels,
        *channels,
        (ctypes.c_int * 4)(*device),
        result := (ctypes.c_int * 5)(),
    )
    return Plan(*result)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True])
@every_precision
def test_plan_fits_into_shared_memory(library: ctypes.CDLL, precision: str, grad: bool, device: str) -> None:
    """The plan fits into a block's shared memory, for any number of channels."""
    for channels in itertools.product((1, 16, 64, 65, 128, 256, 1000), (1, 64, 256, 512, 5000, 2**24, 2**25, 2**30)):
        chosen = plan(library, precision, grad, 4096, channels, DEVICES[device])
        assert 0 <= 8192 * chosen.resident < chosen.shared <= DEVICES[device][1]
        assert chosen.channel_splits == (math.ceil(channels[0] / chosen.u_channels) if grad else 1)
        assert 1 <= chosen.splits <= 64


def test_plan_keeps_a_gpu_busy(library: ctypes.CDLL) -> None:
    """The number of splits fills 132 multiprocessors with two thread blocks each."""
    for pixels, splits in ((64, 1), (1024, 16), (4096, 4), (65536, 1)):
        chosen = plan(library, "bf16", True, pixels, (64, 256), DEVICES["sm_90"])
        assert chosen == Plan(5 * 8192 + 4 * 8704, 5, 64, 1, splits)


# --- the emulation itself ---------------------------------------------------------------------------------------------

MISTAKES = {
    "none": "",
    "no commit": "before its thread waited for the copy",
    "no wait": "before its thread waited for the copy",
    "no barrier": "read without a barrier after it was written",
    "misaligned": "misaligned",
    "out of bounds": "out of bounds",
    "overwritten": "written without a barrier after it was read",
    "unwritten": "read before it was written",
    "diverged": "threads that never arrive",
    "different": "execute different instructions",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulation_reports_mistakes(library: ctypes.CDLL, mistake: str) -> None:
    message = library.mistake(mistake.encode()).decode()
    assert MISTAKES[mistake] in message
    assert bool(message) == (mistake != "none")


SHARED_IN_ORDER = ("ordered by the grid", "ordered by a counter", "overwritten by the last", "ordered in the block")
RACES = (
    "written by both", "read after it was written", "written after it was read", "counted without a barrier",
    "read by another thread", "counter that is read", "unwritten",
)  # fmt: skip


@pytest.mark.parametrize("how", [*SHARED_IN_ORDER, *RACES])
def test_races_for_global_memory_are_reported(library: ctypes.CDLL, how: str) -> None:
    """Accesses without an order are, whatever the schedule is."""
    for seed in range(10):
        message = library.share(how.encode(), ctypes.c_uint64(seed)).decode()
        assert ("global memory" in message) == (how in RACES)
        assert bool(message) == (how in RACES)
