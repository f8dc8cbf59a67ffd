"""Backend ``native`` on an NVIDIA GPU. tests/csrc/test_cuda_emulation.py tests the same kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers import DELTA, NARROW, RELATIONS, STRIDES, error, features, name_of, options, value_and_gradient
from rounding import assert_rounding
from torch import Tensor

from srpkd import relation_loss
from srpkd.kernels import NORMALIZATIONS, Relation, native, unavailable_reason
from srpkd.kernels.formulas import scales_of

CUDA = torch.device("cuda")
ROW_L1 = Relation("row", "l1", DELTA["row"])

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
every_relation = pytest.mark.parametrize("relation", RELATIONS, ids=name_of)


@pytest.fixture(autouse=True)
def _available() -> None:
    if (reason := unavailable_reason("native", CUDA)) is not None:
        pytest.skip(reason)


def draw(pixels: int, channels: tuple[int, int], dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor]:
    return features(None, batch, pixels, channels, dtype, CUDA)


def assert_accurate(student: Tensor, teacher: Tensor, relation: Relation) -> None:
    """The errors against float64 are what the rounding of the formats predicts."""
    upstream = 2.0**14 if student.dtype == torch.float16 else 1.0  # float16 gradients of a mean over pairs underflow
    result = value_and_gradient(student, teacher, relation, "native", upstream)
    assert_rounding(*result, student, teacher, relation, upstream)


# --- values -----------------------------------------------------------------------------------------------------------


@every_relation
@every_dtype
def test_error(dtype: torch.dtype, relation: Relation) -> None:
    assert_accurate(*draw(1000, (64, 100), dtype, batch=2), relation)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_float32_follows_the_matmul_precision(
    normalize: str, precision: str, set_precision: Callable[[str], None]
) -> None:
    set_precision(precision)
    assert_accurate(*draw(700, (64, 128), torch.float32), Relation(normalize, "l2"))


@pytest.mark.parametrize("pixels", [1, 2, 63, 64, 65, 1023])
@every_dtype
def test_any_number_of_pixels(dtype: torch.dtype, pixels: int) -> None:
    assert_accurate(*draw(pixels, (5, 6), dtype), ROW_L1)


@pytest.mark.parametrize("channels", [(1, 1), (3, 130), (65, 33), (128, 256), (300, 8), (512, 1024)], ids=str)
@every_dtype
def test_any_number_of_channels(dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """In the last case one row block does not fit into shared memory."""
    assert_accurate(*draw(200, channels, dtype), ROW_L1)


@pytest.mark.parametrize("strides", STRIDES)
@every_dtype
def test_any_strides(dtype: torch.dtype, strides: str) -> None:
    student, teacher = (torch.randn(2, count, 9, 14, device=CUDA).to(dtype) for count in (10, 7))
    expected = value_and_gradient(student, teacher, ROW_L1, "native", layout="nchw")
    for views in ((True, True), (True, False)):  # the layouts of the two may differ
        changed = (STRIDES[strides](x) if view else x for x, view in zip((student, teacher), views))
        actual = value_and_gradient(*changed, ROW_L1, "native", layout="nchw")
        assert all(error(one, other) < 1e-3 for one, other in zip(actual, expected))


def test_memory_of_a_large_map() -> None:
    student, teacher = draw(32768, (64, 64), torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, gradient = value_and_gradient(student, teacher, ROW_L1, "native")
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20  # one matrix would take 4 GB
    expected = value_and_gradient(student.float(), teacher.float(), ROW_L1, "blocked")
    assert error(loss, expected[0]) < 1e-5 and error(gradient, expected[1]) < 5e-3


def test_sizes_beyond_32_bits_are_an_error() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16, device="cuda")
    for shape in ((1, 2**32, 1), (2**32, 1, 1)):
        with pytest.raises(ValueError, match="expected features with sizes of at most 2\\^30"):
            native.loss_and_gradient(one.expand(shape), one.expand(shape), Relation("row", "l1"), need_grad=False)


def test_float64_is_an_error() -> None:
    with pytest.raises((NotImplementedError, ValueError), match=r"float64.*backend=|Double.*backend="):
        value_and_gradient(*draw(10, (2, 2), torch.float64), ROW_L1, "native")


# --- the launch -------------------------------------------------------------------------------------------------------


def training_step(
    student: Tensor, teacher: Tensor, relation: Relation = ROW_L1, reduction: str = "mean"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that computes the loss and its gradient, as a training step does."""
    upstream = torch.ones(len(student) if reduction == "none" else (), device=CUDA)

    def run() -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = relation_loss(leaf, teacher, layout="nlc", backend="native", reduction=reduction, **options(relation))
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(student.device))[0]

    return run


def launches(run: Callable[[], object]) -> list[str]:
    """Return the names of the kernels, copies and memsets that ``run`` starts on the GPU."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which launches kernels; a fixture restores it
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("normalize", "most"), [("row", 7), ("cosine", 4), ("none", 3)])
@every_dtype
def test_number_of_launches(dtype: torch.dtype, normalize: str, most: int, reduction: str) -> None:
    """All that a training step starts: no memset, and no PyTorch operator but the product in backward."""
    names = launches(training_step(*draw(500, (64, 100), dtype, batch=2), Relation(normalize, "l1"), reduction))
    assert len(names) <= most, names
    assert len([name for name in names if "srpkd" not in name]) <= 1, names


@every_dtype
def test_deterministic(dtype: torch.dtype) -> None:
    run = training_step(*draw(4096, (64, 128), dtype))
    first = run()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run()))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@every_dtype
def test_graph_capture(dtype: torch.dtype, normalize: str) -> None:
    student, teacher = draw(1000, (64, 64), dtype)
    run = training_step(student, teacher, Relation(normalize, "l1"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    student.copy_(torch.randn_like(student))
    for _ in range(2):  # the second replay finds the workspace, and its counters, as the first left them
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(captured, run()))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_no_synchronisation(normalize: str) -> None:
    run = training_step(*draw(500, (64, 64), torch.bfloat16), Relation(normalize, "l1"))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_stream() -> None:
    """The kernels read a tensor that slow earlier work on the same stream writes."""
    student, teacher = draw(500, (64, 64), torch.bfloat16)
    expected = training_step(student, teacher)()
    late = torch.zeros_like(student)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**7)
        late.copy_(student)
        actual = training_step(late, teacher)()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_of_the_features() -> None:
    student, teacher = draw(300, (16, 16), torch.float32)
    expected = training_step(student, teacher)()
    actual = training_step(student.to("cuda:1"), teacher.to("cuda:1"))()
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(actual, expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_dtype
def test_upstream_gradient_is_not_rounded(dtype: torch.dtype, reduction: str) -> None:
    native.extension()
    gradient = torch.randn(2, 50, 8, device=CUDA, dtype=dtype)
    upstream = torch.rand(2 if reduction == "none" else (), device=CUDA)
    actual = torch.ops.srpkd.relation_loss_backward(gradient, upstream, dtype)
    expected = gradient.double() * upstream.double().view(-1, 1, 1)
    assert torch.equal(actual, expected.to(dtype)) or error(actual, expected.to(dtype)) < 1e-4


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@every_dtype
def test_product_of_backward_in_every_layout(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Bit-equal to the product in float32, with the strides of the gradient, also where the batch is not outermost."""
    native.extension()
    contiguous = torch.randn(3, 7, 5, device=CUDA).to(stored)
    for gradient in (contiguous, contiguous.mT, contiguous.transpose(0, 1)):
        images = gradient.shape[0]
        for upstream in (torch.rand((), device=CUDA), torch.rand(images, device=CUDA)):
            for factor in (upstream, upstream.expand(images)):
                actual = torch.ops.srpkd.relation_loss_backward(gradient, factor, dtype)
                assert torch.equal(actual, (gradient.float() * factor.view(-1, 1, 1)).to(dtype))
                assert actual.stride() == gradient.stride()


def test_kernel_setting() -> None:
    """A wrong value of SRPKD_CUDA_KERNEL is an error that lists the choices."""
    program = (
        "import torch; from srpkd import relation_loss; x = torch.randn(1, 64, 8, device='cuda');"
        "relation_loss(x, x, layout='nlc', backend='native')"
    )
    done = {
        name: subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "SRPKD_CUDA_KERNEL": name}, capture_output=True, text=True,
        )
        for name in ("sm80", "auto", "sm70")
    }  # fmt: skip
    assert done["sm80"].returncode == done["auto"].returncode == 0, done["auto"].stderr
    assert "ValueError" in done["sm70"].stderr and "expected sm80" in done["sm70"].stderr


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_operator_of_the_whole_loss(normalize: str, need_grad: bool) -> None:
    """The operator's schema and its fake implementation are correct."""
    native.extension()
    features = draw(100, (20, 30), torch.bfloat16, batch=2)
    torch.library.opcheck(
        torch.ops.srpkd.relation_loss_forward.default,
        (*features, normalize, "l1", 1.0, 1e-12, True, True, "mean", "tiles", need_grad),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_operator(normalize: str, need_grad: bool) -> None:
    """The operator's schema is correct."""
    native.extension()
    student, teacher = draw(100, (20, 30), torch.bfloat16, batch=2)
    scales = scales_of(student, teacher, Relation(normalize, "l1"), torch.float32)
    torch.library.opcheck(
        torch.ops.srpkd.relation_tiles.default,
        (student, teacher, scales.student, scales.teacher, normalize, "l1", 1.0, True, need_grad),
        test_utils="test_schema",
    )
