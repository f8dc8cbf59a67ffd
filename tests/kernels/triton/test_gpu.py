"""The Triton backend on a GPU: errors at real sizes, memory, launches, streams, CUDA graphs and determinism."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import NARROW, RELATIONS, STRIDES, error, name_of, options, value_and_gradient
from rounding import assert_rounding
from torch import Tensor
from triton_scales import triton_scales

from srpkd import relation_loss
from srpkd.kernels import NORMALIZATIONS, Relation, blocked, dispatch, formulas, triton, unavailable_reason
from srpkd.kernels.triton import configurations, plans

jit = pytest.importorskip("triton.runtime.jit", reason="the package triton is not installed")
pytestmark = pytest.mark.gpu
ROW_L1 = Relation("row", "l1")
L1 = [pytest.param(Relation(normalize, "l1"), id=normalize) for normalize in NORMALIZATIONS]
PRECISION_OF = {torch.float32: ("highest", "high", "medium"), torch.bfloat16: ("highest",), torch.float16: ("highest",)}
FORMATS = [
    pytest.param(dtype, precision, id=f"{dtype}-{precision}"[6:])
    for dtype in NARROW
    for precision in PRECISION_OF[dtype]
]


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """Return the current GPU, or skip the test if the backend cannot run on it."""
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := unavailable_reason("triton", device)) is not None:
        pytest.skip(f"triton: {reason}")
    return device


def images(
    device: torch.device,
    batch: int = 2,
    side: int = 24,
    channels: tuple[int, int] = (64, 256),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Return random features (B, C, H, W) of a student and a teacher."""
    return tuple((torch.randn(batch, count, side, side, device=device) + 0.5).to(dtype) for count in channels)


def tokens(features: Tensor) -> Tensor:
    """Return features (B, C, H, W) as a view (B, N, C)."""
    return features.flatten(2).mT


def exact(student: Tensor, teacher: Tensor, relation: Relation) -> tuple[Tensor, Tensor]:
    """Return the loss and N^2 times its gradient of features (B, N, C), by backend ``blocked`` in float64."""
    loss, gradient = dispatch.compute_loss(student.double(), teacher.double(), relation, "blocked", True)
    return loss, gradient * student.shape[1] ** 2


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.parametrize(("dtype", "precision"), FORMATS)
def test_error_of_every_relation(relation, dtype, precision, gpu, set_precision):
    """The errors are what the rounding of the dtype and of the matmul precision predicts."""
    student, teacher = (tokens(x) for x in images(gpu, side=23, channels=(24, 40), dtype=dtype))
    set_precision(precision)
    upstream = student.shape[1] ** 2
    loss, gradient = value_and_gradient(student, teacher, relation, "triton", upstream)
    assert_rounding(loss, gradient, student, teacher, relation, upstream)
    forward, _ = triton.loss_and_gradient(student, teacher, relation, need_grad=False)
    assert_rounding(forward, None, student, teacher, relation)


@pytest.mark.parametrize(
    "channels", [(1, 3), (17, 65), (32, 64), (64, 256), (100, 128), (128, 256), (128, 300), (300, 700)], ids=str
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_row_of_the_table(channels, dtype, gpu):
    student, teacher = (tokens(x) for x in images(gpu, side=23, channels=channels, dtype=dtype))
    upstream = student.shape[1] ** 2
    result = value_and_gradient(student, teacher, ROW_L1, "triton", upstream)
    assert_rounding(*result, student, teacher, ROW_L1, upstream)


@pytest.mark.parametrize("pixels", [1, 2, 17, 127, 128, 129, 1000])
def test_any_number_of_pixels(pixels, gpu):
    student, teacher = (torch.randn(3, pixels, count, device=gpu, dtype=torch.bfloat16) for count in (24, 40))
    loss, gradient = value_and_gradient(student, teacher, ROW_L1, "triton", pixels**2)
    expected_loss, expected = exact(student, teacher, ROW_L1)
    assert error(loss, expected_loss, 1e-2) < 1e-4
    assert error(gradient, expected, 1) < 0.02


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_strides_are_read_in_place(make, dtype, gpu):
    """The results are bit-identical, with NaN in the memory between the features."""
    student, teacher = images(gpu, side=17, channels=(24, 40), dtype=dtype)
    expected = value_and_gradient(student, teacher, ROW_L1, "triton", layout="nchw")
    actual = value_and_gradient(make(student), make(teacher), ROW_L1, "triton", layout="nchw")
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


def test_offsets_beyond_32_bits(gpu):
    """The images are 2^31 elements apart."""
    if torch.cuda.mem_get_info(gpu)[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    student, teacher = images(gpu, side=16, channels=(24, 40))
    stride = 2**31 + 8
    far = [
        x.new_zeros(stride + x[0].numel()).as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)
        for x in (student, teacher)
    ]
    expected = value_and_gradient(student, teacher, ROW_L1, "triton", layout="nchw")
    for one, other in zip(value_and_gradient(*far, ROW_L1, "triton", layout="nchw"), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16384_pixels_32_images(dtype, gpu):
    """The error of one image; memory is at most 3 times the student's features plus 16 MB, beside the inputs."""
    student, teacher = images(gpu, batch=32, side=128, dtype=dtype)
    student.requires_grad_()
    relation_loss(student[:1], teacher[:1], **options(ROW_L1), backend="triton").backward()  # compile, and init cuBLAS
    student.grad = None
    before = torch.cuda.memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    loss = relation_loss(student, teacher, **options(ROW_L1), reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, 2.0**28))  # N^2
    allowed = 3 * student.numel() * student.element_size() + (16 << 20)
    assert torch.cuda.max_memory_allocated(gpu) - before <= allowed
    one, other = tokens(student.detach()[:1]), tokens(teacher[:1])
    expected_loss, expected = exact(one, other, ROW_L1)
    assert error(loss[:1], expected_loss) < 1e-5
    assert (
        error(tokens(gradient[:1]), expected) < {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]
    )


@pytest.mark.parametrize("batch", [1, 16])
def test_a_thousand_runs_give_the_same_bits(batch, gpu):
    """Also those of M_w, which the program that happens to be the last of a tile adds up."""
    student, teacher = (tokens(x) for x in images(gpu, batch=batch, side=64, channels=(96, 96)))
    expected = triton.loss_and_gradient(student, teacher, ROW_L1, True)
    for _ in range(1000):
        for one, other in zip(triton.loss_and_gradient(student, teacher, ROW_L1, True), expected):
            assert torch.equal(one, other)


@pytest.mark.parametrize("relation", L1)
def test_few_launches_and_no_synchronisation(relation, gpu):
    """The loss and gradient of one image take at most 6 kernels and no synchronisation with the host."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which launches kernels; a fixture restores it
    student, teacher = (tokens(x) for x in images(gpu, batch=1, side=64))
    triton.loss_and_gradient(student, teacher, relation, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton.loss_and_gradient(student, teacher, relation, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        triton.loss_and_gradient(student, teacher, relation, True)
        torch.cuda.synchronize(gpu)
    launched = Counter({event.key: event.count for event in profile.key_averages() if event.self_device_time_total > 0})
    assert 0 < launched.total() <= 6, launched


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_product_of_backward(dtype, stored, gpu):
    """Bit-equal to the product in float32, with the strides of the gradient."""
    contiguous = torch.randn(3, 700, 65, device=gpu).to(stored)
    for gradient in (contiguous, contiguous.mT, contiguous[:1], contiguous[1:]):  # the last is not aligned
        for upstream in (torch.rand((), device=gpu), torch.rand(len(gradient), device=gpu)):
            actual = triton.scaled_gradient(gradient, upstream, dtype, 1 / 3)
            assert torch.equal(actual, (gradient.float() * (upstream * (1 / 3)).view(-1, 1, 1)).to(dtype))
            assert actual.stride() == gradient.stride()


@pytest.mark.parametrize("relation", L1)
def test_the_second_call_launches_directly(relation, gpu, monkeypatch):
    """Later calls do not pass through triton.jit, and give the bits of the first."""
    student, teacher = (tokens(x) for x in images(gpu))
    monkeypatch.setattr(plans, "_plans", {})
    expected = triton.loss_and_gradient(student, teacher, relation, True)

    def unexpected(*arguments: object, **options: object) -> None:
        raise AssertionError("triton.jit was called")

    monkeypatch.setattr(jit.JITFunction, "run", unexpected)
    for one, other in zip(triton.loss_and_gradient(student, teacher, relation, True), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("relation", L1)
def test_equal_features_are_ties(relation, gpu):
    """Also with fused multiply-adds, which Triton's interpreter does not have."""
    for dtype in NARROW:
        student, _ = (tokens(x) for x in images(gpu, channels=(64, 64), dtype=dtype))
        loss, gradient = value_and_gradient(student, student.clone(), relation, "triton")
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("relation", L1)
def test_cuda_graph(relation, gpu):
    """A graph that is captured once can be replayed on other features."""
    student, teacher = images(gpu, batch=1, side=32)
    student.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = relation_loss(student, teacher, backend="triton", **options(relation))
        return loss, *torch.autograd.grad(loss, student)

    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(gpu).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            student.normal_()
            teacher.normal_()
        graph.replay()
        for one, other in zip(captured, step()):
            assert torch.equal(one, other)


def test_torch_compile(gpu):
    student, teacher = images(gpu)
    student.requires_grad_()

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        return 2 * relation_loss(student.relu(), teacher.relu(), **options(ROW_L1), backend="triton")

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(student, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for one, other in zip(*results):
        assert error(one, other) < 1e-2


def test_side_stream(gpu):
    """The kernels run on the current stream, after earlier work on it, and do not wait for other streams."""
    student, teacher = images(gpu, batch=1, side=64)
    expected = value_and_gradient(student, teacher, ROW_L1, "triton", layout="nchw")
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream(gpu))
    late = torch.zeros_like(student)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(student)
        actual = value_and_gradient(late, teacher, ROW_L1, "triton", layout="nchw")
    stream.synchronize()
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


def test_device_that_is_not_current(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    student, teacher = images(gpu)
    expected = value_and_gradient(student, teacher, ROW_L1, "triton", layout="nchw")
    other = torch.device("cuda", 1)
    actual = value_and_gradient(student.to(other), teacher.to(other), ROW_L1, "triton", layout="nchw")
    assert actual[0].device == actual[1].device == other
    assert torch.cuda.current_device() == gpu.index
    for one, two in zip(actual, expected):
        assert error(one, two) < 1e-2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_scales_are_float32_under_any_precision(precision, gpu, set_precision):
    """This includes the scales of the other backends, which PyTorch computes."""
    student, teacher = (tokens(x) for x in images(gpu, dtype=torch.float32))
    set_precision(precision)
    expected = formulas.scales_of(student.double(), teacher.double(), ROW_L1, torch.float64)
    for scales in (
        formulas.scales_of(student, teacher, ROW_L1, torch.float32),
        triton_scales(student, teacher, ROW_L1),
    ):
        for one, other in zip(scales, expected):
            assert error(one, other) < 1e-6
    scales = formulas.scales_of(student, teacher, ROW_L1, torch.float32)
    tiles = triton.relation_tiles(student, teacher, scales, ROW_L1, True)
    for one, other in zip(tiles, blocked.relation_tiles(student, teacher, scales, ROW_L1, True)):
        assert error(one, other) < {"high": 5e-3, "medium": 5e-2}[precision]


def test_autotuning(gpu, tmp_path, monkeypatch):
    """The result does not change, and the fastest configuration is written to a file."""
    monkeypatch.setenv("SRPKD_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configurations.cached_winners.cache_clear()
    student, teacher = (tokens(x) for x in images(gpu, batch=1))
    expected = exact(student, teacher, ROW_L1)
    actual = value_and_gradient(student, teacher, ROW_L1, "triton", student.shape[1] ** 2)
    for one, other in zip(actual, expected):
        assert error(one, other) < 5e-3
    assert len(list(tmp_path.rglob("*.json"))) == 1
