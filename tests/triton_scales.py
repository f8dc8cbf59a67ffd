"""The scales that the kernels of backend ``triton`` compute, as tensors."""

from __future__ import annotations

from torch import Tensor

from srpkd.kernels import Relation, Scales
from srpkd.kernels.triton.plans import Plan
from srpkd.kernels.triton.scales import plan_scales


def triton_scales(student: Tensor, teacher: Tensor, relation: Relation) -> Scales:
    """Return what ``formulas.scales_of`` computes, for "row" or "cosine"."""
    plan = Plan(student.device)
    planned = plan_scales(plan, plan.argument(student), plan.argument(teacher), relation)
    bases = plan.run(student, teacher)
    alpha, _, power, mantissa = (vector.of(bases) for vector in planned.vectors if vector is not None)
    if (moments := planned.moments) is None:
        return Scales(alpha, mantissa * power, None)
    moment = moments.terms.of(bases).float().sum(0) * moments.size.of(bases).view(-1, 1, 1).square()
    return Scales(alpha, mantissa * power, moment)
