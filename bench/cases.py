"""What is measured: one relation loss of given shape, dtype and kind is a ``Case``; a sweep is a list of them."""

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

MODES = ("forward", "forward+backward")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Case:
    """One relation loss to be measured.

    Attributes:
        pixels: N.
        channels: (C_s, C_t).
        batch: B.
        dtype: of both features.
        precision: ``torch.set_float32_matmul_precision`` of the run; says something of float32 on a GPU alone.
        normalize, distance: as in ``srpkd.relation_loss``.
        mode: ``"forward"`` under no_grad, or ``"forward+backward"``: with the gradient for the student's features.
        device: torch's name of it.
        threads: of the CPU.
    """

    pixels: int = 4096
    channels: tuple[int, int] = (64, 256)
    batch: int = 1
    dtype: str = "float32"
    precision: str = "highest"
    normalize: str = "row"
    distance: str = "l1"
    mode: str = "forward+backward"
    device: str = "cpu"
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def need_grad(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def loss_scale(self) -> float:
        """What the gradient is multiplied by, as loss scaling does for float16: the largest power of two it holds."""
        return 2.0**15 if self.dtype == "float16" else 1.0

    @property
    def relation(self) -> Relation:
        """With a delta for Huber's distance that has pairs on both sides of it."""
        delta = {"row": self.pixels**-0.5, "cosine": self.channels[0] ** -0.5, "none": float(self.channels[0]) ** 0.5}
        return Relation(self.normalize, self.distance, delta[self.normalize])

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the N x N arrays of one kind, of all images."""
        return self.batch * self.pixels**2 * self.torch_dtype.itemsize

    @property
    def operations(self) -> int:
        """The fewest floating-point operations of matrix products that any known algorithm needs.

        l1, huber: half of both Gram matrices, which are symmetric, and for the gradient the product of K with the
        student's features. l2 needs the three C x C moments alone, and for the gradient two products with them.
        """
        (student, teacher), pixels = self.channels, self.pixels
        if self.distance == "l2":
            moments = 2 * pixels * (student**2 + student * teacher + (0 if self.normalize == "row" else teacher**2))
            return self.batch * (moments + self.need_grad * 2 * pixels * student * (student + teacher))
        return self.batch * pixels**2 * (student + teacher + self.need_grad * 2 * student)

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes: features read once, the gradient written once."""
        student, teacher = self.channels
        return self.batch * self.pixels * (student * (1 + self.need_grad) + teacher) * self.torch_dtype.itemsize

    def describe(self) -> str:
        channels = "/".join(map(str, self.channels))
        precision = f" ({self.precision})" if self.dtype == "float32" and self.precision != "highest" else ""
        return (
            f"N={self.pixels} C={channels} B={self.batch} {self.dtype}{precision} {self.normalize} {self.distance} "
            f"{self.mode}, {self.device}, {self.threads} CPU threads"
        )

    def columns(self) -> dict[str, Any]:
        """The case as columns of a CSV; the device's own name is the environment's to tell."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "device"}
        return values | {"channels": "/".join(map(str, self.channels))}


def features(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random student (B, N, C_s) and teacher (B, N, C_t) features: views of NCHW memory, as a network leaves it."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(case.batch, channels, case.pixels, generator=generator).to(case.device, case.torch_dtype).mT
        for channels in case.channels
    )
    return student, teacher


@contextmanager
def settings(case: Case) -> Iterator[None]:
    """torch's threads and float32 precision as the case has them, and after it as they were."""
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
# every block is a product of axes around Case's defaults; what matters most comes first, should time run out
SWEEPS: dict[str, list[dict[str, tuple]]] = {
    "quick": [{"pixels": (256, 1024, 2048, 4096)}],
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
        # where O(N C^2) begins to pay
        {"pixels": PIXELS[:3], "channels": CHANNELS, "normalize": ("row", "cosine"), "distance": ("l2",)},
    ],
}


def sweep(name: str, device: str, overrides: dict[str, tuple]) -> list[Case]:
    """The cases of a named sweep, each once; an axis in ``overrides`` takes those values in place of its own."""
    cases = []
    for block in SWEEPS[name]:
        axes = block | overrides
        cases += [Case(**dict(zip(axes, values)), device=device) for values in itertools.product(*axes.values())]
    if device == "cpu":  # precision chooses among the units of a GPU
        cases = [case for case in cases if case.precision == "highest" or "precision" in overrides]
    return list(dict.fromkeys(cases))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose cases."""
    parser.add_argument("--sweep", choices=SWEEPS, default="quick", help="which cases (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    axes = parser.add_argument_group("axes", "values in place of the sweep's own")
    axes.add_argument("--pixels", type=int, nargs="+", metavar="N")
    axes.add_argument("--channels", type=_channels, nargs="+", metavar="C_s/C_t")
    axes.add_argument("--batch", type=int, nargs="+", metavar="B")
    axes.add_argument("--dtype", choices=DTYPES, nargs="+")
    axes.add_argument("--precision", choices=PRECISIONS, nargs="+")
    axes.add_argument("--normalize", choices=NORMALIZATIONS, nargs="+")
    axes.add_argument("--distance", choices=DISTANCES, nargs="+")
    axes.add_argument("--mode", choices=MODES, nargs="+")
    axes.add_argument("--threads", type=int, nargs="+", metavar="T", help="CPU threads; by default torch's own number")


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for.

    Raises:
        ValueError: a number that is not above 0, or a device that is not there.
    """
    axes = ("pixels", "channels", "batch", "dtype", "precision", "normalize", "distance", "mode", "threads")
    overrides = {axis: tuple(values) for axis in axes if (values := getattr(options, axis))}
    overrides.setdefault("threads", (torch.get_num_threads(),))
    for axis in ("pixels", "batch", "threads"):
        if any(value < 1 for value in overrides.get(axis, ())):
            raise ValueError(f"--{axis} {overrides[axis]}: expected numbers above 0")
    return sweep(options.sweep, device_of(options), overrides)


def device_of(options: argparse.Namespace) -> str:
    """--device, by default a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: expected cpu, or cuda, where torch sees a GPU")
    return device


def _channels(text: str) -> tuple[int, int]:
    student, slash, teacher = text.partition("/")
    if not (slash and student.isdecimal() and teacher.isdecimal() and int(student) and int(teacher)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected student's/teacher's channels, such as 64/256")
    return int(student), int(teacher)
