"""Shared by the engine's tests: cases, random features away from ties, and error measures."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from srpkd import relation_loss
from srpkd.kernels import BACKENDS, DISTANCES, NORMALIZATIONS, Relation, dispatch
from srpkd.kernels.formulas import accumulator
from srpkd.kernels.reference import relation_matrix

ROOT = Path(__file__).resolve().parents[1]
FAST = [name for name in BACKENDS if name != "reference"]
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# about the median of abs(D) in features(), so that the Huber distance has pairs on both sides
DELTA = {"row": 0.1, "cosine": 0.3, "none": 2.0}
RELATIONS = [Relation(n, d, DELTA[n]) for n in NORMALIZATIONS for d in DISTANCES]
FLAGS = ("rectify", "detach_norms")
FLAG_SETS = (("rectify",), ("detach_norms",), FLAGS)


def distances(backend: str) -> tuple[str, ...]:
    """The distances that a backend supports."""
    return getattr(dispatch.backend_module(backend), "DISTANCES", DISTANCES)


def dtypes(backend: str, device: torch.device | str = "cpu") -> tuple[torch.dtype, ...]:
    """The dtypes that a backend supports on a device."""
    return dispatch.supported_dtypes(backend, torch.device(device))


def widest(backend: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The widest dtype of a backend on a device, which tests its formulas most strictly."""
    return dtypes(backend, device)[0]


def rounding(dtype: torch.dtype) -> float:
    """Bound on the relative error of a sum of a few hundred rounded numbers."""
    return {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]


def cases(backends: list[str] = FAST, flags: Sequence[tuple[str, ...]] = ((),)) -> list:
    """Every supported (backend, relation), for ``pytest.mark.parametrize(("backend", "relation"), ...)``.

    flags: sets of flags of a relation that are True.
    """
    every = [
        (backend, Relation(normalize, distance, DELTA[normalize], **dict.fromkeys(names, True)))
        for names in flags
        for backend in backends
        for normalize in NORMALIZATIONS
        for distance in distances(backend)
    ]
    return [
        pytest.param(backend, relation, id=f"{backend}-{name_of(relation)}")
        for backend, relation in every
        if dispatch.unsupported_flag(backend, relation) is None
    ]


def name_of(relation: Relation) -> str:
    """The relation in the id of a test."""
    return "-".join([relation.normalize, relation.distance, *(name for name in FLAGS if getattr(relation, name))])


def few_cases(backends: list[str] = FAST, flags: Sequence[tuple[str, ...]] = ((),)) -> list:
    """One distance of every (backend, normalize): for tests of the normalisation."""
    return [case for case in cases(backends, flags) if case.values[1].distance == distances(case.values[0])[0]]


def options(relation: Relation) -> dict:
    """The relation as keyword arguments of ``relation_loss``."""
    return {
        "normalize": relation.normalize,
        "distance": relation.distance,
        "delta": relation.delta,
        "eps": relation.eps,
        **{name: getattr(relation, name) for name in FLAGS},
    }


def difference(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """D (B, N, N) in float64, of features (B, N, C)."""
    result = relation_matrix(student.double(), relation) - relation_matrix(teacher.double(), relation)
    if relation.normalize == "cosine":
        result.diagonal(dim1=1, dim2=2).zero_()
    return result


def tie_gap(student: Tensor, teacher: Tensor, relation: Relation) -> float:
    """Distance of D from the kink of rho, relative to D: larger rounding errors change the gradient.

    With ``rectify`` also the distance of the student's A from its kink at 0, below which D has no kink.
    """
    size = difference(student, teacher, relation).abs()
    bend = {"l1": 0.0, "huber": relation.delta}.get(relation.distance)
    gap = torch.full_like(size, torch.inf) if bend is None else (size - bend).abs()
    if relation.rectify:
        before = relation_matrix(student.double(), replace(relation, rectify=False))
        gap = torch.minimum(gap.masked_fill(before < 0, torch.inf), before.abs())
    if relation.normalize == "cosine":
        apart = ~torch.eye(size.shape[1], dtype=torch.bool)
        size, gap = size[:, apart], gap[:, apart]
    return (gap.min() / size.mean()).item() if size.numel() else float("inf")


def features(
    relation: Relation | None = None,
    batch: int = 2,
    pixels: int = 35,
    channels: tuple[int, int] = (5, 7),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    apart: float = 1e-6,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Random student and teacher features (B, N, C_s), (B, N, C_t), redrawn until no pair is near a tie.

    change: of the features of each network, before they are compared.
    """
    for _ in range(1000):
        student, teacher = (change((torch.randn(batch, pixels, count) + 0.5).to(dtype)) for count in channels)
        if relation is None or tie_gap(student, teacher, relation) > apart:
            return student.to(device), teacher.to(device)
    raise AssertionError(f"no features found that lie {apart} apart from ties: ask for fewer pixels")


def value_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, backend: str, upstream: float = 1.0, layout: str = "nlc"
) -> tuple[Tensor, Tensor]:
    """Each image's loss (B,) and the gradient of ``upstream`` times their sum, through the public function."""
    student = student.detach().requires_grad_()
    loss = relation_loss(student, teacher, backend=backend, layout=layout, reduction="none", **options(relation))
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    return loss.detach(), gradient


def error(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The relative error of a whole tensor: ||actual - expected|| / ||expected||, in float64; never NaN.

    least: the smallest norm to divide by, for expected values that are 0 up to rounding.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().all(), "not finite"
    return ((actual - expected).norm() / expected.norm().clamp_min(max(least, 1e-300))).item()


def assert_equal_to_reference(
    student: Tensor, teacher: Tensor, relation: Relation, backend: str, slack: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of features (B, N, C) equal those of autograd through the definition in float64.

    float64 features: up to ``slack`` times their rounding. Others: up to what their rounding predicts.
    """
    from rounding import assert_rounding  # imports this module

    loss, gradient = value_and_gradient(student, teacher, relation, backend)
    assert (loss.dtype, gradient.dtype) == (accumulator(student.dtype), student.dtype)
    if student.dtype == torch.float64:
        assert_equal((loss, gradient), value_and_gradient(student, teacher, relation, "reference"), slack)
    else:
        assert_rounding(loss, gradient, student, teacher, relation)
    return loss, gradient


def assert_equal(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], slack: float = 1.0) -> None:
    """Losses and gradients are equal up to ``slack`` times the rounding of their dtype."""
    for one, other in zip(actual, expected, strict=True):
        # the row loss of one pixel and the cosine gradient of one channel are 0 up to rounding
        assert error(one, other, least=1e-2) <= slack * rounding(one.dtype)


def within(tensor: Tensor, *index: slice) -> Tensor:
    """The same values as a view, ``index`` (with start and step) of a larger tensor that is NaN elsewhere."""
    parts = [(key.start or 0, key.step or 1) for key in index]
    sizes = [size * step + start for size, (start, step) in zip(tensor.shape, parts)] + list(tensor.shape[len(parts) :])
    return tensor.new_full(sizes, torch.nan)[index].copy_(tensor)


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same values as a view in which the first and the last along ``dim`` are more than 2^31 elements apart.

    The system has no memory for what is between.
    """
    strides = list(tensor.stride())
    strides[dim] = 2**31 // (tensor.shape[dim] - 1) // 8 * 8 + 8
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides))
    reserved_only = getattr(mmap, "MAP_NORESERVE", 0x4000)  # from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserved_only
    memory = mmap.mmap(-1, elements * tensor.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


ALL, OTHER = slice(None), slice(1, None, 2)
# features (B, C, H, W) -> the same values with other strides
STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every_other_image": lambda x: within(x, OTHER),
    "every_other_channel": lambda x: within(x, ALL, OTHER),
    "every_other_row": lambda x: within(x, ALL, ALL, OTHER),
    "every_other_column": lambda x: within(x, ALL, ALL, ALL, OTHER),
    "channels_last_every_other": lambda x: within(x.permute(0, 2, 3, 1), ALL, ALL, OTHER, OTHER).permute(0, 3, 1, 2),
    "offset": lambda x: within(x, ALL, slice(1, None), slice(2, None)),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def peaks_in_new_process(program: str) -> list[int]:
    """Return by how many bytes each of a program's functions ``calls`` increases the peak memory of a new process.

    In this process they would use memory that earlier tests have freed, which seems to cost nothing, and of which they
    touch more than they need at a time, since it is in pieces. Skips the test outside of Linux.

    Args:
        program: Python source that defines ``calls``, a list of functions without arguments.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process needs Linux")
    program += "\nfrom helpers import peak_memory\nprint(*map(peak_memory, calls))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if "PermissionError" in done.stderr:
        pytest.skip(f"the peak cannot be reset: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return [int(peak) for peak in done.stdout.split()]


def peak_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes a call increases the peak memory of this process, on Linux."""
    call()  # what is allocated or loaded once
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # glibc keeps what was freed
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _kibibytes("VmRSS")
    call()
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
