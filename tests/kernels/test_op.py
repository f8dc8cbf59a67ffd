"""The operators in C++ and in Python under opcheck, torch.compile, autocast and unusual backward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers import distances, error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from srpkd import SRPLoss, relation_loss
from srpkd.kernels import Relation, native, op, unavailable_reason
from srpkd.kernels.op import relation_loss_backward_op, relation_loss_op

HALVES = [torch.bfloat16, torch.float16]
ROW_L1 = {"normalize": "row", "distance": "l1"}
# in eager mode one backend of each kind is enough: the Python operator does not depend on the backend, and "native" is
# the C++ operator
CPU_BACKENDS = [
    name for name in ("blocked", "closed_form", "native") if unavailable_reason(name, torch.device("cpu")) is None
]
needs_native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="native cannot be built")
operators = pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "closed_form"])


def images(
    batch: int = 2,
    channels: tuple[int, int] = (5, 7),
    size: int = 6,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    """Student (B, C_s, H, W), which requires a gradient, and teacher (B, C_t, H, W)."""
    student, teacher = (
        torch.randn(batch, count, size, size, dtype=dtype).contiguous(memory_format=memory_format) for count in channels
    )
    return student.requires_grad_(), teacher


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "normalize", "distance", "dtype"),
    [
        ("blocked", "row", "l1", torch.float32),
        ("blocked", "none", "huber", torch.float16),
        ("closed_form", "cosine", "l2", torch.bfloat16),
    ],
)
@pytest.mark.core(1)
def test_opcheck_of_python(backend: str, normalize: str, distance: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 9, 3, dtype=dtype), torch.randn(2, 4, 9, dtype=dtype).mT
    for need_grad in (True, False):
        flags = backend == "blocked", normalize == "cosine"
        leaf = student.clone().requires_grad_(need_grad)
        inputs = leaf, teacher, normalize, distance, 0.5, 1e-12, *flags, backend, need_grad
        torch.library.opcheck(relation_loss_op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_backward_of_python(dtype: torch.dtype) -> None:
    for upstream in (torch.rand(2), torch.ones(()).expand(2)):
        torch.library.opcheck(relation_loss_backward_op, (torch.randn(2, 3, 9).mT, upstream, dtype))


def cpp(name: str) -> torch._ops.OpOverload:
    """An operator of the extension."""
    native.extension()
    return getattr(torch.ops.srpkd, name).default


@needs_native
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 3, 4, 4), "nchw"), ((2, 4, 4, 3), "nhwc"), ((2, 9, 3), "nlc"), ((3, 4, 4), "nchw"), ((9, 3), "nlc")],
    ids=str,
)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.core(3)
def test_opcheck(shape: tuple[int, ...], layout: str, scope: str) -> None:
    for reduction, need_grad, dtype in (("mean", True, torch.float32), ("none", False, torch.float16)):
        student, teacher = torch.randn(shape).to(dtype).requires_grad_(need_grad), torch.randn(shape).to(dtype)
        inputs = student, teacher, "row", "l1", 1.0, 1e-12, need_grad, True, reduction, layout, scope, "tiles"
        torch.library.opcheck(cpp("relation_loss"), inputs)


@needs_native
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_forward(dtype: torch.dtype, need_grad: bool) -> None:
    student, teacher = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 4, 9).to(dtype).mT
    for reduction in ("mean", "sum", "none"):
        inputs = student, teacher, "cosine", "huber", 0.5, 1e-12, True, need_grad, reduction, "tiles", need_grad
        torch.library.opcheck(cpp("relation_loss_forward"), inputs)


@needs_native
def test_forward_records_no_graph() -> None:
    """Called by itself, with a student that requires a gradient: the formulas write into the outputs."""
    student, teacher = torch.randn(1, 1100, 3), torch.randn(1, 1100, 4)  # too many pixels for whole matrices
    inputs = teacher, *Relation("row", "l1").arguments, "none", "tiles", True
    found = cpp("relation_loss_forward")(student.clone().requires_grad_(), *inputs)
    for one, other in zip(found, cpp("relation_loss_forward")(student, *inputs), strict=True):
        assert torch.equal(one, other)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_backward(dtype: torch.dtype) -> None:
    for upstream in (torch.rand(2), torch.ones(()).expand(2), torch.rand(())):
        torch.library.opcheck(cpp("relation_loss_backward"), (torch.randn(2, 3, 9).mT, upstream, dtype))


MAP = torch.ones(2, 3, 4, 4)


@needs_native
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({0: MAP[0]}, ValueError, "expected features of 4 or 3 dimensions with layout"),
        ({0: MAP[0, 0], 1: MAP[0, 0]}, ValueError, "expected features of 4 or 3 dimensions with layout"),
        ({1: MAP[:1]}, ValueError, r"expected student \(B, N, C_s\) and teacher \(B, N, C_t\)"),
        ({1: MAP[..., :3]}, ValueError, r"expected student \(B, N, C_s\)"),
        ({1: MAP.to("meta")}, ValueError, "on one device, received cpu and meta"),
        ({0: MAP.long(), 1: MAP.long()}, TypeError, "one floating-point dtype, received Long"),
        ({2: "rows"}, ValueError, 'expected normalize="row", "cosine" or "none", received "rows"'),
        ({3: "l3"}, ValueError, 'expected distance="l1", "l2" or "huber", received "l3"'),
        ({8: "max"}, ValueError, 'expected reduction="mean", "sum" or "none", received "max"'),
        ({9: "chw"}, ValueError, 'expected layout="nchw", "nhwc" or "nlc", received "chw"'),
        ({10: "global"}, ValueError, 'expected scope="image" or "batch", received "global"'),
        ({11: "tile"}, ValueError, 'expected method="tiles" or "closed_form", received "tile"'),
        ({11: "closed_form"}, ValueError, 'supports distance="l2" without rectify only'),
        ({11: "closed_form", 3: "l2", 6: True}, ValueError, 'supports distance="l2" without rectify only'),
        ({11: "closed_form", 3: "l2"}, NotImplementedError, 'not implemented for the CPU: use method="tiles"'),
    ],
    ids=lambda value: None,
)
def test_operator_checks_its_arguments(change: dict, kind: type, message: str) -> None:
    arguments = MAP, MAP, "row", "l1", 1.0, 1e-12, False, False, "mean", "nchw", "image", "tiles"
    changed = [change.get(index, value) for index, value in enumerate(arguments)]
    with pytest.raises(kind, match=message):
        cpp("relation_loss")(*changed)


class Recorder(TorchDispatchMode):
    """Records the operators that run, and whether those of this package compute a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.need_grad: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.name() in ("srpkd::relation_loss_forward", "srpkd::python_relation_loss"):
            self.need_grad.append(args[-1])
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nlc"])
def test_eager_call_is_one_operator_in_cpp(layout: str) -> None:
    """Beside views, forward and backward are one operator each, and none of them is in Python."""
    student, teacher = images()
    if layout != "nchw":
        student, teacher = (x.detach().permute(0, 2, 3, 1) for x in (student, teacher))
    if layout == "nlc":
        student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
    loss_fn = SRPLoss(**ROW_L1, layout=layout, backend="native")
    loss_fn(student, teacher)
    student.requires_grad_()
    with Recorder() as recorder:
        torch.autograd.grad(loss_fn(student, teacher), student)
    views = {"aten::view", "aten::flatten.using_ints", "aten::transpose.int", "aten::detach"}
    assert [name for name in recorder.names if name not in views] == [
        "srpkd::relation_loss_forward",
        "aten::ones_like",  # the upstream gradient
        "srpkd::relation_loss_backward",
    ]
    # of the features of both networks, of the gradient, and two by autograd; each takes about a microsecond
    assert len(recorder.names) - 3 == {"nchw": 8, "nhwc": 5, "nlc": 2}[layout]


@needs_native
def test_vmap() -> None:
    student, teacher = (x.detach() for x in images(batch=3))
    losses = torch.vmap(lambda s, t: relation_loss(s, t, backend="native", **ROW_L1))(student, teacher)
    assert torch.equal(losses, relation_loss(student, teacher, reduction="none", backend="native", **ROW_L1))


def test_eager_mode_does_not_call_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(op, "relation_loss_op", unexpected)
    monkeypatch.setattr(op, "relation_loss_backward_op", unexpected)
    student, teacher = images()
    relation_loss(student, teacher, **ROW_L1, backend="blocked").backward()
    assert student.grad.abs().sum() > 0
    with torch.no_grad():
        relation_loss(torch.nn.Parameter(student.detach()), teacher, **ROW_L1, backend="blocked")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_and_eager_mode_give_the_same_bits(dtype: torch.dtype, reduction: str) -> None:
    results = []
    for mode in (nullcontext(), Recorder()):
        torch.manual_seed(0)
        student, teacher = images(3, dtype=dtype)
        with mode:
            loss = relation_loss(student, teacher, **ROW_L1, backend="blocked", reduction=reduction)
            results.append((loss, torch.autograd.grad(loss, student, 4096 * torch.ones_like(loss))[0]))
    assert mode.names.count("srpkd::python_relation_loss") == 1
    assert mode.names.count("srpkd::python_relation_loss_backward") == 1
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_transformations_see_the_operator() -> None:
    """Fake tensors and traces must not reach the kernels."""
    student, teacher = (x.detach() for x in images())

    def loss(student: Tensor) -> Tensor:
        return relation_loss(student, teacher, **ROW_L1, backend="blocked")

    graph = make_fx(loss)(student)
    assert "srpkd.python_relation_loss.default" in graph.code
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(student)).shape == ()


@pytest.mark.parametrize("options", [{}, ROW_L1, {"scope": "batch"}, {"backend": "reference"}])
def test_traced_with_symbolic_sizes(options: dict) -> None:
    """One trace serves every size, with the backend that ``auto`` chooses for it."""
    graph = make_fx(lambda student, teacher: relation_loss(student, teacher, **options), tracing_mode="symbolic")(
        *(x.detach() for x in images())
    )
    student, teacher = torch.randn(3, 5, 4, 7), torch.randn(3, 9, 4, 7)
    torch.testing.assert_close(graph(student, teacher), relation_loss(student, teacher, **options))


# --- backward -------------------------------------------------------------------------------------------------------


@operators
def test_gradient_is_computed_only_if_needed(backend: str) -> None:
    student, teacher = images()
    with Recorder() as recorder:
        with_gradient = relation_loss(student, teacher, backend=backend, **ROW_L1)
        with torch.no_grad():
            without = relation_loss(student, teacher, backend=backend, **ROW_L1)
        detached = relation_loss(student.detach(), teacher, backend=backend, **ROW_L1)
    assert recorder.need_grad == [True, False, False]
    assert with_gradient.requires_grad
    assert not without.requires_grad
    assert not detached.requires_grad
    assert torch.equal(with_gradient, without)
    assert torch.equal(with_gradient, detached)
    with torch.inference_mode():
        assert torch.equal(relation_loss(student, teacher, backend=backend, **ROW_L1), without)


def test_no_gradient_is_returned_unless_needed() -> None:
    student, teacher = (x.detach().flatten(2).mT for x in images())
    for need_grad, size in ((True, student.numel()), (False, 0)):
        _, gradient = relation_loss_op(student, teacher, "row", "l1", 1.0, 1e-12, False, False, "blocked", need_grad)
        assert gradient.numel() == size


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backward_twice(backend: str) -> None:
    student, teacher = images()
    loss = relation_loss(student, teacher, normalize="row", distance="l2", backend=backend)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(loss, student, torch.tensor(-3.0))
    torch.testing.assert_close(third, -3 * first)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, student)


@operators
@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
def test_expanded_upstream_gradient(upstream: float, backend: str) -> None:
    """An upstream gradient with stride 0, as from ``.sum()`` and ``.mean()``."""
    student, teacher = images(batch=3)
    loss = relation_loss(student, teacher, reduction="none", backend=backend, **ROW_L1)
    expanded, full = torch.tensor(upstream).expand(3), torch.full((3,), upstream)
    gradients = [torch.autograd.grad(loss, student, each, retain_graph=True)[0] for each in (expanded, full)]
    assert torch.equal(*gradients)
    strided = torch.full((6,), upstream)[::2]
    assert torch.equal(torch.autograd.grad(loss, student, strided)[0], gradients[0])


@operators
def test_upstream_gradient_of_each_image(backend: str) -> None:
    student, teacher = images(batch=3)
    loss = relation_loss(student, teacher, reduction="none", backend=backend, **ROW_L1)
    upstream = torch.tensor([0.0, 1.0, -4.0])
    (weighted,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, student, torch.ones(3))
    torch.testing.assert_close(weighted, plain * upstream.view(-1, 1, 1, 1))


@operators
def test_double_backward(backend: str) -> None:
    student, teacher = images(dtype=torch.float64)
    student_loss = relation_loss(student, teacher, normalize="row", distance="l2", backend=backend)
    (gradient,) = torch.autograd.grad(student_loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not support double backward.*backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), student)
    (gradient,) = torch.autograd.grad(
        relation_loss(student, teacher, normalize="row", distance="l2", backend="reference"), student, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.isfinite().all()


def test_loss_scaling_saves_float16() -> None:
    """The gradient of a mean over N^2 pairs underflows in float16, but not with a loss scale as by GradScaler."""
    student, teacher = images(1, (32, 32), 40)
    exact = torch.autograd.grad(relation_loss(student, teacher, **ROW_L1), student)[0]
    half, scale = student.detach().half().requires_grad_(), 2.0**16
    (gradient,) = torch.autograd.grad(relation_loss(half, teacher.half(), **ROW_L1) * scale, half)
    assert gradient.dtype == torch.float16
    assert exact.abs().median() < 2.0**-24 * 16
    assert error(gradient.float() / scale, exact) < 5e-2  # of rounding the features
    assert gradient.count_nonzero() > 0.99 * gradient.numel()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient_has_the_strides_of_the_student(
    backend: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    student, teacher = images(dtype=dtype, memory_format=memory_format)
    loss = relation_loss(student, teacher, normalize="row", distance="l2", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient.dtype, gradient.stride()) == (dtype, student.stride())


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *CPU_BACKENDS])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Autocast does not round the products of the formulas to 16 bits."""
    student, teacher = images(dtype=dtype)
    distance = distances(backend)[0]
    expected = relation_loss(student, teacher, normalize="row", distance=distance, backend=backend)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, teacher, normalize="row", distance=distance, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


def test_features_made_under_autocast() -> None:
    """A bfloat16 student and a float32 teacher, as autocast produces them."""
    layer, image, teacher = torch.nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8), torch.randn(2, 7, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        student = layer(image)
        loss = SRPLoss(**ROW_L1)(student, teacher)
    assert student.dtype == torch.bfloat16
    assert torch.equal(loss, relation_loss(student.detach().float(), teacher, **ROW_L1))
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0


# --- compile --------------------------------------------------------------------------------------------------------


def compiled_equals_eager(loss_fn: Callable[[Tensor, Tensor], Tensor], compiler: str, **sizes: object) -> None:
    """Values and gradients of one compiled graph equal those of eager mode."""

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        return 3 * loss_fn(student * 2 - 1, teacher).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    student, teacher = images(**sizes)
    pairs = []
    for function in (step, compiled):
        value = function(student, teacher)
        pairs.append((value.detach(), *torch.autograd.grad(value, student)))
    torch.testing.assert_close(pairs[1], pairs[0])
    assert pairs[1][1].stride() == pairs[0][1].stride()
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher), pairs[0][0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "loss_fn",
    [
        SRPLoss(**ROW_L1),
        SRPLoss(reduction="none"),
        SRPLoss(**ROW_L1, backend="reference"),
        pytest.param(SRPLoss(**ROW_L1, backend="native"), marks=needs_native),
    ],
    ids=["row-l1", "cosine-l2", "reference", "native"],
)
@pytest.mark.core(2)
def test_compiled_graph(loss_fn: SRPLoss) -> None:
    compiled_equals_eager(loss_fn, "aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_graph_of_half_precision_channels_last() -> None:
    compiled_equals_eager(SRPLoss(**ROW_L1), "aot_eager", dtype=torch.float16, memory_format=torch.channels_last)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPKD_BACKEND", "blocked")
    compiled_equals_eager(SRPLoss(**ROW_L1), "aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_dynamic_shapes() -> None:
    """One graph serves every size."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(SRPLoss(**ROW_L1), fullgraph=True, dynamic=True, backend=count)
    for batch, size in ((2, 6), (3, 9), (5, 4)):
        student, teacher = images(batch, size=size)
        loss, expected = compiled(student, teacher), SRPLoss(**ROW_L1)(student, teacher)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (loss, expected)))
    assert len(graphs) == 1


@needs_native
@pytest.mark.usefixtures("fresh_compiler")
def test_operator_in_a_compiled_graph() -> None:
    """The C++ operator can be traced, with its backward pass."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        options = "row", "l1", 1.0, 1e-12, False, False, "mean", "nchw", "image", "tiles"
        return cpp_relation_loss(student, teacher, *options)

    cpp_relation_loss = cpp("relation_loss")
    compiled_equals_eager(loss, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor() -> None:
    compiled_equals_eager(SRPLoss(**ROW_L1), "inductor")
