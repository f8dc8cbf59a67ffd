"""The operators of csrc/cuda as a GPU executes them, on an emulated GPU: from tensors of any strides to a gradient.

``torch.ops.srpkd`` calls csrc/cuda/operator.cpp and backward.cpp for tensors on the CPU, which launch the kernels. See
test_cuda_loss.py for the kernels between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulated_kernels import DEVICES, EmulatedGpu, exact_tiles
from helpers import RELATIONS, STRIDES, error, far_apart, name_of
from torch import Tensor

from srpkd.kernels import NORMALIZATIONS, Relation, TileSums, formulas, native
from srpkd.kernels.reference import relation_loss as reference_loss

DTYPES = torch.float32, torch.bfloat16, torch.float16
# the relative error of the gradient: that of the stored gradient, or of K with 8 or 11 bits
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
KERNELS = "sm80", "sm90"
ROW, COSINE, NONE = (Relation(normalize, "l1") for normalize in NORMALIZATIONS)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kernel = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


@pytest.fixture
def gpu(emulated_gpu: Callable[..., EmulatedGpu]) -> EmulatedGpu:
    """A Hopper GPU."""
    return emulated_gpu("sm_90")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the kernel of the tiles."""
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", request.param)
    return request.param


def draw(dtype: torch.dtype, shape: tuple[int, ...] = (2, 5, 6, 7), teacher: int = 8) -> tuple[Tensor, Tensor]:
    """Return features (B, C, H, W) of student and teacher whose products are exact in float32."""
    sizes = shape, (shape[0], teacher, *shape[2:])
    student, teacher = ((torch.randn(size) + 0.5).bfloat16().to(dtype) for size in sizes)
    return student, teacher


def loss_of(student: Tensor, teacher: Tensor, relation: Relation, *options: str) -> Tensor:
    """options: reduction, layout, scope and method."""
    defaults = "mean", "nchw", "image", "tiles"
    return torch.ops.srpkd.relation_loss(student, teacher, *relation.arguments, *options, *defaults[len(options) :])


def expected_of(student: Tensor, teacher: Tensor, relation: Relation, reduction: str = "mean", scope: str = "image"):
    """Return the loss of features (B, C, H, W) in float64, differentiable in the student."""
    pixels = [x.double().flatten(2).mT for x in (student, teacher)]
    if scope == "batch":
        pixels = [x.reshape(1, -1, x.shape[2]) for x in pixels]
    losses = reference_loss(*pixels, relation)
    return losses if reduction == "none" else getattr(losses, reduction)()


def check(student: Tensor, teacher: Tensor, relation: Relation, *options: str, tolerance: float | None = None) -> None:
    """Compare the loss and its gradient with float64, for another upstream gradient of each image."""
    own, exact = (x.detach().requires_grad_() for x in (student, student.double()))
    loss, expected = loss_of(own, teacher, relation, *options), expected_of(exact, teacher, relation, *options[::2])
    assert loss.shape == expected.shape and error(loss, expected) < (3e-6 if tolerance is None else tolerance)
    # scaled, because float16 gradients of a mean are below its smallest normal number
    upstream = (torch.rand(loss.shape) + 0.5) * (2.0**12 if student.dtype == torch.float16 else 1.0)
    gradient, expected = (torch.autograd.grad(x, y, upstream.to(x))[0] for x, y in ((loss, own), (expected, exact)))
    assert gradient.dtype == student.dtype
    assert error(gradient, expected) < (TOLERANCE[student.dtype] if tolerance is None else tolerance)


# --- the whole loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@every_dtype
@every_kernel
@pytest.mark.core(18)
def test_every_relation(gpu: EmulatedGpu, kernel: str, dtype: torch.dtype, relation: Relation) -> None:
    loss_of(*draw(dtype), relation)
    tiles = gpu.launches[0 if relation.normalize == "none" else 1]
    assert tiles.cooperative == (kernel == "sm90")
    check(*draw(dtype), relation)


@pytest.mark.parametrize("relation", [r for r in RELATIONS if r.distance == "l2"], ids=name_of)
@every_dtype
def test_closed_form(gpu: EmulatedGpu, dtype: torch.dtype, relation: Relation) -> None:
    check(*draw(dtype), relation, "mean", "nchw", "image", "closed_form")


@pytest.mark.parametrize(
    ("strides", "dtype"), [*zip(itertools.product(STRIDES, STRIDES), itertools.cycle(DTYPES))], ids=str
)
@pytest.mark.core(25)
def test_any_strides(gpu: EmulatedGpu, dtype: torch.dtype, strides: tuple[str, str]) -> None:
    """Features that the kernels can read in place, and features that must be copied, of which NaN surrounds some."""
    student, teacher = (STRIDES[name](x) for name, x in zip(strides, draw(dtype)))
    check(student, teacher, COSINE)


@pytest.mark.parametrize("dim", [0, 1, 3], ids=["images", "channels", "pixels"])
@pytest.mark.parametrize("relation", [ROW, NONE, Relation("row", "l2")], ids=name_of)
@every_dtype
@every_kernel
@pytest.mark.core(9)
def test_strides_beyond_32_bits(
    gpu: EmulatedGpu, kernel: str, dtype: torch.dtype, relation: Relation, dim: int
) -> None:
    """More than 2^31 elements are between the first and the last of a dimension, in either layout."""
    method = "closed_form" if relation.distance == "l2" else "tiles"
    for strides in ("contiguous", "channels_last"):
        student, teacher = (STRIDES[strides](x) for x in draw(dtype, (2, 9, 1, 40), teacher=10))
        check(far_apart(student, dim), far_apart(teacher, dim), relation, "mean", "nchw", "image", method)


@pytest.mark.parametrize("sizes", [(5, 70), (70, 5)], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
@every_dtype
def test_networks_of_different_layouts(
    gpu: EmulatedGpu, dtype: torch.dtype, strides: str, sizes: tuple[int, int]
) -> None:
    """The smaller features are copied. The gradient has the strides of the student's features."""
    student, teacher = draw(dtype, (2, sizes[0], 6, 7), sizes[1])
    student = STRIDES[strides](student)
    teacher = STRIDES["channels_last" if strides == "contiguous" else "contiguous"](teacher)
    check(student, teacher, ROW)
    gradient = torch.autograd.grad(loss_of(student.requires_grad_(), teacher, ROW), student)[0]
    assert gradient.stride() == student.stride()


@every_kernel
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_dtype
@pytest.mark.core(9)
def test_reductions_and_scopes(gpu: EmulatedGpu, dtype: torch.dtype, reduction: str, scope: str, kernel: str) -> None:
    check(*draw(dtype), ROW, reduction, "nchw", scope)


@pytest.mark.parametrize(("setting", "tolerance"), [("highest", 5e-6), ("high", 1e-3), ("medium", 1e-2)])
@pytest.mark.parametrize("strides", ["contiguous", "channels_last", "every_other_channel", "broadcast"])
@every_kernel
def test_precision_of_float32(
    gpu: EmulatedGpu, set_precision: Callable[[str], None], setting: str, tolerance: float, strides: str, kernel: str
) -> None:
    """Features that are not exact in bfloat16: with "medium", mma.sync reads rounded copies of them."""
    set_precision(setting)
    student, teacher = (torch.randn(2, c, 6, 7) + 0.5 for c in (5, 8))
    if strides == "broadcast":  # a copy has other strides
        teacher = teacher[:, :1].expand_as(teacher)
    else:
        student, teacher = (STRIDES[strides](x) for x in (student, teacher))
    check(student, teacher, Relation("cosine", "huber"), tolerance=tolerance)


def test_precision_of_float32_set_for_a_device(gpu: EmulatedGpu, set_precision: Callable[[str], None]) -> None:
    student, teacher = (torch.randn(2, c, 6, 7) + 0.5 for c in (5, 8))
    settings, losses = ("highest", "high", "medium"), {}
    for setting in settings:
        set_precision(setting)
        losses[setting] = loss_of(student, teacher, COSINE).item()
    assert len(set(losses.values())) == 3
    for setting in settings:
        for of_device, expected in (
            ("ieee", "highest"),
            ("none", "highest"),
            ("tf32", "medium" if setting == "medium" else "high"),
        ):
            set_precision(setting)
            torch.backends.cuda.matmul.fp32_precision = of_device
            assert formulas.matmul_precision() == expected
            assert loss_of(student, teacher, COSINE) == losses[expected]


@pytest.mark.parametrize("device", DEVICES)
@every_dtype
def test_devices(emulated_gpu: Callable[..., EmulatedGpu], device: str, dtype: torch.dtype) -> None:
    """Plans for the properties of a GPU: with more shared memory than it has, a launch fails."""
    emulated_gpu(device, seed=1)
    check(*draw(dtype, (1, 70, 12, 12), 300), ROW)


def test_only_the_loss(gpu: EmulatedGpu) -> None:
    student, teacher = draw(torch.float32)
    for relation in (ROW, COSINE, NONE):
        assert error(loss_of(student, teacher, relation), expected_of(student, teacher, relation)) < 1e-6
        assert len(gpu.launches) == {"row": 3, "cosine": 3, "none": 2}[relation.normalize]


@every_kernel
def test_launches_with_and_without_overlap(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    student, teacher = draw(torch.bfloat16)
    student.requires_grad_()
    results = []
    monkeypatch.setenv("SRPKD_CUDA_TOGETHER", "0")
    for setting in (None, "0", "1"):
        if setting is not None:
            monkeypatch.setenv("SRPKD_CUDA_OVERLAP", setting)
        results.append(loss_of(student, teacher, ROW))
        first, *others = gpu.launches
        assert len(others) == 6 and not first.early
        # a cooperative launch starts when all before it have ended
        assert all(launch.early == (setting == "1" and not launch.cooperative) for launch in others)
    assert torch.equal(results[0], results[2])


CLOSED_FORM = "closed_form"
# the launches of a call with a gradient: one for each kernel, and if the call is small
LAUNCHES = {
    ("row", "tiles"): (7, 3), ("cosine", "tiles"): (3, 3), ("none", "tiles"): (2, 2),
    ("row", CLOSED_FORM): (5, 5), ("cosine", CLOSED_FORM): (4, 1), ("none", CLOSED_FORM): (3, 3),
}  # fmt: skip


@pytest.mark.parametrize(("normalize", "method"), LAUNCHES)
@pytest.mark.parametrize(("shape", "channels"), [((2, 70, 5, 13), 70), ((1, 7, 9, 15), 150)], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
@every_dtype
@pytest.mark.core(24)
def test_kernels_of_a_small_call_share_launches(
    emulated_gpu: Callable[..., EmulatedGpu],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    strides: str,
    shape: tuple[int, ...],
    channels: int,
    normalize: str,
    method: str,
) -> None:
    """With the same bits, also where thread blocks do the work of several in every phase, or add ranges of pixels."""
    student, teacher = (STRIDES[strides](x) for x in draw(dtype, shape, channels))
    relation = Relation(normalize, "l2")
    for device in ("sm_90", "few"):
        results = []
        for together in (0, 1, 1):
            monkeypatch.setenv("SRPKD_CUDA_TOGETHER", str(together))
            gpu = emulated_gpu(device, seed=len(results))
            own = student.detach().requires_grad_()
            losses = loss_of(own, teacher, relation, "none", "nchw", "image", method)
            assert len(gpu.launches) == LAUNCHES[normalize, method][together]
            # the losses are scaled, because a gradient of float16 could be 0
            results.append((losses.detach(), *torch.autograd.grad(losses.sum() * 2.0**10, own)))
        for losses, gradient in results[1:]:
            assert torch.equal(losses, results[0][0]) and torch.equal(gradient, results[0][1])


def test_kernels_of_a_large_call_have_their_own_launches(
    emulated_gpu: Callable[..., EmulatedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without cooperative launches, and in a stream with too few multiprocessors for one."""
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", "sm80")
    student, teacher = draw(torch.bfloat16, (3, 5, 9, 15))
    for device in ("part", "uncooperative", "green"):
        gpu = emulated_gpu(device)
        loss_of(student, teacher, replace(COSINE, distance="l2"), "mean", "nchw", "image", CLOSED_FORM)
        assert [launch.cooperative for launch in gpu.launches] == [False] * 4
        assert not gpu.library.has_left_an_error()
        check(student, teacher, ROW)


def test_errors_of_launches(emulated_gpu: Callable[..., EmulatedGpu], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels before the tiles, and of the tiles, which need all multiprocessors of Hopper."""
    student, teacher = draw(torch.bfloat16)
    for device, kernel, number in (("failing", "sm80", 101), ("green", "sm90", 720)):
        emulated_gpu(device)
        monkeypatch.setenv("SRPKD_CUDA_KERNEL", kernel)
        with pytest.raises(RuntimeError, match=f"error {number} of the runtime"):
            loss_of(student, teacher, ROW)


def test_empty_features(gpu: EmulatedGpu) -> None:
    for sizes, channels in (((0, 5, 6, 7), 3), ((2, 0, 6, 7), 3), ((2, 5, 0, 7), 3), ((2, 5, 6, 7), 0)):
        student = torch.randn(sizes, requires_grad=True)
        loss = loss_of(student, torch.randn(sizes[0], channels, *sizes[2:]), COSINE, "sum")
        assert loss == 0 and not gpu.launches
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refused(gpu: EmulatedGpu, emulated_gpu: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = draw(torch.float32)
    with pytest.raises(NotImplementedError, match="received Double: use backend='blocked'"):
        loss_of(student.double(), teacher.double(), COSINE)
    closed_form = replace(ROW, distance="l2", detach_norms=True)
    with pytest.raises(NotImplementedError, match='use method="tiles"'):
        loss_of(student.requires_grad_(), teacher, closed_form, "mean", "nchw", "image", "closed_form")
    many = torch.zeros(1, 1, 1).expand(1, 2**40, 1)
    with pytest.raises(ValueError, match=r"sizes of at most 2\^30.*use fewer pixels"):
        loss_of(many, many, COSINE, "mean", "nlc")
    many = torch.zeros(1, 1, 1).expand(2**30, 200, 1)
    with pytest.raises(ValueError, match=r"fit into one launch.*split the batch"):
        loss_of(many, many, COSINE, "mean", "nlc")
    with pytest.raises(ValueError, match=r"fit into one launch.*split the batch"):
        native.relation_tiles(many, many, formulas.Scales(None, None, None), NONE, False)
    wide = torch.zeros(1, 1, 1).expand(1, 2, 2**20 + 1)
    for relation, method in ((ROW, "tiles"), (replace(COSINE, distance="l2"), "closed_form")):
        for features in ((student.flatten(2).mT[:1, :2], wide), (wide, teacher.flatten(2).mT[:1, :2])):
            with pytest.raises(ValueError, match=rf"at most 2\^20 channels.*received \[1, 2, {2**20 + 1}\]"):
                loss_of(*features, relation, "mean", "nlc", "image", method)
    for name, value in (("SRPKD_CUDA_KERNEL", "sm70"), ("SRPKD_CUDA_OVERLAP", "yes"), ("SRPKD_CUDA_TOGETHER", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=f'{name}="{value}": expected'):
                loss_of(student, teacher, COSINE)
    emulated_gpu("sm_80")
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", "sm90")
    with pytest.raises(NotImplementedError, match=r"does not cover a GPU without compute capability 9\.0"):
        loss_of(student, teacher, COSINE)
    emulated_gpu("sm_75")
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 or newer, received 7\.x"):
        loss_of(student, teacher, COSINE)


# --- the tiles alone --------------------------------------------------------------------------------------------------


def check_tiles(student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool = True) -> TileSums:
    """student, teacher (B, N, C)."""
    scales = formulas.scales_of(student, teacher, relation, torch.float32)
    sums = native.relation_tiles(student, teacher, scales, relation, need_grad)
    exact = exact_tiles(student, teacher, scales, relation, need_grad)
    for actual, expected in zip(sums, exact):
        assert (actual is None) == (expected is None)
        assert actual is None or error(actual, expected) < 2e-3
    return sums


@pytest.mark.parametrize("relation", RELATIONS, ids=name_of)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last", "every_other_channel", "every_other_row"])
@every_dtype
@pytest.mark.core(12)
def test_tiles(gpu: EmulatedGpu, dtype: torch.dtype, strides: str, relation: Relation) -> None:
    student, teacher = (STRIDES[strides](x).flatten(2).mT for x in draw(dtype))
    check_tiles(student, teacher, relation)
    check_tiles(student, teacher, relation, need_grad=False)


@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
def test_sums_of_tiles_that_are_split(gpu: EmulatedGpu, strides: str) -> None:
    """Few blocks of rows are divided among the multiprocessors, and their sums are added."""
    student, teacher = (STRIDES[strides](x).flatten(2).mT for x in draw(torch.bfloat16, (1, 9, 13, 40)))
    sums = check_tiles(student, teacher, ROW)
    assert sums.U is not None and sums.U.stride() == student.stride()


def test_scales_of_any_strides(gpu: EmulatedGpu) -> None:
    student, teacher = (x.flatten(2).mT for x in draw(torch.float32))
    scales = formulas.scales_of(student, teacher, COSINE, torch.float32)
    strided = formulas.Scales(*(x if x is None else x.T.contiguous().T for x in scales))
    sums = (native.relation_tiles(student, teacher, x, COSINE, True) for x in (scales, strided))
    assert all(torch.equal(a, b) for a, b in zip(*sums))


@pytest.mark.parametrize(("pixels", "channels"), [(0, (5, 3)), (4, (5, 0))])
def test_tiles_of_empty_features(gpu: EmulatedGpu, pixels: int, channels: tuple[int, int]) -> None:
    student, teacher = (torch.randn(2, pixels, count) for count in channels)
    sums = native.relation_tiles(student, teacher, formulas.Scales(None, None, None), NONE, True)
    assert (sums.loss == 0).all() and sums.U is not None and sums.U.shape == student.shape and not sums.U.any()
