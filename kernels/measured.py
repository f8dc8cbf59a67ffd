"""Recorded speeds of the GPU kernels, from which ``auto`` chooses a backend on GPUs.

``python -m bench record`` writes the cases of bench/results/relation.csv into measured_cases.py. The rule for a case
that was not recorded:

- GPU: the one with this name, otherwise the one with the nearest compute capability.
- case: the recorded case with the smallest distance. The distance adds up the factors by which N, B, C_s and C_t
  differ, as powers of two, and a penalty for each option that differs, see PENALTIES.
- backend: the fastest of this case that can run. If none of its backends can, the next case decides. ``native`` counts
  with the time of the kernel that it takes on this GPU, see csrc/cuda/fastest_kernel.h.

KERNEL_VERSIONS says which version of a kernel a row describes. Rows of an earlier version remain as an estimate until
the kernel is measured again; ``stale`` lists them. They never prove that the present kernel is correct.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from .measured_cases import CASES, DEVICES

# By provider of ``python -m bench relation``, or by provider and dtype if those kernels have a number of their own.
# Increase a number when its kernels are rewritten, not when they move, are renamed or change in details, which only the
# emulation has checked: rows with the present number count as proof. native-sm80 and native-sm90 are the tiles of
# ``native``, which have the algebra around them in common.
KERNEL_VERSIONS = {
    "closed_form": 3,
    "native": 3,
    "native-sm80": 3,
    "native-sm90": 2,
    "native-sm90 float32": 3,
    "triton": 3,
}
# a difference of 1 counts as much as a factor of 2 in N
PENALTIES = {
    "l2": 16.0,
    "width": 8.0,
    "precision": 4.0,
    "normalize": 4.0,
    "need_grad": 2.0,
    "dtype": 1.0,
    "distance": 1.0,
}


class Case(NamedTuple):
    """A relation loss on a GPU.

    Attributes:
        dtype: "float32", "bfloat16" or "float16".
        precision: of float32 matrix products, as in ``torch.set_float32_matmul_precision``.
        need_grad: loss and gradient, not only the loss.
        pixels, student, teacher, batch: N, C_s, C_t, B.
    """

    dtype: str
    precision: str
    normalize: str
    distance: str
    need_grad: bool
    pixels: int
    student: int
    teacher: int
    batch: int


class Time(NamedTuple):
    """The time of a provider on a recorded case: microseconds of a call, and the version of its kernels."""

    microseconds: float
    version: int

    def of_version(self, provider: str, dtype: str) -> bool:
        """Return whether this is the time of the present kernels."""
        return self.version == kernel_version(provider, dtype)


def kernel_version(provider: str, dtype: str) -> int | None:
    """Return the version of a provider's kernels for features of a dtype, None for PyTorch and other libraries."""
    return KERNEL_VERSIONS.get(f"{provider} {dtype}", KERNEL_VERSIONS.get(provider))


class Recorded(NamedTuple):
    """A recorded case: its GPU as an index into DEVICES, and the times by provider."""

    device: int
    case: Case
    times: dict[str, Time]


RECORDED = tuple(
    Recorded(device, Case(*case), {name: Time(*time) for name, time in times.items()}) for device, case, times in CASES
)


def difference(one: Case, other: Case) -> float:
    """Return the distance between two cases, see the module docstring."""
    differs = {
        "l2": (one.distance == "l2") != (other.distance == "l2"),
        "width": (one.dtype == "float32") != (other.dtype == "float32"),
        "precision": one.dtype == other.dtype == "float32" and one.precision != other.precision,
        **{
            name: getattr(one, name) != getattr(other, name) for name in ("normalize", "need_grad", "dtype", "distance")
        },
    }
    sizes = (abs(math.log2(a / b)) for a, b in zip(one[-4:], other[-4:]) if a and b)
    return sum(PENALTIES[name] for name, value in differs.items() if value) + sum(sizes)


def nearest_device(name: str, capability: tuple[int, int]) -> int | None:
    """Return the index in DEVICES of the GPU whose recorded times apply, None if there are none."""

    def rank(index: int) -> tuple[bool, int, int, int]:
        recorded, version = DEVICES[index]
        return recorded != name, abs(version[0] - capability[0]), abs(version[1] - capability[1]), index

    return min(range(len(DEVICES)), key=rank, default=None)


@functools.lru_cache(maxsize=1024)
def ranking(name: str, capability: tuple[int, int], case: Case, kernel: str) -> tuple[str, ...]:
    """Return the recorded backends in the order in which ``auto`` should take the first that can run.

    Args:
        name, capability: of the GPU.
        kernel: "sm80" or "sm90", the tiles with which ``native`` computes the case there, see ``native.cuda_kernel``.
    """
    device = nearest_device(name, capability)
    near = sorted(
        (entry for entry in RECORDED if entry.device == device), key=lambda entry: difference(entry.case, case)
    )
    return tuple(dict.fromkeys(backend for entry in near for backend in fastest_first(entry, kernel)))


def fastest_first(entry: Recorded, kernel: str) -> list[str]:
    """Return the backends of a recorded case by their time, which for ``native`` is that of a kernel if recorded."""
    times = entry.times
    found = {backend: time.microseconds for backend, time in times.items() if "-" not in backend}
    if (own := times.get(f"native-{kernel}")) is not None:
        found["native"] = own.microseconds
    return sorted(found, key=lambda backend: found[backend])


def stale(recorded: Iterable[Recorded]) -> list[str]:
    """Return the providers all of whose recorded times are of an earlier version of their kernels."""
    found: dict[str, bool] = {}
    for entry in recorded:
        for name, time in entry.times.items():
            found[name] = found.get(name, False) or time.of_version(name, entry.case.dtype)
    return [name for name, current in found.items() if not current]
