"""The l2 distance in O(N C^2) as Triton kernels: seven launches for "row", four for "cosine", three for "none".

Let z_i = alpha_i q_i be the student's scaled features and y_i = alpha_i p_i the teacher's. For "cosine" and "none"
D_ij = z_i . z_j - y_i . y_j. With their moments, the C x C sums over pixels

    M_ss = sum_i z_i z_i^T,  M_st = sum_i z_i y_i^T,  M_tt = sum_i y_i y_i^T

    sum_ij D_ij^2          = ||M_ss||^2 - 2 ||M_st||^2 + ||M_tt||^2       (Frobenius norms)
    V_i = 4 sum_j D_ij z_j = 4 (M_ss z_i - M_st y_i)
    N^2 dL/dq_i            = alpha_i (V_i - (z_i . V_i) z_i) for "cosine", V_i for "none"
                             alpha_i (V_i - 4 D_ii z_i) for "cosine" if the norms are constants

This direct form of the loss cancels as the student converges. If both networks have the same number of channels, the
loss is computed from f_i = z_i + y_i and e_i = z_i - y_i instead. D_ij = (f_i . e_j + e_i . f_j) / 2, and hence

    sum_ij D_ij^2 = (<S_ff, S_ee> + <S_fe, S_fe^T>) / 2,  S_fe = sum_i f_i e_i^T and so on

in which nothing large cancels: the relative error does not grow, and equal features give exactly 0.

For "row" D_ij = z_i . q_j - y_i . p_j, and there are two stages: the moments M of the raw features, which determine
alpha, and the moments W of the scaled features. csrc/cuda/closed_form/arguments.h has the formulas and the reasons for
the gains. In the difference form, the second stage also needs W_d = sum_i d_i z_i z_i^T.

Products are those of primitives.py: sums of bfloat16 terms. A tensor core rounds its sums towards zero, so it sums at
most 32 pixels; those sums are added in float32 over at most 1,024 pixels, and beyond in float64. docs/kernels.md has
the measured errors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...formulas import Relation, gradient_dtype
from ..plans import Array, Plan, planned
from ..primitives import addressable
from ..scales import plan_scales
from .gradient import plan_gradient, plan_loss
from .moments import plan_moments
from .row import plan_gains, plan_row_scales
from .sums import Stage, plan_sums


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the l2 loss of each image (B,) and its gradient (B, N, C_s)."""
    student, teacher = addressable(student), addressable(teacher)
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else None
    build = functools.partial(closed_form_plan, student, teacher, loss, gradient, relation)
    plan = planned("closed_form", (student, teacher), build, relation, need_grad)
    plan.run(student, teacher, loss, *(() if gradient is None else (gradient,)))
    return loss, gradient


def closed_form_plan(
    student: Tensor, teacher: Tensor, loss: Tensor, gradient: Tensor | None, relation: Relation
) -> Plan:
    """Return the plan that computes ``loss`` and, unless it is None, ``gradient`` of tensors like these."""
    plan = Plan(student.device)
    features, losses = (plan.argument(student), plan.argument(teacher)), plan.argument(loss)
    result = None if gradient is None else plan.argument(gradient)
    if relation.normalize == "row":
        _plan_row(plan, *features, relation.eps, losses, result)
    else:
        _plan_symmetric(plan, *features, relation, losses, result)
    return plan


def _plan_symmetric(
    plan: Plan, student: Array, teacher: Array, relation: Relation, loss: Array, gradient: Array | None
) -> None:
    """Plan the launches for "cosine" and "none"."""
    batch, pixels, channels_s = student.shape
    alpha_t = plan.scratch(batch, pixels) if relation.normalize == "cosine" else None
    alpha_s, *others = plan_scales(plan, student, teacher, relation, alpha_t).vectors
    plan.free(*others)  # only the tile kernel reads them
    alphas = alpha_s, alpha_t
    moments = plan_moments(plan, student, teacher, alphas)
    channels = channels_s, teacher.shape[2]
    partials, factors = plan_sums(plan, moments, pixels, channels, alphas, gradient is not None)
    assert partials is not None, "only row stages have none"
    if gradient is None or factors is None:
        plan_loss(plan, pixels, partials, loss)
    else:
        plan_gradient(plan, student, teacher, alphas, partials, factors, loss, gradient, relation.detach_norms)


def _plan_row(plan: Plan, student: Array, teacher: Array, eps: float, loss: Array, gradient: Array | None) -> None:
    """Plan the launches for "row": two stages of moments and sums, the first on features times gains."""
    batch, pixels, channels_s = student.shape
    channels_t = teacher.shape[2]
    channels, difference = (channels_s, channels_t), channels_s == channels_t
    alphas = plan.scratch(batch, pixels), plan.scratch(batch, pixels)
    gains = plan_gains(plan, student, teacher, alphas)
    teacher_factor = plan.scratch(3, batch, channels_t, channels_t, dtype=torch.bfloat16)
    sums = plan.scratch(batch, 3, channels_s, channels_s) if difference else None
    first = Stage("first", gains, teacher_factor, sums)
    moments = plan_moments(plan, student, teacher, alphas)
    _, raw_factors = plan_sums(plan, moments, pixels, channels, alphas, True, stage=first)
    plan.free(moments)
    assert raw_factors is not None, "requested above"
    distances, partials = plan_row_scales(plan, student, teacher, alphas, gains, raw_factors, teacher_factor, eps)
    factors = None
    if difference or gradient is not None:  # the loss of the direct form needs no second stage
        count = 2 if not difference else 3 if gradient is None else 4
        moments = plan_moments(plan, student, teacher, alphas, count, distances)
        second = first._replace(name="second")
        of_sums, factors = plan_sums(plan, moments, pixels, channels, alphas, gradient is not None, count, second)
        partials = of_sums if difference else partials
    assert partials is not None, "either form computes them"
    if gradient is None or factors is None:
        plan_loss(plan, pixels, partials, loss)
    else:
        of_row = raw_factors, distances
        plan_gradient(plan, student, teacher, alphas, partials, factors, loss, gradient, False, of_row)
