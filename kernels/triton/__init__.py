"""Backend ``triton``: relation losses on NVIDIA GPUs, in one pass over tiles and without an N x N array.

A program owns BLOCK_M rows of one image's relation matrices and loops over their columns, BLOCK_N at a time. For each
tile it computes the Gram blocks of student and teacher. G is symmetric, so they give both D_ij and D_ji, and from these
K, which is multiplied with the student's columns and added to the program's rows of U. If an image has too few row
blocks to occupy the GPU, several programs share the columns, and their parts of U are summed in a fixed order. Without
a gradient only the tiles on and above the diagonal are visited. No atomics: two runs give the same bits.

scales.py holds the kernels before the tile kernel (tiles.py), gradient.py those after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_device
from ..formulas import Relation, Scales, TileSums
from .gradient import reduce_partials
from .primitives import INTERPRET, addressable, guard, triton
from .scales import scales_of
from .tiles import relation_partials

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``TileSums``."""
    with guard(student.device):
        loss, U, h = relation_partials(addressable(student), addressable(teacher), scales, relation, need_grad)
        return TileSums(loss.sum(1), None if U is None else U.sum(0), None if h is None else h.sum(0))


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,) and its gradient (B, N, C_s), with scales and reduction in kernels too.

    At B = 1 this takes three launches for "cosine", two for "none", and six for "row" if the columns are split.
    """
    with guard(student.device):
        student, teacher = addressable(student), addressable(teacher)
        scales = scales_of(student, teacher, relation)
        partials = relation_partials(student, teacher, scales, relation, need_grad)
        if need_grad:
            return reduce_partials(student, partials, scales, relation)
        return partials.loss.sum(1) / student.shape[1] ** 2, None


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the backend cannot run on ``device`` and what to do, or None if it can."""
    if triton is None:
        return "the package triton is not installed: pip install triton"
    if INTERPRET and device.type == "cpu":
        return None
    return cuda_device.unavailable_reason(device)
