"""What the tests of emulated CUDA kernels share: features, and how a library receives them."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from helpers import ALL, OTHER, within
from torch import Tensor

from srpkd.kernels import Relation, Scales, TileSums
from srpkd.kernels.blocked import relation_tiles

LAYOUTS = ("nlc", "nchw")
PRECISIONS = ("bf16", "fp16", "tf32", "tf32x3")  # of enum Precision
# multiprocessors; bytes of shared memory per block, per multiprocessor, and reserved per block
DEVICES = {
    "sm_80": (108, 166_912, 167_936, 1024),
    "sm_86": (84, 101_376, 102_400, 1024),
    "sm_90": (132, 232_448, 233_472, 1024),
    "small": (1, 101_376, 102_400, 1024),  # few blocks are enough: no splits, 128 pixels per block
    "busy": (1, 232_448, 233_472, 1024),  # the same with the shared memory of sm_90
    "part": (6, 232_448, 233_472, 1024),  # some of its multiprocessors
    "eight": (8, 232_448, 233_472, 1024),  # so many that a sum has as many ranges of pixels as there can be
}
# views (B, C, N) or (B, N, C): the index and the adjacent dimension; their copies are 16, 4 or 2 bytes wide
VIEWS = {
    "aligned": ((ALL, ALL, ALL), 64),
    "every_other_image": ((OTHER, ALL, ALL), 64),
    "every_other_line": ((ALL, OTHER, ALL), 64),
    "offset_by_one": ((ALL, ALL, slice(1, None)), 63),
    "offset_by_two": ((ALL, ALL, slice(2, None)), 62),
    "odd": ((ALL, ALL, ALL), 37),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def extent(tensor: Tensor) -> int:
    """Return the number of elements that a tensor spans in memory."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1


def draw(
    dtype: torch.dtype,
    batch: int,
    pixels: int,
    channels: tuple[int, int],
    layout: str = "nlc",
    values: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Return random features (B, N, C) of student and teacher in a layout, with values of another dtype.

    Products of bfloat16 values are exact in float32, so that the kernels' Gram matrices are exact except for the sum.
    """
    pair = ((torch.randn(batch, pixels, count) + 0.5).to(values).to(dtype) for count in channels)
    student, teacher = (x.mT.contiguous().mT if layout == "nchw" else x for x in pair)
    return student, teacher


def surrounded(features: Tensor, layout: str, index: tuple[slice, ...]) -> Tensor:
    """Return features (B, N, C) in a layout, as a view of memory that is NaN elsewhere."""
    return within(features.mT, *index).mT if layout == "nchw" else within(features, *index)


def exact_tiles(
    student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool = True
) -> TileSums:
    """Compute the primitive in float64, with the same scales."""
    wide = Scales(*(None if x is None else x.double() for x in scales))
    return relation_tiles(student.double(), teacher.double(), wide, relation, need_grad)


class Launch(NamedTuple):
    early: bool  # may start while the kernel before it ends
    cooperative: bool


class EmulatedGpu:
    """A GPU that executes the operators of ``torch.ops.srpkd`` for tensors on the CPU, until the library's ``stop``.

    Args:
        library: operator.cpp in cuda_emulation/.
        device: of ``DEVICES``, "sm_75", "few", a GPU with place for about one thread block on each of few
            multiprocessors, "uncooperative", a GPU without cooperative launches, "green", a Hopper GPU whose stream
            has only one of its multiprocessors, or "failing", a GPU that does not say how many thread blocks it holds.
        seed: of the order of threads; 0 is the order in which they are numbered.
    """

    def __init__(self, library: ctypes.CDLL, device: str, seed: int = 0) -> None:
        self.library = library
        # further: the major compute capability, cooperative launches, and multiprocessors of the stream
        gpus = {name: (*gpu, 8 if name in ("sm_80", "sm_86") else 9, 1, gpu[0]) for name, gpu in DEVICES.items()}
        count, *memory = DEVICES["sm_86"]
        gpus |= {
            "sm_75": (count, *memory, 7, 1, count),
            "few": (5, *memory, 8, 1, 5),
            "uncooperative": (count, *memory, 8, 0, count),
            "failing": (count, memory[0], -1, memory[2], 8, 1, count),
            "green": (*DEVICES["sm_90"], 9, 1, 1),
        }
        attributes = [value for gpu in gpus.values() for value in gpu]
        numbers = (ctypes.c_int * len(attributes))(*attributes)
        library.start(numbers, len(gpus), list(gpus).index(device), ctypes.c_uint64(seed))

    @property
    def launches(self) -> list[Launch]:
        """Those of the last call."""
        early, cooperative = ctypes.c_int(), ctypes.c_int()
        count = self.library.launches(ctypes.byref(early), ctypes.byref(cooperative))
        return [Launch(*(bool(bits.value >> i & 1) for bits in (early, cooperative))) for i in range(count)]
