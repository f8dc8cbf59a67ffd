"""The l2 distance in O(N C^2) as Triton kernels: four launches for "cosine", three for "none".

Features z_i = alpha_i q_i (student) and y_i = alpha_i p_i (teacher) give D_ij = z_i . z_j - y_i . y_j. With their
moments, the C x C sums over pixels

    M_ss = sum_i z_i z_i^T,  M_st = sum_i z_i y_i^T,  M_tt = sum_i y_i y_i^T

    sum_ij D_ij^2          = ||M_ss||^2 - 2 ||M_st||^2 + ||M_tt||^2       (Frobenius norms)
    V_i = 4 sum_j D_ij z_j = 4 (M_ss z_i - M_st y_i)
    N^2 dL/dq_i            = alpha_i (V_i - (z_i . V_i) z_i) for "cosine", V_i for "none"
                             alpha_i (V_i - 4 D_ii z_i) for "cosine" if the norms are constants

This direct form of the loss cancels as the student converges. If both networks have the same number of channels, the
loss is computed from f_i = z_i + y_i and e_i = z_i - y_i instead. D_ij = (f_i . e_j + e_i . f_j) / 2, and hence

    sum_ij D_ij^2 = (<S_ff, S_ee> + <S_fe, S_fe^T>) / 2,  S_fe = sum_i f_i e_i^T and so on

in which nothing large cancels: the relative error does not grow, and equal features give exactly 0.

Products are those of primitives.py: sums of bfloat16 terms. A tensor core rounds its sums towards zero, so it sums at
most 32 pixels; those sums are added in float32 over at most 1,024 pixels, and beyond in float64. docs/kernels.md has
the measured errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formulas import Relation, gradient_dtype
from ..plans import Plan, planned
from ..primitives import addressable
from ..scales import plan_scales
from .gradient import plan_gradient, plan_loss
from .moments import plan_moments
from .sums import plan_sums

NORMALIZATIONS = ("cosine", "none")


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the l2 loss of each image (B,) and its gradient (B, N, C_s) for ``normalize="cosine"`` or ``"none"``."""
    student, teacher = addressable(student), addressable(teacher)
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else None

    def build() -> Plan:
        plan = Plan(student.device)
        features, losses = (plan.argument(student), plan.argument(teacher)), plan.argument(loss)
        alpha_t = plan.scratch(*student.shape[:2]) if relation.normalize == "cosine" else None
        alpha_s, *others = plan_scales(plan, *features, relation, alpha_t).vectors
        for vector in others:  # only the tile kernel reads them
            if vector is not None:
                plan.free(vector)
        alphas = alpha_s, alpha_t
        moments = plan_moments(plan, *features, alphas)
        channels = (student.shape[2], teacher.shape[2])
        partials, factors = plan_sums(plan, moments, student.shape[1], channels, alphas, need_grad)
        if gradient is None or factors is None:
            plan_loss(plan, student.shape[1], partials, losses)
        else:
            outputs = losses, plan.argument(gradient)
            plan_gradient(plan, *features, alphas, partials, factors, *outputs, relation.detach_norms)
        return plan

    plan = planned("closed_form", student, teacher, relation, build, need_grad)
    plan.run(student, teacher, loss, *(() if gradient is None else (gradient,)))
    return loss, gradient
