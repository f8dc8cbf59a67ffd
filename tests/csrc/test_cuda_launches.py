"""Which kernels of a call may start while the one before them ends, and tensor maps, with an emulated runtime."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest

NONE, AFTER_THE_FIRST, ALL = 0b000, 0b110, 0b111
INVALID_VALUE, INVALID_CONTEXT = 1, 201
devices = itertools.count()  # what a GPU can do is asked once: every test has its own


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return compile_emulation("launches.cpp")


@pytest.fixture(scope="session")
def tensor_maps(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    return compile_emulation("tensor_maps.cpp")


def launch(
    library: ctypes.CDLL, device: int, overlap: bool = True, tiles: bool = False, major: int = 9, ptx_version: int = 90
) -> tuple[int, int, int]:
    """Launch three kernels. Return the error, a bit for each that may start early, and the number of queries."""
    early, queries = ctypes.c_int(), ctypes.c_int()
    error = library.launch(overlap, tiles, device, major, ptx_version, ctypes.byref(early), ctypes.byref(queries))
    return error, early.value, queries.value


def test_off_unless_asked(library: ctypes.CDLL) -> None:
    assert launch(library, next(devices), overlap=False) == (0, NONE, 0)


def test_the_first_kernel_of_a_call_never_starts_early(library: ctypes.CDLL) -> None:
    device = next(devices)
    assert launch(library, device) == (0, AFTER_THE_FIRST, 2)
    assert launch(library, device) == (0, AFTER_THE_FIRST, 0), "a call asks the runtime again"
    assert launch(library, device, tiles=True) == (0, ALL, 1), "only the first kernel has not been asked for"


@pytest.mark.parametrize(("major", "ptx_version"), [(8, 80), (8, 90), (9, 80), (12, 80)])
def test_code_without_the_wait_does_not_start_early(library: ctypes.CDLL, major: int, ptx_version: int) -> None:
    """Also not code for an older architecture that the driver has compiled for this GPU."""
    device = next(devices)
    for queries in (2, 0):
        assert launch(library, device, major=major, ptx_version=ptx_version) == (0, NONE, queries)


@pytest.mark.parametrize(("major", "ptx_version"), [(10, 100), (12, 90), (12, 120)])
def test_newer_architectures(library: ctypes.CDLL, major: int, ptx_version: int) -> None:
    assert launch(library, next(devices), major=major, ptx_version=ptx_version)[:2] == (0, AFTER_THE_FIRST)


def test_each_gpu_is_asked(library: ctypes.CDLL) -> None:
    old, new = next(devices), next(devices)
    assert launch(library, old, major=8, ptx_version=80)[1] == NONE
    assert launch(library, new)[1] == AFTER_THE_FIRST
    assert launch(library, old, major=8, ptx_version=80)[1] == NONE


def test_gpus_beyond_the_cache_do_not_start_kernels_early(library: ctypes.CDLL) -> None:
    assert launch(library, 64)[:2] == (0, NONE)


def test_errors_of_the_runtime_are_returned(library: ctypes.CDLL) -> None:
    device = next(devices)
    assert launch(library, device, ptx_version=0) == (101, NONE, 1)
    assert launch(library, device) == (0, AFTER_THE_FIRST, 2), "a failed query is not remembered"
    assert launch(library, next(devices), major=-1) == (101, NONE, 0)
    assert launch(library, -1) == (101, NONE, 0), "no current GPU"


def resident(library: ctypes.CDLL, device: int, of_multiprocessor: int, of_block: int) -> tuple[int, int, int]:
    """Return the error, the thread blocks of a multiprocessor, and the number of queries."""
    blocks, queries = ctypes.c_int(), ctypes.c_int()
    error = library.resident(device, of_multiprocessor, of_block, ctypes.byref(blocks), ctypes.byref(queries))
    return error, blocks.value, queries.value


def test_resident_blocks_are_asked_for_once(library: ctypes.CDLL) -> None:
    first, second, third = (next(devices) for _ in range(3))
    for queries in (1, 0):
        assert resident(library, first, 4000, 1000) == (0, 4, queries)
    assert resident(library, first, 4000, 2000) == (0, 2, 1)
    assert resident(library, second, 6000, 2000) == (0, 3, 1), "another GPU"
    assert resident(library, first, 4000, 2000) == (0, 2, 1), "only the last answer is known"
    assert resident(library, third, -1, 2000)[::2] == (101, 1)
    assert resident(library, third, 8000, 2000) == (0, 4, 1), "a failed query is not remembered"
    assert resident(library, -1, 8000, 2000)[::2] == (101, 0), "no current GPU"


def allow(library: ctypes.CDLL, device: int, bytes_of_block: int = 1000, major: int = 9) -> tuple[int, int]:
    """Let a kernel use all shared memory. Return the error, and how often the runtime set it."""
    queries = ctypes.c_int()
    return library.allow(device, bytes_of_block, major, ctypes.byref(queries)), queries.value


def test_all_shared_memory_is_allowed_once(library: ctypes.CDLL) -> None:
    first, second = next(devices), next(devices)
    for device in (first, second):
        assert [allow(library, device) for _ in range(2)] == [(0, 1), (0, 0)]


def test_all_shared_memory_of_gpus_beyond_the_cache(library: ctypes.CDLL) -> None:
    allow(library, 0)
    assert [allow(library, 64) for _ in range(2)] == [(0, 1), (0, 1)]


def test_errors_of_allowing_all_shared_memory(library: ctypes.CDLL) -> None:
    device = next(devices)
    assert allow(library, device, bytes_of_block=-1) == (INVALID_VALUE, 1)
    assert allow(library, device, major=-1) == (101, 0)
    assert allow(library, device) == (0, 1), "a failure is not remembered"
    assert allow(library, -1) == (101, 0), "no current GPU"


@pytest.mark.parametrize(
    ("device", "context", "of_driver", "expected", "calls"),
    [
        (1, 1, 0, 0, 1),
        (0, -1, 0, 0, 2),  # a thread that has not launched a kernel yet
        (1, -1, 0, 0, 2),
        (0, 0, INVALID_VALUE, INVALID_VALUE, 1),
        (0, -1, INVALID_CONTEXT, INVALID_CONTEXT, 2),  # once more, and no further
    ],
)
def test_tensor_maps_need_a_context(
    tensor_maps: ctypes.CDLL, device: int, context: int, of_driver: int, expected: int, calls: int
) -> None:
    found, as_described = ctypes.c_int(), ctypes.c_int()
    error = tensor_maps.encode(device, context, of_driver, ctypes.byref(found), ctypes.byref(as_described))
    assert (error, found.value, as_described.value) == (expected, calls, 1)


# the least and the largest number that TMA supports, and the step: see cuTensorMapEncodeTiled in the API of the driver
LIMITS = {"extents": (1, 2**32, 1), "strides": (16, 2**40 - 16, 16), "box": (1, 256, 1)}


@pytest.mark.parametrize(("name", "index"), [*itertools.product(LIMITS, range(2)), ("extents", 2), ("box", 2)])
def test_limits_of_tensor_maps(tensor_maps: ctypes.CDLL, name: str, index: int) -> None:
    tensor_maps.unsupported.restype = ctypes.c_char_p

    def is_supported(number: int, offset: int = 0) -> bool:
        numbers = {"extents": [8, 2, 3], "strides": [16, 32], "box": [64, 128, 1]}
        numbers[name][index] = number
        extents, strides = ((ctypes.c_int64 * len(x))(*x) for x in (numbers["extents"], numbers["strides"]))
        box = (ctypes.c_int * 3)(*numbers["box"])
        return tensor_maps.unsupported(ctypes.c_int64(offset), extents, strides, box) is None

    least, largest, step = LIMITS[name]
    if (name, index) == ("box", 0):
        least = largest = 64  # a line
    assert is_supported(least) and is_supported(largest)
    assert not any(map(is_supported, (least - step, largest + step, -least)))
    assert step == 1 or not any(map(is_supported, (least + 8, least - 1)))
    assert is_supported(least, offset=16) and not is_supported(least, offset=8)
