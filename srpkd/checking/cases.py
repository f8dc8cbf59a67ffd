"""Cases: a ``Case`` is a relation loss of given shape, dtype and options, and its features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..kernels import Relation
from ..kernels.formulas import Distance, Normalize

MODES = ("forward", "forward+backward")
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Case:
    """A relation loss to check or to measure.

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
        flags: which of "rectify" and "detach_norms" are True.
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
    flags: tuple[str, ...] = ()

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
        return Relation(self.normalize, self.distance, delta[self.normalize], **dict.fromkeys(self.flags, True))

    def describe(self) -> str:
        """Describe the case in one line."""
        channels = "/".join(map(str, self.channels))
        precision = f" ({self.precision})" if self.dtype == "float32" and self.precision != "highest" else ""
        return (
            f"N={self.pixels} C={channels} B={self.batch} {self.dtype}{precision} "
            f"{' '.join((self.normalize, self.distance, *self.flags, self.mode))}, "
            f"{self.device}, {self.threads} CPU threads"
        )

    def columns(self) -> dict[str, Any]:
        """Return the case as columns of a CSV, without the flags and the device, whose name ``bench.machine`` knows."""
        names = (entry.name for entry in fields(self) if entry.name not in ("device", "flags"))
        values = {name: getattr(self, name) for name in names}
        return values | {"channels": "/".join(map(str, self.channels))}


def features(case: Case) -> tuple[Tensor, Tensor]:
    """Return random student (B, N, C_s) and teacher (B, N, C_t) features: views of NCHW memory, as networks return."""
    generator = torch.Generator().manual_seed(0)
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
