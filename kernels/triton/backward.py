"""The product of the gradient and the upstream gradient, in backward, as a Triton kernel.

PyTorch's product does not vectorise a factor that is broadcast, and takes a launch more for the weight of the mean.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .configurations import BLOCK_BACKWARD, DTYPES, OPTIONS
from .plans import Plan, planned
from .primitives import jit, load_vector, store_vector, tl, to_bfloat16, triton

# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def backward_kernel(
    gradient_ptr,
    grad_loss_ptr,
    result_ptr,
    image_elements,
    image_blocks,
    upstream_stride,
    weight,
    BLOCK: tl.constexpr,
):
    """Multiply BLOCK adjacent elements of an image's gradient by weight times the image's upstream gradient."""
    image = (tl.program_id(0) // image_blocks).to(tl.int64)
    start = (tl.program_id(0) % image_blocks).to(tl.int64) * BLOCK
    factor = tl.load(grad_loss_ptr + image * upstream_stride) * weight
    gradient = load_vector(gradient_ptr + image * image_elements, start, image_elements, BLOCK)
    value = gradient.to(tl.float32) * factor
    if result_ptr.dtype.element_ty == tl.bfloat16:
        value = to_bfloat16(value)
    store_vector(result_ptr + image * image_elements, value, start, image_elements, BLOCK)


# -- launchers -------------------------------------------------------------------------------------------------------


def scaled_gradient(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, weight: float) -> Tensor | None:
    """Return weight * gradient * upstream gradient, rounded to ``dtype`` once; None if the kernel does not cover it.

    Args:
        gradient: (B, N, C).
        grad_loss: the upstream gradient, () or of each image (B,).
    """
    images = grad_loss.numel()
    if not (
        gradient.dtype in DTYPES
        and dtype in DTYPES
        and grad_loss.dtype == torch.float32
        and grad_loss.device == gradient.device
        and images in (1, gradient.shape[0])
        and gradient.numel()
    ):
        return None
    upstream = grad_loss.view(images)
    result = torch.empty_like(gradient, dtype=dtype)
    build = functools.partial(backward_plan, gradient, upstream, result, weight)
    plan = planned("backward", (gradient, upstream), build, dtype, weight)
    if plan is None:
        return None
    plan.run(gradient, upstream, result)
    return result


def backward_plan(gradient: Tensor, upstream: Tensor, result: Tensor, weight: float) -> Plan | None:
    """Return the plan that computes ``result`` of tensors like these, None if the kernel does not cover the strides."""
    images = len(upstream)
    if result.stride() != gradient.stride() or not _images_are_adjacent(gradient, images):
        return None
    plan = Plan(gradient.device)
    elements = gradient.numel() // images
    blocks = triton.cdiv(elements, BLOCK_BACKWARD)
    plan.launch(
        backward_kernel,
        (images * blocks,),
        plan.argument(gradient),
        plan.argument(upstream),
        plan.argument(result),
        elements,
        blocks,
        upstream.stride(0),
        weight,
        BLOCK=BLOCK_BACKWARD,
        **OPTIONS,
    )
    return plan


def _images_are_adjacent(gradient: Tensor, images: int) -> bool:
    """Return whether the memory of the gradient consists of that many parts of equal size, each of some images."""
    size = 1
    for stride, count in sorted(zip(gradient.stride(), gradient.shape)):
        if count > 1 and stride != size:
            return False
        size *= count
    return images == 1 or gradient.stride(0) * images == size
