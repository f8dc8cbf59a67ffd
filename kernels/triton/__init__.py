"""Backend ``triton``: relation losses on NVIDIA GPUs, in one pass over tiles and without an N x N array.

A program owns BLOCK_M rows of one image's relation matrices and loops over their columns, BLOCK_N at a time. For each
tile it computes the Gram blocks of student and teacher. G is symmetric, so they give both D_ij and D_ji, and from these
K, which is multiplied with the student's columns and added to the program's rows of U. If an image has too few row
blocks to occupy the GPU, several programs share the columns, and their parts of U are summed in a fixed order. Without
a gradient only the tiles on and above the diagonal are visited. No floating-point numbers are added by atomic
operations: two runs give the same bits.

scales.py and moments.py hold the kernels before the tile kernel (tiles.py), gradient.py those after it. plans.py
launches them.
"""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor

from .. import cuda_device
from ..formulas import Relation, Scales, TileSums, gradient_dtype
from .backward import scaled_gradient as scaled_gradient
from .configurations import DTYPES as DTYPES
from .configurations import Configuration, autotune, configuration, number_format, run_milliseconds
from .gradient import loss_weight, plan_gradient, plan_loss
from .plans import Array, Plan, planned
from .primitives import INTERPRET, addressable, guard, triton
from .scales import PlannedScales, plan_scales, split_scales
from .tiles import Partials, plan_tiles, relation_kernel

REDUCES = True


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,), U (B, N, C_s), h (B, N). See ``TileSums``."""
    student, teacher = addressable(student), addressable(teacher)
    vectors = tuple(vector.contiguous() for vector in split_scales(scales))
    chosen = choose_configuration(student, teacher, relation, need_grad)

    def build() -> tuple[Plan, Partials]:
        plan = Plan(student.device)
        features = plan.argument(student), plan.argument(teacher)
        arrays = PlannedScales(tuple(map(plan.argument, vectors))) if vectors else PlannedScales()
        return plan, plan_tiles(plan, *features, arrays, relation, chosen, need_grad)

    plan, partials = planned("tiles", (student, teacher), build, relation, need_grad, chosen)
    bases = plan.run(student, teacher, *vectors)
    return TileSums(
        partials.loss.of(bases).sum(1),
        None if partials.U is None else partials.U.of(bases).sum(0),
        None if partials.h is None else partials.h.of(bases).sum(0),
    )


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, reduction: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """Return the loss, (B,) or with a reduction (), and the gradient (B, N, C_s) of each image's own loss.

    Scales and reduction are computed in kernels too. With a gradient this takes three launches for "cosine", two for
    "none", and six for "row".
    """
    student, teacher = addressable(student), addressable(teacher)
    chosen = choose_configuration(student, teacher, relation, need_grad)
    return run_loss(student, teacher, relation, need_grad, chosen, reduction)


def run_loss(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, chosen: Configuration, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """Run ``loss_and_gradient`` with a configuration of the tile kernel."""
    loss = student.new_empty(() if reduction != "none" else len(student), dtype=torch.float32)
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else None
    build = functools.partial(relation_plan, student, teacher, loss, gradient, relation, chosen, reduction)
    plan = planned("loss", (student, teacher), build, relation, need_grad, chosen, reduction)
    plan.run(student, teacher, loss, *(() if gradient is None else (gradient,)))
    return loss, gradient


def relation_plan(
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    relation: Relation,
    chosen: Configuration,
    reduction: str,
) -> Plan:
    """Return the plan that computes ``loss`` and, unless it is None, ``gradient`` of tensors like these."""
    batch, pixels, _ = student.shape
    plan = Plan(student.device)
    features, losses = (plan.argument(student), plan.argument(teacher)), plan.argument(loss)
    result: Array | None = None if gradient is None else plan.argument(gradient)
    scales = plan_scales(plan, *features, relation)
    U = result if result is not None and result.dtype == torch.float32 else None
    partials = plan_tiles(plan, *features, scales, relation, chosen, result is not None, U)
    weight = loss_weight(reduction, batch, pixels)
    if result is None:
        plan_loss(plan, partials, losses, weight)
    else:
        plan.free(*scales.vectors[1:])  # only the tile kernel reads them
        plan_gradient(plan, features[0], partials, scales, relation, losses, result, weight)
    return plan


def choose_configuration(student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool) -> Configuration:
    """Return the configuration of the tile kernel for this device and these features."""
    numbers, channels = number_format(student.dtype), (student.shape[2], teacher.shape[2])
    chosen = hand_chosen(student.device, numbers, *channels)
    if os.environ.get("SRPKD_AUTOTUNE") != "1" or INTERPRET or torch.cuda.is_current_stream_capturing():
        return chosen  # measuring would break the capture of a CUDA graph
    case = [torch.cuda.get_device_name(student.device), numbers, relation.normalize, relation.distance, need_grad]
    case += [triton.next_power_of_2(size) for size in student.shape[:2]] + [chosen.block_s, chosen.block_t]

    def measure(candidate: Configuration) -> float:
        return run_milliseconds(lambda: run_loss(student, teacher, relation, need_grad, candidate, "none"))

    with guard(student.device):
        return autotune("-".join(map(str, case)), relation_kernel.cache_key, chosen, measure)


@functools.lru_cache(maxsize=1024)
def hand_chosen(device: torch.device, numbers: str, channels_s: int, channels_t: int) -> Configuration:
    """Return the configuration from the table."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return configuration(capability, numbers, channels_s, channels_t)


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the backend cannot run on ``device`` and what to do, or None if it can."""
    if triton is None:
        return "the package triton is not installed: pip install triton"
    if INTERPRET and device.type == "cpu":
        return None
    if reason := cuda_device.unavailable_reason(device):
        return reason
    return None if has_c_compiler() else "Triton needs a C compiler and finds none: install gcc, or set CC to its path"


@functools.cache
def has_c_compiler() -> bool:
    """Return whether Triton finds a C compiler, with which it builds the code that launches kernels."""
    return bool(os.environ.get("CC") or triton.knobs.build.impl or shutil.which("gcc") or shutil.which("clang"))
