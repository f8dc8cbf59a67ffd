"""The loss under forward-mode differentiation and torch.func, which ``reference`` supports, and on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from srpkd import relation_loss
from srpkd.kernels import BACKENDS, unavailable_reason

COLUMNS = {"distance": "l1", "columns": 3}
every_backend = pytest.mark.parametrize(
    "options",
    [
        *(
            {"backend": name}
            for name in BACKENDS
            if name != "reference" and unavailable_reason(name, torch.device("cpu")) is None
        ),
        COLUMNS,
    ],
    ids=str,
)


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student (2, 5, 6, 6), which requires a gradient, and teacher (2, 7, 6, 6)."""
    student, teacher = (torch.randn(2, channels, 6, 6, dtype=dtype) for channels in (5, 7))
    return student.requires_grad_(), teacher


@every_backend
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(options: dict, requires_grad: bool) -> None:
    """Without a formula for it, the tangent would be lost."""
    student, teacher = (x.detach() for x in images())
    message = "forward-mode differentiation: use backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: relation_loss(x, teacher, **options), (student,), (student,))
    with forward_ad.dual_level():
        relation_loss(student, teacher, **options)  # which has no tangent
        with pytest.raises(NotImplementedError, match=message):
            relation_loss(forward_ad.make_dual(student.requires_grad_(requires_grad), student), teacher, **options)


@every_backend
def test_function_transforms_raise(options: dict) -> None:
    student, teacher = (x.detach() for x in images())

    def loss(x: Tensor) -> Tensor:
        return relation_loss(x, teacher, **options)

    message = "torch.func.grad, vjp and jacrev: use backend='reference'"
    for call in (
        torch.func.grad(loss),
        torch.func.jacrev(loss),
        torch.func.grad(lambda x: torch.vmap(loss)(x[None]).sum()),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call(student)
    # what is not differentiated is no obstacle
    torch.func.grad(lambda x: x.sum() + loss(x.detach()) + loss(student))(student)
    with_metric = torch.func.grad(lambda x: x.sum() * torch.no_grad(loss)(x))
    if "columns" not in options:
        torch.testing.assert_close(with_metric(student), loss(student).expand_as(student))


@pytest.mark.parametrize("options", [{}, {"backend": "blocked", "distance": "l1"}], ids=str)
@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.vjp, torch.func.grad, torch.func.jacrev])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_transforms_raise(compiler: str, options: dict, transform: Callable) -> None:
    """Where torch.compile traces the operator, torch reports reverse mode: its autograd function has no rule for it."""
    torch.compiler.reset()  # or what happens depends on the failures of tests before this one
    student, teacher = (x.detach() for x in images())

    @torch.compile(backend=compiler)
    def differentiate(x: Tensor) -> object:
        def loss(x: Tensor) -> Tensor:
            return relation_loss(x, teacher, **options)

        if transform is torch.func.jvp:
            return transform(loss, (x,), (x,))[0]
        return transform(loss, x)[0] if transform is torch.func.vjp else transform(loss)(x)

    message = "use backend='reference'" + ("" if transform is torch.func.jvp else "|setup_context")
    with pytest.raises(RuntimeError, match=message):
        differentiate(student)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own: vmap runs the operator in a loop
@every_backend
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.core(3)
def test_gradient_through_vmap(options: dict, compiled: bool) -> None:
    student, teacher = images()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return relation_loss(student, teacher, **options)

    mapped = torch.vmap(loss, randomness="different")
    if compiled:
        mapped = torch.compile(mapped, backend="aot_eager")
    losses = mapped(student, teacher)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    if "columns" in options:  # each image draws other pixels
        assert losses.shape == (2,) and all(image.any() for image in gradient)
        return
    expected = [loss(*pair) for pair in zip(student, teacher)]
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(expected), student)[0])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_batches(options: dict, dtype: torch.dtype) -> None:
    """Several upstream gradients at once, by vmap over the backward pass."""
    student, teacher = images(dtype)
    losses = relation_loss(student, teacher, reduction="none", **options)
    expected = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
    (batched,) = torch.autograd.grad(losses, student, torch.eye(2), is_grads_batched=True, retain_graph=True)
    assert torch.equal(batched, torch.stack(expected))
    mapped = torch.vmap(lambda upstream: torch.autograd.grad(losses, student, upstream, retain_graph=True)[0])
    assert torch.equal(mapped(torch.eye(2)), batched)


def test_reference_under_function_transforms() -> None:
    student, teacher = images()

    def loss(x: Tensor) -> Tensor:
        return relation_loss(x, teacher, backend="reference")

    (expected,) = torch.autograd.grad(loss(student), student)
    student = student.detach()
    torch.testing.assert_close(torch.func.grad(loss)(student), expected)
    tangent = torch.randn_like(student)
    torch.testing.assert_close(torch.func.jvp(loss, (student,), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.parametrize(
    "options", [{}, {"normalize": "row", "distance": "l1"}, COLUMNS, {"backend": "reference"}], ids=str
)
def test_meta_tensors(options: dict) -> None:
    """They have the shapes and dtypes of the results, as in a dry run of a network on the meta device."""
    student, teacher = (x.detach().to("meta") for x in images(torch.bfloat16))
    for reduction, shape in (("none", (2,)), ("mean", ())):
        loss = relation_loss(student.requires_grad_(), teacher, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert (loss.shape, loss.dtype, loss.device.type) == (shape, torch.float32, "meta")
        assert (gradient.shape, gradient.dtype, gradient.device.type) == (student.shape, torch.bfloat16, "meta")
