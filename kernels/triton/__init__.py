"""Backend ``triton``: the relation tiles on an NVIDIA GPU, in one pass and without an N x N array.

A program owns BLOCK_M rows of one image's relation matrices and walks over their columns, BLOCK_N at a time. Per tile
it makes the products G_student and G_teacher, from them D_ij and, G being symmetric, D_ji, and from those K, which it
multiplies with the student's columns into its rows of U. Where one image has too few row blocks to occupy the GPU, the
columns are split over programs whose parts of U are added in a fixed order. Without a gradient only the tiles on
and above the diagonal are visited. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_device as nvidia
from ..formulas import Relation, Scales, TileSums
from .primitives import INTERPRET, addressable, guard, triton
from .scales_and_gradient import loss_and_gradient, scales_of
from .tiles import relation_partials

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``Tiles``."""
    with guard(student.device):
        partials = relation_partials(addressable(student), addressable(teacher), scales, relation, need_grad)
        return TileSums(*(None if part is None else part.sum(dim) for part, dim in zip(partials, (1, 0, 0))))


def value_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each image (B,) and its gradient (B, N, C_s), with the algebra around the tiles in kernels too.

    Six launches at B = 1 for "row", where the columns are split; three for "cosine", two for "none".
    """
    with guard(student.device):
        student, teacher = addressable(student), addressable(teacher)
        scales = scales_of(student, teacher, relation)
        partials = relation_partials(student, teacher, scales, relation, need_grad)
        if need_grad:
            return loss_and_gradient(student, partials, scales, relation)
        return partials.loss.sum(1) / student.shape[1] ** 2, None


def unavailable_reason(device: torch.device) -> str | None:
    """Why it cannot run there and what to do, or None where it can."""
    if triton is None:
        return "the package triton is not installed: pip install triton"
    if INTERPRET and device.type == "cpu":
        return None
    return nvidia.unavailable_reason(device)
