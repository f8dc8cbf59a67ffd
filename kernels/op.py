"""The loss of the backends that are written in Python, as an operation that autograd and torch.compile understand.

The forward pass computes the gradient together with the loss, since both need the same tiles. Backward only scales it,
out of place, so that it can run twice.

``python_relation_loss`` calls a backend through an autograd.Function. Where something other than eager mode handles the
call (torch.compile, fake and meta tensors, a dispatch mode, vmap, a tensor subclass), it calls the operator
``srpkd::python_relation_loss``, which takes longer on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import backend_module, compute_loss, unavailable_reason
from .formulas import Distance, Normalize, Relation, accumulator, gradient_dtype, reduced


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
    # inside torch.vmap a tensor does not tell whether it requires a gradient outside
    need_grad = torch.is_grad_enabled() and (student.requires_grad or torch._C._functorch.is_batchedtensor(student))
    if not _is_eager(student, teacher):
        loss, _ = relation_loss_op(
            student,
            teacher,
            *relation.arguments,
            backend,
            need_grad,
            columns,
        )
        return reduced(loss, reduction)
    compute = functools.partial(compute_loss, student, teacher, relation, backend, need_grad, columns, reduction)
    if need_grad:
        return differentiable_loss(student, compute, 1 / len(student) if reduction == "mean" else 1.0)
    return compute()[0]


def check_transforms(student: Tensor, teacher: Tensor) -> None:
    """Raise a NotImplementedError if a transformation would lose the derivative: only ``reference`` has them all."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(features).tangent is not None for features in (student, teacher)
    ):
        raise NotImplementedError(
            "the relation loss does not support forward-mode differentiation: use backend='reference', which does"
        )
    if torch.compiler.is_compiling():  # by an error of its own, it reports torch.func.grad
        return
    if torch._C._functorch.peek_interpreter_stack() is not None and _is_differentiated(student):
        raise NotImplementedError(
            "the relation loss does not support torch.func.grad, vjp and jacrev: use backend='reference', which does, "
            "or torch.autograd.grad"
        )


def _is_differentiated(features: Tensor) -> bool:
    """Return whether torch.func differentiates with respect to the features, at any level."""
    if not torch.is_grad_enabled():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(features):
        if functorch.is_gradtrackingtensor(features) and features.requires_grad:
            return True
        features = functorch.get_unwrapped(features)
    return False


def _is_eager(student: Tensor, teacher: Tensor) -> bool:
    """Return whether the kernels run at once on these tensors, with no transformation that would trace them."""
    return not (
        torch.compiler.is_compiling()
        or student.is_meta  # no backend can run, but the operator has the sizes of the results
        or not all(type(features) in (Tensor, torch.nn.Parameter) for features in (student, teacher))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, weight: float = 1.0) -> Tensor:
    """Return gradient (B, N, C_s) times weight times the upstream gradient, () or (B,), rounded to ``dtype`` once."""
    is_eager = _is_eager(gradient, grad_loss) and not torch._C._functorch.is_legacy_batchedtensor(grad_loss)
    if is_eager and (kernels := _gpu_kernels(gradient.device)) is not None:
        result = kernels.scaled_gradient(gradient, grad_loss, dtype, weight)
        if result is not None:
            return result
    factor = (grad_loss if weight == 1 else grad_loss * weight).view(-1, 1, 1)
    if not is_eager:  # such as is_grads_batched=True, which has no rule for out=
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@functools.cache
def _gpu_kernels(device: torch.device) -> ModuleType | None:
    """Return the module of backend ``triton``, for its product in backward, or None if it cannot run on the device."""
    if device.type != "cuda" or unavailable_reason("triton", device) is not None:
        return None
    return backend_module("triton")


# -- eager mode ------------------------------------------------------------------------------------------------------


def differentiable_loss(student: Tensor, compute: Callable[[], tuple[Tensor, Tensor | None]], weight: float) -> Tensor:
    """Return the loss that ``compute()`` returns, with a derivative with respect to ``student`` (B, N, C_s).

    ``compute`` also returns a gradient (B, N, C_s), of which ``weight`` times is the gradient of the loss.
    """
    return _RelationLoss.apply(student, compute, weight)[0]


class _RelationLoss(torch.autograd.Function):
    """Return the loss, and its gradient (B, N, C_s) without the weight.

    The gradient is an output so that a second differentiation reaches this function, which reports it.
    """

    @staticmethod
    def forward(ctx, student, compute, weight):
        loss, gradient = compute()
        ctx.dtype, ctx.weight = student.dtype, weight
        ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        return loss, gradient

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
        return gradient, None, None


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
    loss, gradient = compute_loss(student, teacher, relation, backend, need_grad, columns)
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
        "the relation loss does not support double backward: use backend='reference', which does (not with "
        "scope='global'), or exclude the loss from what is differentiated twice"
    )


relation_loss_op.register_autograd(_backward, setup_context=_setup_context)
relation_loss_backward_op.register_autograd(_backward_of_backward)
