"""The loss of the backends that are written in Python, as an operation that autograd and torch.compile understand.

The forward pass computes the gradient together with the loss, since both need the same tiles. Backward only scales it,
out of place, so that it can run twice.

``python_relation_loss`` calls a backend through an autograd.Function. Where something other than eager mode handles the
call (torch.compile, fake tensors, a dispatch mode, functorch, a tensor subclass), it calls the operator
``srpkd::python_relation_loss``, which takes longer on the host.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from .dispatch import backend_module, compute_loss, unavailable_reason
from .formulas import Distance, Normalize, Relation, accumulator, gradient_dtype


def python_relation_loss(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    backend: str,
    reduction: str = "none",
    columns: Tensor | None = None,
) -> Tensor:
    """Return the loss of each image (B,), or with ``reduction`` "mean" or "sum" that of the batch ().

    Args:
        student: raw features (B, N, C_s), any strides.
        teacher: raw features (B, N, C_t), same device and dtype, without a gradient.
        backend: "auto", or a name from BACKENDS other than "reference".
        columns: (B, S, m) from ``sampling.draw_columns``, for an estimate from these columns.
    """
    need_grad = student.requires_grad and torch.is_grad_enabled()
    if not _is_eager(student, teacher):
        loss, _ = relation_loss_op(
            student,
            teacher,
            *relation.arguments,
            backend,
            need_grad,
            columns,
        )
        return _reduced(loss, reduction)
    if need_grad:
        return _RelationLoss.apply(student, teacher, relation, backend, reduction, columns)[0]
    return _reduced(_loss_and_gradient(student, teacher, relation, backend, need_grad, columns)[0], reduction)


def _is_eager(student: Tensor, teacher: Tensor) -> bool:
    """Return whether the kernels run at once on these tensors, with no transformation that would trace them."""
    return not (
        torch.compiler.is_compiling()
        or not all(type(features) in (Tensor, torch.nn.Parameter) for features in (student, teacher))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, backend: str, need_grad: bool, columns: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``compute_loss`` without autocast, which would round the products of the formulas to 16 bits."""
    kind = student.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return compute_loss(student, teacher, relation, backend, need_grad, columns)


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, weight: float = 1.0) -> Tensor:
    """Return gradient (B, N, C_s) times weight times the upstream gradient, () or (B,), rounded to ``dtype`` once."""
    if (kernels := _gpu_kernels(gradient.device)) is not None and _is_eager(gradient, grad_loss):
        result = kernels.scaled_gradient(gradient, grad_loss, dtype, weight)
        if result is not None:
            return result
    factor = grad_loss if weight == 1 else grad_loss * weight
    return torch.mul(gradient, factor.view(-1, 1, 1), out=torch.empty_like(gradient, dtype=dtype))


@functools.cache
def _gpu_kernels(device: torch.device) -> ModuleType | None:
    """Return the module of backend ``triton``, for its product in backward, or None if it cannot run on the device."""
    if device.type != "cuda" or unavailable_reason("triton", device) is not None:
        return None
    return backend_module("triton")


# -- eager mode ------------------------------------------------------------------------------------------------------


class _RelationLoss(torch.autograd.Function):
    """Return the reduced loss, and its gradient (B, N, C_s) without the reduction's 1/B.

    The gradient is an output so that a second differentiation reaches this function, which reports it.
    """

    @staticmethod
    def forward(ctx, student, teacher, relation, backend, reduction, columns):
        loss, gradient = _loss_and_gradient(student, teacher, relation, backend, True, columns)
        ctx.dtype, ctx.weight = student.dtype, 1 / len(loss) if reduction == "mean" else 1.0
        ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        return _reduced(loss, reduction), gradient

    @staticmethod
    def backward(ctx, grad_loss, grad_gradient):
        gradient = None
        if grad_loss is not None:
            (gradient,) = ctx.saved_tensors
            if torch.is_grad_enabled():
                # autograd records this only for double backward, of which the operator reports that it is not supported
                gradient = relation_loss_backward_op(gradient, grad_loss * ctx.weight, ctx.dtype)
            else:
                gradient = _scaled(gradient, grad_loss, ctx.dtype, ctx.weight)
        return gradient, None, None, None, None, None


# -- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("srpkd::python_relation_loss", mutates_args=())
def relation_loss_op(
    student: Tensor,
    teacher: Tensor,
    normalize: str,
    distance: str,
    delta: float,
    eps: float,
    rectify: bool,
    detach_norms: bool,
    backend: str,
    need_grad: bool,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and its gradient (B, N, C_s), which is empty without need_grad.

    The features are (B, N, C_s) and (B, N, C_t), sampled columns (B, S, m).
    """
    # the schema of an operator has no Literal types
    relation = Relation(cast(Normalize, normalize), cast(Distance, distance), delta, eps, rectify, detach_norms)
    loss, gradient = _loss_and_gradient(student, teacher, relation, backend, need_grad, columns)
    return loss, student.new_empty(0) if gradient is None else gradient


@relation_loss_op.register_fake
def _(student, teacher, normalize, distance, delta, eps, rectify, detach_norms, backend, need_grad, columns=None):
    loss = student.new_empty(student.shape[0], dtype=accumulator(student.dtype))
    gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if need_grad else student.new_empty(0)
    return loss, gradient


@torch.library.custom_op("srpkd::python_relation_loss_backward", mutates_args=())
def relation_loss_backward_op(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient (B, N, C_s) times the upstream gradient, () or of each image (B,), in the student's dtype."""
    return _scaled(gradient, grad_loss, dtype)


@relation_loss_backward_op.register_fake
def _(gradient, grad_loss, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype, ctx.need_grad = inputs[0].dtype, inputs[9]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss: Tensor | None, _: Tensor | None):
    gradient = None
    if ctx.need_grad and grad_loss is not None:
        gradient = relation_loss_backward_op(ctx.saved_tensors[0], grad_loss, ctx.dtype)
    return gradient, *[None] * 10


def _backward_of_backward(ctx, grad):
    raise RuntimeError(
        "the relation loss does not support double backward: use backend='reference', which does, or exclude the loss "
        "from what is differentiated twice"
    )


relation_loss_op.register_autograd(_backward, setup_context=_setup_context)
relation_loss_backward_op.register_autograd(_backward_of_backward)
