"""The operator ``srpkd::relation_loss``: what torch.compile, autograd and autocast see of the engine.

The gradient is computed together with the loss, in the forward pass: both need the same tiles. Backward
only scales it, out of place, so that it may run twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import value_and_gradient
from .formulas import Relation, accumulator, gradient_dtype


@torch.library.custom_op("srpkd::relation_loss", mutates_args=())
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
    """Loss (B,) and its gradient (B, N, C_s), empty unless need_grad, of raw features (B, N, C_s), (B, N, C_t)."""
    relation = Relation(normalize, distance, delta, eps)
    # autocast would round the algebra's products to 16 bits
    with torch.autocast(student.device.type, enabled=False):
        loss, gradient = value_and_gradient(student, teacher, relation, backend, need_grad)
    return loss, student.new_empty(0) if gradient is None else gradient


@relation_loss_op.register_fake
def _(student, teacher, normalize, distance, delta, eps, backend, need_grad):
    loss = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else student.new_empty(0)
    return loss, gradient


@torch.library.custom_op("srpkd::relation_loss_backward", mutates_args=())
def relation_loss_backward_op(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient (B, N, C_s) times the upstream gradient (B,) of each image's loss, in the student's dtype."""
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
        "the relation loss cannot be differentiated twice; use backend='reference', which can, "
        "or leave the loss out of what is differentiated twice"
    )


relation_loss_op.register_autograd(_backward, setup_context=_setup_context)
relation_loss_backward_op.register_autograd(_backward_of_backward)
