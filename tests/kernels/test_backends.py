"""Every backend of the registry against the definition (``reference``, differentiated by autograd)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import (
    DELTA,
    FAST,
    FLAG_SETS,
    NARROW,
    STRIDES,
    assert_equal,
    assert_equal_to_reference,
    cases,
    difference,
    distances,
    dtypes,
    error,
    features,
    few_cases,
    options,
    peaks_in_new_process,
    rounding,
    value_and_gradient,
    widest,
)
from rounding import assert_rounding
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from srpkd import relation_loss
from srpkd.kernels import BACKENDS, NORMALIZATIONS, Relation, TileSums, blocked, closed_form, dispatch, formulas, strips
from srpkd.kernels.reference import relation_matrix

pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize(("backend", "relation"), cases())
FLOAT64 = [name for name in FAST if widest(name) == torch.float64]
every_flag = pytest.mark.parametrize(("backend", "relation"), cases(flags=[(), *FLAG_SETS]))
few_flags = pytest.mark.parametrize(("backend", "relation"), cases() + few_cases(flags=FLAG_SETS))
every_normalization = pytest.mark.parametrize(("backend", "relation"), few_cases())


# --- values and gradients -------------------------------------------------------------------------------------------


@every_flag
def test_values_and_gradients(backend: str, relation: Relation, device: torch.device) -> None:
    student, teacher = features(relation, dtype=widest(backend, device), device=device)
    assert_equal_to_reference(student, teacher, relation, backend)


@pytest.mark.parametrize("pixels", [1, 2, 16, 17, 33, 64, 130])
@every_normalization
def test_any_number_of_pixels(backend: str, relation: Relation, pixels: int, device: torch.device) -> None:
    student, teacher = features(relation, pixels=pixels, dtype=widest(backend, device), device=device)
    assert_equal_to_reference(student, teacher, relation, backend)


@pytest.mark.parametrize("channels", [(1, 3), (6, 1), (16, 64), (65, 33), (150, 300), (300, 129)], ids=str)
@every_normalization
def test_any_number_of_channels(
    backend: str, relation: Relation, channels: tuple[int, int], device: torch.device
) -> None:
    student, teacher = features(relation, pixels=19, channels=channels, dtype=widest(backend, device), device=device)
    assert_equal_to_reference(student, teacher, relation, backend)


@pytest.mark.parametrize(("backend", "relation"), cases(FLOAT64, [(), ("rectify",)]))
def test_gradcheck(backend: str, relation: Relation, device: torch.device) -> None:
    if widest(backend, device) != torch.float64:
        pytest.skip(f"{backend} does not support float64 there")
    student, teacher = features(relation, pixels=5, channels=(3, 2), device=device, apart=1e-3)

    def loss(student: Tensor) -> Tensor:
        return relation_loss(student, teacher, layout="nlc", reduction="none", backend=backend, **options(relation))

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@every_flag
def test_tiles_match_the_definition(backend: str, relation: Relation, device: torch.device) -> None:
    """The primitive: U and h against P and K as N x N arrays."""
    student, teacher = features(relation, dtype=widest(backend, device), device=device)
    scales = formulas.scales_of(student, teacher, relation, student.dtype)
    tiles, without = (
        dispatch.backend_module(backend).relation_tiles(student, teacher, scales, relation, need_grad)
        for need_grad in (True, False)
    )

    tolerance, student = rounding(student.dtype), student.double()
    A, D = relation_matrix(student, relation), difference(student, teacher, relation)
    P = {"l1": torch.sign(D), "l2": 2 * D, "huber": D.clamp(-relation.delta, relation.delta)}[relation.distance]
    if relation.rectify:
        P = torch.where(A > 0, P, 0)
    # PyTorch's own Huber loss: the reference calls the same function as the backends
    rho = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": partial(F.huber_loss, delta=relation.delta)}[relation.distance]
    total = rho(D, torch.zeros_like(D), reduction="none").sum((1, 2))
    ones = torch.ones_like(student[..., 0])
    alpha = {
        "row": 1 / (student @ student.mT).norm(dim=-1),
        "cosine": 1 / student.norm(dim=-1),
        "none": ones,
    }[relation.normalize]
    beta = alpha if relation.normalize == "cosine" else ones
    one_way = P * alpha[:, :, None] * beta[:, None, :]
    for loss in (tiles.loss, without.loss):
        assert error(loss, total) <= tolerance
    assert error(tiles.U, (one_way + one_way.mT) @ student) <= tolerance
    if relation.normalize == "none" or relation.detach_norms:
        assert tiles.h is None
    else:
        assert error(tiles.h, (P * A).sum(2) * (2 if relation.normalize == "cosine" else 1)) <= tolerance
    assert without.U is None
    assert without.h is None


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_huber_has_both_sides(normalize: str) -> None:
    """The other tests rely on a delta with pairs on both sides."""
    relation = Relation(normalize, "huber", DELTA[normalize])
    linear = difference(*features(relation), relation).abs() > relation.delta
    assert 0.2 < linear.double().mean() < 0.8


# --- rounding -------------------------------------------------------------------------------------------------------


def as_usually_written(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    """The loss as usually written in PyTorch, in the features' dtype: (B, N, C) -> (B,)."""

    def relations(x: Tensor) -> Tensor:
        if relation.normalize == "cosine":
            x = F.normalize(x, dim=-1)
        gram = x @ x.mT
        return F.normalize(gram, dim=-1) if relation.normalize == "row" else gram

    kind = {"l1": F.l1_loss, "l2": F.mse_loss}.get(relation.distance)
    ours, theirs = relations(student), relations(teacher)
    if kind is None:
        return F.huber_loss(ours, theirs, reduction="none", delta=relation.delta).mean((1, 2))
    return kind(ours, theirs, reduction="none").mean((1, 2))


@pytest.mark.parametrize(("backend", "relation"), cases(["reference"]))
def test_reference_matches_pytorch(backend: str, relation: Relation) -> None:
    """The reference against PyTorch's normalisation, distances and gradients, in float64."""
    student, teacher = features(relation)
    leaf = student.detach().requires_grad_()
    loss = as_usually_written(leaf, teacher, relation)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    actual = value_and_gradient(student, teacher, relation, backend)
    assert error(actual[0], loss) < 1e-12
    assert error(actual[1], gradient) < 1e-12


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
@few_flags
def test_error_is_that_of_the_formats(
    backend: str, relation: Relation, dtype: torch.dtype, device: torch.device
) -> None:
    """Against float64 of the same rounded features, the error is what the rounding of the formats predicts.

    What people write rounds the relations to 16 bits too: no backend may be worse than that.
    """
    student, teacher = features(relation, pixels=150, channels=(16, 24), dtype=dtype, device=device)
    # an upstream gradient as with loss scaling: float16 gradients of a mean over pairs underflow
    upstream = 2.0**14 if dtype == torch.float16 else 1.0
    loss, gradient = value_and_gradient(student, teacher, relation, backend, upstream)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_rounding(loss, gradient, student, teacher, relation, upstream)

    if dtype != torch.float32 and not (relation.rectify or relation.detach_norms):
        exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
        leaf = student.detach().requires_grad_()
        naive = as_usually_written(leaf, teacher, relation)
        (naive_gradient,) = torch.autograd.grad(naive, leaf, torch.full_like(naive, 1024))
        # both gradients are rounded to the same 16 bits, which leaves the errors equal up to chance in float16
        assert error(gradient / upstream, exact[1]) <= 1.1 * error(naive_gradient / 1024, exact[1])


@every_case
def test_error_near_convergence(backend: str, relation: Relation, device: torch.device) -> None:
    """The student is close to the teacher: the relations cancel, and in float32 many signs of l1 are uncertain."""
    _, teacher = features(batch=1, pixels=256, channels=(1, 24), dtype=torch.float32, device=device)
    student = teacher + 1e-4 * torch.randn_like(teacher)
    assert_rounding(*value_and_gradient(student, teacher, relation, backend), student, teacher, relation)


@pytest.mark.parametrize(("backend", "relation"), cases(["blocked"]))
@pytest.mark.parametrize("fault", ["half K", "half features", "scaled loss", "missing pixel"])
def test_faults_exceed_the_predicted_errors(backend: str, relation: Relation, fault: str) -> None:
    """The yardstick of these tests is strict enough: each fault changes float32 results by more than rounding does."""
    student, teacher = features(relation, pixels=150, channels=(16, 24), dtype=torch.float32)
    pair = (student.half().float(), teacher.half().float()) if fault == "half features" else (student, teacher)
    loss, gradient = value_and_gradient(*pair, relation, backend)
    if fault == "half K":
        gradient = gradient * (1 + 2.0**-11 * torch.randn_like(gradient))
    elif fault == "scaled loss":
        loss = loss * (1 + 2e-6)
    elif fault == "missing pixel":
        gradient[:, -1] = 0
    with pytest.raises(AssertionError, match="rounding predicts"):
        assert_rounding(loss, gradient, student, teacher, relation)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("backend", [name for name in FAST if name != "closed_form"])
def test_closed_form_is_an_oracle_for_tiles(backend: str, normalize: str, device: torch.device) -> None:
    """Near convergence closed_form stays accurate for float32 features because it sums in float64.

    Its GPU kernels do not: their features are scaled in float32.
    """
    relation = Relation(normalize, "l2")
    teacher = torch.randn(2, 200, 12, device=device)
    student = teacher + 1e-4 * torch.randn_like(teacher)
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    closed = value_and_gradient(student, teacher, relation, "closed_form")
    tiles = value_and_gradient(student, teacher, relation, backend)
    in_float64 = closed_form.implementation(device, student.dtype, relation) == "pytorch"
    assert error(closed[0], exact[0]) <= (1e-5 if in_float64 else 1e-3)  # of a loss as small as 1e-11
    assert error(closed[1], exact[1]) <= (1e-6 if in_float64 else 1e-2)
    assert error(tiles[0], closed[0]) <= 1e-2
    assert error(tiles[1], closed[1]) <= 1e-2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("backend", "relation"), cases(list(BACKENDS)) + few_cases(flags=FLAG_SETS))
@pytest.mark.core(60)
def test_two_runs_are_bit_equal(backend: str, relation: Relation, threads: int, device: torch.device) -> None:
    torch.set_num_threads(threads)  # put back by one_thread
    student, teacher = features(pixels=300, channels=(16, 16), dtype=torch.float32, device=device)
    first, second = (value_and_gradient(student, teacher, relation, backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@every_normalization
def test_several_threads(backend: str, relation: Relation, device: torch.device) -> None:
    """With several threads the values are right, and two runs give the same bits."""
    student, teacher = features(relation, batch=1, pixels=130, dtype=widest(backend, device), device=device)
    torch.set_num_threads(3)  # put back by one_thread
    loss, gradient = assert_equal_to_reference(student, teacher, relation, backend)
    again = value_and_gradient(student, teacher, relation, backend)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
@every_normalization
def test_any_strides(
    backend: str, relation: Relation, strides: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    student, teacher = (
        x.mT.reshape(2, -1, 5, 7) for x in features(relation, dtype=widest(backend, device), device=device)
    )
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference", layout="nchw")
    changed = strides(student), strides(teacher)
    assert torch.equal(changed[0], student)
    for pair in (changed, (student, changed[1]), (changed[0], teacher)):
        assert_equal(value_and_gradient(*pair, relation, backend, layout="nchw"), expected)


@every_normalization
def test_tokens_of_any_strides(backend: str, relation: Relation, device: torch.device) -> None:
    student, teacher = features(relation, dtype=widest(backend, device), device=device)
    expected = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    for strides in (
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat((x, x), 1)[:, ::2].copy_(x),
        lambda x: torch.cat((x, x), 2)[:, :, 1::2].copy_(x) if x.shape[2] % 2 == 0 else x,
    ):
        assert_equal(value_and_gradient(strides(student), strides(teacher), relation, backend), expected)


@every_normalization
def test_expanded_batch(backend: str, relation: Relation, device: torch.device) -> None:
    """One image three times, with batch stride 0."""
    student, teacher = features(relation, batch=1, dtype=widest(backend, device), device=device)
    assert_equal_to_reference(student.expand(3, -1, -1), teacher.expand(3, -1, -1), relation, backend)


@every_normalization
def test_gradient_of_an_expanded_student_is_the_sum(backend: str, relation: Relation, device: torch.device) -> None:
    student, teacher = features(relation, batch=3, dtype=widest(backend, device), device=device)
    one = student[:1].clone().requires_grad_()
    common = {"layout": "nlc", "reduction": "sum", **options(relation)}
    gradients = []
    for name in (backend, "reference"):
        loss = relation_loss(one.expand(3, -1, -1), teacher, backend=name, **common)
        gradients += torch.autograd.grad(loss, one)
    assert error(*gradients) <= rounding(one.dtype)


@every_normalization
def test_images_are_independent(backend: str, relation: Relation, device: torch.device) -> None:
    student, teacher = features(relation, batch=5, dtype=widest(backend, device), device=device)
    loss, gradient = value_and_gradient(student, teacher, relation, backend)
    for image in range(5):
        only = slice(image, image + 1)
        alone = value_and_gradient(student[only], teacher[only], relation, backend)
        assert_equal((loss[only], gradient[only]), alone)


# --- edge cases -----------------------------------------------------------------------------------------------------

DEAD = {
    "student's pixel": (lambda s, t: s[:, 3].zero_()),
    "teacher's pixel": (lambda s, t: t[:, 3].zero_()),
    "the same pixel of both": (lambda s, t: (s[:, 3].zero_(), t[:, 3].zero_())),
    "different pixels": (lambda s, t: (s[:, 0].zero_(), t[:, 34].zero_())),
    "many pixels": (lambda s, t: (s[:, ::2].zero_(), t[:, ::3].zero_())),
    "a channel": (lambda s, t: (s[..., 1].zero_(), t[..., 2].zero_())),
    "student's map": (lambda s, t: s.zero_()),
    "teacher's map": (lambda s, t: t.zero_()),
    "both maps": (lambda s, t: (s.zero_(), t.zero_())),
    "one image's map": (lambda s, t: s[1].zero_()),
}


@pytest.mark.parametrize("kill", DEAD.values(), ids=DEAD.keys())
@few_flags
def test_zero_norm_pixels(backend: str, relation: Relation, kill: Callable, device: torch.device) -> None:
    """All-zero pixels give finite values, and no gradient through their normalisation."""
    student, teacher = features(relation, dtype=widest(backend, device), device=device)
    kill(student, teacher)
    _, gradient = assert_equal_to_reference(student, teacher, relation, backend, slack=10)
    zero_norm = ~student.any(-1)
    if relation.normalize == "cosine":  # related to nothing, however it moves
        assert not gradient[zero_norm].any()
    narrow = value_and_gradient(student.float(), teacher.float(), relation, backend)
    assert narrow[0].isfinite().all()
    assert narrow[1].isfinite().all()
    assert narrow[1].abs().max() <= 2 * gradient.abs().max() + 1e-6  # F.normalize would give some 1e9 here


@pytest.mark.parametrize("normalize", ["row", "cosine"])
@pytest.mark.parametrize("backend", FAST)
def test_eps_is_the_largest_norm_that_counts_as_zero(backend: str, normalize: str, device: torch.device) -> None:
    """A norm of exactly eps counts as zero, one above it does not."""
    distance = distances(backend)[0]
    # pixel norms 5 and 13, orthogonal, so that the row norms are 25 and 169
    student = torch.tensor([[[3.0, 4, 0, 0], [0, 0, 5, 12]]], dtype=widest(backend, device), device=device)
    teacher = torch.zeros_like(student)  # relation 0
    alive = {"row": (25, 169), "cosine": (5, 13)}[normalize]
    pairs_alive = 2 if normalize == "row" else 0  # of cosine, the diagonal does not count
    for eps, count in ((0.999 * alive[0], 2), (alive[0], 1), (alive[1], 0)):
        relation = Relation(normalize, distance, eps=eps)
        loss, _ = value_and_gradient(student, teacher, relation, backend)
        scale = 0.5 if distance == "huber" else 1.0
        assert loss.item() == pytest.approx(scale * count * pairs_alive / 2 / 4)
        scales = formulas.scales_of(student, teacher, relation, student.dtype)
        assert scales.student.count_nonzero() == count
        assert_equal_to_reference(student, student.roll(1, -1), relation, backend)


@pytest.mark.parametrize("channels", [16, 160])
@pytest.mark.parametrize("dtype", (torch.float64, *NARROW), ids=lambda dtype: str(dtype)[6:])
@every_case
def test_identical_teacher(
    backend: str, relation: Relation, dtype: torch.dtype, channels: int, device: torch.device
) -> None:
    """D is exactly 0 since both relation matrices come from the same operations, and sign(0) = 0: no gradient.

    Were the two scales computed by different routes, l1 would turn their rounding into a gradient of full size.

    closed_form subtracts sums of different products, in float64: 0 up to rounding.
    """
    if dtype not in dtypes(backend, device):
        pytest.skip(f"{backend} does not support {dtype}")
    student, _ = features(pixels=40, channels=(channels, 1), dtype=dtype, device=device)
    loss, gradient = value_and_gradient(student, student.clone(), relation, backend)
    if backend == "closed_form":
        size = relation_matrix(student.double(), relation).square().mean().item()
        assert loss.abs().max() <= 1e-14 * size
        assert gradient.abs().max() <= 1e-14 * size
    else:
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize(("backend", "relation"), cases(flags=[(), ("rectify",), ("detach_norms",)]))
def test_a_nan_is_not_hidden(backend: str, relation: Relation, device: torch.device) -> None:
    for dtype, broken in itertools.product({widest(backend, device), torch.bfloat16}, (0, 1)):
        if dtype not in dtypes(backend, device):
            continue
        pair = features(dtype=dtype, device=device)
        pair[broken][1, 2, 3] = math.nan
        loss, gradient = value_and_gradient(*pair, relation, backend)
        assert loss[1].isnan()
        assert loss[0].isfinite() and gradient[0].isfinite().all()
        # every pixel has a relation to the broken one; the sign of NaN may be 0
        assert broken or relation.distance == "l1" or not gradient[1].isfinite().any()


# --- blocked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 34, 35, 100])
@pytest.mark.parametrize(("backend", "relation"), cases(["blocked"]))
def test_strips_of_any_number_of_rows(
    backend: str, relation: Relation, rows: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(blocked, "strip_rows", lambda *_: rows)
    student, teacher = features(relation, dtype=widest(backend, device), device=device)
    assert_equal_to_reference(student, teacher, relation, backend)
    student[:, 5], teacher[:, 17] = 0, 0
    assert_equal_to_reference(student, teacher, relation, backend, slack=10)


@pytest.mark.parametrize(
    ("batch", "pixels", "rows"), [(1, 4, 16), (1, 64, 64), (1, 4096, 128), (2, 4096, 64), (64, 65536, 16)]
)
def test_rows_of_a_strip(batch: int, pixels: int, rows: int) -> None:
    assert strips.strip_rows(batch, pixels, torch.device("cpu")) == rows
    for device in ("cpu", "cuda", "mps"):
        assert strips.strip_rows(batch, pixels, torch.device(device)) >= 1


# --- memory ---------------------------------------------------------------------------------------------------------


def interpreted(backend: str, device: torch.device) -> bool:
    """Whether a backend runs in Triton's interpreter, which is too slow for real sizes."""
    return backend == "triton" and device.type == "cpu"


class Allocations(TorchDispatchMode):
    """Record the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel(), value.untyped_storage().nbytes() // value.itemsize)
        return result


@pytest.mark.parametrize("device", [torch.device("cpu")])  # on a GPU, strips fill the device
@every_case
def test_no_n_by_n_tensor(backend: str, relation: Relation, device: torch.device) -> None:
    if interpreted(backend, device):
        pytest.skip("in the interpreter")
    pixels = 1500
    student, teacher = features(batch=1, pixels=pixels, dtype=torch.float32)
    with Allocations() as seen:  # inside the operator, which is one opaque step to a mode outside
        dispatch.compute_loss(student, teacher, relation, backend, True)
    assert 0 < seen.largest < pixels**2 / 4


def test_peak_memory() -> None:
    """Forward and backward, C++ included, increase the peak memory of a process by less than an N x N array.

    Strips take a fixed size, almost half of it.
    """
    pixels, cpu = 4096, torch.device("cpu")
    usable = [name for name in BACKENDS if not (dispatch.unavailable_reason(name, cpu) or interpreted(name, cpu))]
    chosen = [case.values for case in cases() if case.values[0] in usable and case.values[1].normalize == "row"]
    peaks = peaks_in_new_process(f"""
import functools, torch
from helpers import features, value_and_gradient
from srpkd.kernels import Relation
student, teacher = features(batch=1, pixels={pixels}, dtype=torch.float32)
calls = [functools.partial(value_and_gradient, student, teacher, relation, name) for name, relation in {chosen}]
""")
    assert len(peaks) == len(chosen) >= 3
    assert max(peaks) < 0.9 * pixels**2 * 4, dict(zip(chosen, peaks))


def test_tiles_of_closed_form_are_float64() -> None:
    """closed_form returns float64 sums for narrower features too."""
    student, teacher = features(dtype=torch.float32)
    relation = Relation("row", "l2")
    scales = formulas.scales_of(student, teacher, relation, closed_form.SCALE_DTYPE)
    tiles: TileSums = closed_form.relation_tiles(student, teacher, scales, relation, True)
    assert tiles.loss.dtype == tiles.U.dtype == tiles.h.dtype == torch.float64
