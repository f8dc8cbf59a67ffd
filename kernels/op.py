"""The operator ``srpkd::python_relation_loss``, with its fake and autograd registrations.

The forward pass computes the gradient together with the loss, since both need the same tiles. Backward only scales it,
out of place, so that it can run twice.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .dispatch import compute_loss
from .formulas import Distance, Normalize, Relation, accumulator, gradient_dtype


@torch.library.custom_op("srpkd::python_relation_loss", mutates_args=())
def relation_loss_op(
    student: Tensor,
    teacher: Tensor,
    normalize: str,
    distance: str,
    delta: float,
    eps: float,
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and its gradient (B, N, C_s), which is empty without need_grad.

    The features are (B, N, C_s) and (B, N, C_t).
    """
    # the schema of an operator has no Literal types
    relation = Relation(cast(Normalize, normalize), cast(Distance, distance), delta, eps)
    # autocast would round the products of the formulas to 16 bits
    with torch.autocast(student.device.type, enabled=False):
        loss, gradient = compute_loss(student, teacher, relation, backend, need_grad)
    return loss, student.new_empty(0) if gradient is None else gradient


@relation_loss_op.register_fake
def _(student, teacher, normalize, distance, delta, eps, backend, need_grad):
    loss = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else student.new_empty(0)
    return loss, gradient


@torch.library.custom_op("srpkd::python_relation_loss_backward", mutates_args=())
def relation_loss_backward_op(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient (B, N, C_s) times the upstream gradient (B,) of each image's loss, in the student's dtype."""
    return torch.mul(gradient, grad_loss.view(-1, 1, 1), out=torch.empty_like(gradient, dtype=dtype))


@relation_loss_backward_op.register_fake
def _(gradient, grad_loss, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype, ctx.need_grad = inputs[0].dtype, inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss: Tensor | None, _: Tensor | None):
    gradient = None
    if ctx.need_grad and grad_loss is not None:
        gradient = relation_loss_backward_op(ctx.saved_tensors[0], grad_loss, ctx.dtype)
    return gradient, *[None] * 7


def _backward_of_backward(ctx, grad):
    raise RuntimeError(
        "the relation loss does not support double backward: use backend='reference', which does, or exclude the loss "
        "from what is differentiated twice"
    )


relation_loss_op.register_autograd(_backward, setup_context=_setup_context)
relation_loss_backward_op.register_autograd(_backward_of_backward)
