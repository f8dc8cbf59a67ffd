"""Benchmark cases: a ``Case`` is a relation loss of given shape, dtype and options; a sweep is a list of cases."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation
from srpkd.kernels.formulas import Distance, Normalize

MODES = ("forward", "forward+backward")
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Case:
    """A relation loss to measure.

    Attributes:
        pixels: N.
        channels: (C_s, C_t).
        batch: B.
        dtype: dtype of both features.
        precision: argument of ``torch.set_float32_matmul_precision``; only affects float32 on a GPU.
        normalize, distance: as in ``srpkd.relation_loss``. Row and l1, the default of a case but not of ``SRPLoss``, is
            the most expensive relation: no identity avoids the N x N pairs, and the matrix is not symmetric.
        mode: ``"forward"`` under no_grad, or ``"forward+backward"`` with the gradient of the student's features.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
    """

    pixels: int = 4096
    channels: tuple[int, int] = (64, 256)
    batch: int = 1
    dtype: str = "float32"
    precision: str = "highest"
    normalize: Normalize = "row"
    distance: Distance = "l1"
    mode: str = "forward+backward"
    device: str = "cpu"
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def need_grad(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def loss_scale(self) -> float:
        """Factor of the gradient, as in loss scaling: for float16 the largest power of two that it represents."""
        return 2.0**15 if self.dtype == "float16" else 1.0

    @property
    def relation(self) -> Relation:
        """The relation, with a Huber delta that has pairs on both sides."""
        delta = {"row": self.pixels**-0.5, "cosine": self.channels[0] ** -0.5, "none": float(self.channels[0]) ** 0.5}
        return Relation(self.normalize, self.distance, delta[self.normalize])

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one N x N array per image, for all images."""
        return self.batch * self.pixels**2 * self.torch_dtype.itemsize

    @property
    def operations(self) -> int:
        """Minimum number of floating-point operations in matrix products, over all known algorithms.

        l1 and huber: half of each Gram matrix, which is symmetric, and for the gradient the product of K with the
        student's features. l2: the C x C moments, and for the gradient two products with them.
        """
        (student, teacher), pixels = self.channels, self.pixels
        if self.distance == "l2":
            moments = 2 * pixels * (student**2 + student * teacher + (0 if self.normalize == "row" else teacher**2))
            return self.batch * (moments + self.need_grad * 2 * pixels * student * (student + teacher))
        return self.batch * pixels**2 * (student + teacher + self.need_grad * 2 * student)

    @property
    def bytes_moved(self) -> int:
        """Minimum memory traffic: features are read once and the gradient is written once."""
        student, teacher = self.channels
        return self.batch * self.pixels * (student * (1 + self.need_grad) + teacher) * self.torch_dtype.itemsize

    def describe(self) -> str:
        """Describe the case in one line."""
        channels = "/".join(map(str, self.channels))
        precision = f" ({self.precision})" if self.dtype == "float32" and self.precision != "highest" else ""
        return (
            f"N={self.pixels} C={channels} B={self.batch} {self.dtype}{precision} {self.normalize} {self.distance} "
            f"{self.mode}, {self.device}, {self.threads} CPU threads"
        )

    def columns(self) -> dict[str, Any]:
        """Return the case as columns of a CSV, without the device, whose name ``bench.machine`` knows."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "device"}
        return values | {"channels": "/".join(map(str, self.channels))}


def features(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random student (B, N, C_s) and teacher (B, N, C_t) features: views of NCHW memory, as networks return."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(case.batch, channels, case.pixels, generator=generator).to(case.device, case.torch_dtype).mT
        for channels in case.channels
    )
    return student, teacher


@contextmanager
def settings(case: Case) -> Iterator[None]:
    """Set torch's threads and float32 precision to those of the case, and restore them afterwards."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision(case.precision)
    torch.set_num_threads(case.threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


PIXELS = (256, 1024, 4096, 16384, 65536)
CHANNELS = ((16, 64), (64, 256), (128, 256), (256, 256))
# each block is a product of axes around the defaults of Case; the most important blocks come first, for --minutes
SWEEPS: dict[str, list[dict[str, tuple]]] = {
    "quick": [{"pixels": (256, 1024, 2048, 4096)}],
    "table": [  # what a GPU's table shows: twelve cases
        {"dtype": ("bfloat16",), "batch": (16, 1)},
        {"dtype": ("bfloat16",), "normalize": ("cosine",), "distance": ("l2",), "batch": (16, 1)},
        {"precision": ("high", "highest"), "batch": (16,)},
        {"pixels": (16384,), "dtype": ("bfloat16",)},
        {"dtype": ("bfloat16",), "normalize": ("cosine",), "batch": (16,)},
        {"precision": ("high",), "normalize": ("cosine",), "distance": ("l2",)},
        {"dtype": ("float16",), "batch": (16,)},
        {"precision": ("high",)},
        {"pixels": (65536,), "channels": ((64, 64),), "dtype": ("bfloat16",)},
    ],
    "full": [
        {"pixels": PIXELS[:4]},
        {"pixels": (65536,), "channels": ((64, 64),)},
        {"dtype": ("bfloat16", "float16", "float64")},
        {"precision": ("high", "medium")},
        {"channels": CHANNELS},
        {"normalize": NORMALIZATIONS, "distance": DISTANCES},
        {"batch": (1, 4, 16)},
        {"pixels": PIXELS[:4], "mode": ("forward",)},
        {"pixels": (65536,)},
        {"pixels": PIXELS[:4], "dtype": ("bfloat16",)},
        {"pixels": (65536,), "dtype": ("bfloat16",)},
        {"pixels": (1024,), "channels": CHANNELS},
        {"pixels": (1024,), "batch": (1, 4, 16)},
        # around the sizes from which on the O(N C^2) algorithm of l2 is faster
        {"pixels": PIXELS[:3], "channels": CHANNELS, "normalize": ("row", "cosine"), "distance": ("l2",)},
    ],
}


def sweep(name: str, device: str, overrides: dict[str, tuple]) -> list[Case]:
    """Return the cases of a named sweep without duplicates; ``overrides`` replaces the values of an axis."""
    cases = []
    for block in SWEEPS[name]:
        axes = block | overrides
        cases += [Case(**dict(zip(axes, values)), device=device) for values in itertools.product(*axes.values())]
    if device == "cpu":  # float32 precision only affects GPUs
        cases = [case for case in cases if case.precision == "highest" or "precision" in overrides]
    return list(dict.fromkeys(cases))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select cases."""
    parser.add_argument("--sweep", choices=SWEEPS, default="quick", help="set of cases (default: %(default)s)")
    add_device(parser)
    axes = parser.add_argument_group("axes", "values that replace those of the sweep")
    axes.add_argument("--pixels", type=int, nargs="+", metavar="N")
    axes.add_argument("--channels", type=parse_channels, nargs="+", metavar="C_s/C_t")
    axes.add_argument("--batch", type=int, nargs="+", metavar="B")
    axes.add_argument("--dtype", choices=DTYPES, nargs="+")
    axes.add_argument("--precision", choices=PRECISIONS, nargs="+")
    axes.add_argument("--normalize", choices=NORMALIZATIONS, nargs="+")
    axes.add_argument("--distance", choices=DISTANCES, nargs="+")
    axes.add_argument("--mode", choices=MODES, nargs="+")
    axes.add_argument("--threads", type=int, nargs="+", metavar="T", help="CPU threads (default: as torch)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device, for ``device_of``."""
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")


def selected(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select.

    Raises:
        ValueError: A number is < 1, or there is no such device.
    """
    axes = ("pixels", "channels", "batch", "dtype", "precision", "normalize", "distance", "mode", "threads")
    overrides = {axis: tuple(values) for axis in axes if (values := getattr(options, axis))}
    overrides.setdefault("threads", (torch.get_num_threads(),))
    for axis in ("pixels", "batch", "threads"):
        if any(value < 1 for value in overrides.get(axis, ())):
            raise ValueError(f"--{axis}: received {overrides[axis]}, expected integers >= 1")
    return sweep(options.sweep, device_of(options), overrides)


def device_of(options: argparse.Namespace) -> str:
    """Return the device of --device, by default the GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: expected cpu, or cuda if torch sees a GPU")
    return device


def parse_channels(text: str) -> tuple[int, int]:
    """Return (C_s, C_t) of a text such as 64/256."""
    student, slash, teacher = text.partition("/")
    if not (slash and student.isdecimal() and teacher.isdecimal() and int(student) and int(teacher)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the channels of student and teacher, such as 64/256")
    return int(student), int(teacher)
