"""Estimates from sampled columns (columns=m): against their definition, unbiased, reproducible."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import RELATIONS, error, features, name_of, options, peaks_in_new_process
from torch import Tensor

from srpkd import SRPLoss, relation_loss
from srpkd.kernels import NORMALIZATIONS, Relation, dispatch, native, sampling, strips, unavailable_reason
from srpkd.kernels.formulas import accumulator, distance_value
from srpkd.kernels.op import relation_loss_op
from srpkd.kernels.reference import relation_matrix

CPU = torch.device("cpu")
BACKENDS = [name for name in dispatch.partial_backends(CPU) if unavailable_reason(name, CPU) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_normalization = pytest.mark.parametrize("relation", RELATIONS[::3], ids=lambda r: r.normalize)
FLAGGED = [
    Relation(normalize, "l1", rectify=rectify, detach_norms=True)
    for normalize in NORMALIZATIONS
    for rectify in (False, True)
]
every_relation = pytest.mark.parametrize("relation", RELATIONS + FLAGGED, ids=name_of)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sets of rows in small images, the last ones with a row less, and estimates of these images."""
    monkeypatch.setattr(sampling, "ROWS", 8)
    monkeypatch.setattr(sampling, "EXACT_PIXELS", 0)


def definition(student: Tensor, teacher: Tensor, relation: Relation, columns: Tensor) -> Tensor:
    """The mean of rho over the sampled pairs (i, j) and (j, i), by the arrays of all pairs."""
    batch, pixels, _ = student.shape
    sets = columns.shape[1]
    count = torch.zeros(batch, pixels, pixels, dtype=torch.float64)
    for image in range(batch):
        for i in range(pixels):
            count[image, i].index_add_(0, columns[image, i % sets], torch.ones(columns.shape[2]).double())
    D = relation_matrix(student, relation) - relation_matrix(teacher, relation)
    if relation.normalize == "cosine":
        D = D * ~torch.eye(pixels, dtype=torch.bool)
    total = (count + count.mT) * distance_value(D, relation)
    return total.sum((1, 2)) / (2 * pixels * columns.shape[2])


def expected_estimate(student: Tensor, teacher: Tensor, relation: Relation, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The definition and its gradient by autograd, in float64."""
    student = student.double().requires_grad_()
    loss = definition(student, teacher.double(), relation, columns)
    return loss.detach(), *torch.autograd.grad(loss.sum(), student)


# --- the estimate for given columns ---------------------------------------------------------------------------------


@every_backend
@every_relation
@pytest.mark.parametrize(("pixels", "columns"), [(35, 5), (32, 15), (8, 3), (9, 1)], ids=str)
def test_estimate_of_given_columns(
    backend: str, relation: Relation, pixels: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = features(relation, pixels=pixels)
    student[0, 3] = teacher[0, 5] = teacher[1, 3] = 0  # norms of zero in one network only
    index = sampling.draw_columns(2, pixels, columns, CPU)
    expected = expected_estimate(student, teacher, relation, index)
    for tile in (0, 16):
        monkeypatch.setattr(native, "TILE", tile)
        loss, gradient = dispatch.compute_loss(student, teacher, relation, backend, True, index)
        assert error(loss, expected[0]) < 1e-12
        assert error(gradient, expected[1], least=1e-3) < 1e-12
    transposed = (x.mT.contiguous().mT for x in (student, teacher))
    loss, gradient = dispatch.compute_loss(*transposed, relation, backend, False, index)
    assert error(loss, expected[0]) < 1e-12
    assert gradient is None


@every_backend
@every_normalization
def test_several_blocks_of_columns(backend: str, relation: Relation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "ROWS", 50)
    student, teacher = features(None, batch=1, pixels=170)
    student[0, 100:130] = teacher[0, 120:150] = 0  # ties in later blocks of rows
    index = sampling.draw_columns(1, 170, 70, CPU)
    monkeypatch.setattr(native, "TILE", 16)
    monkeypatch.setitem(strips.STRIP_ELEMENTS, "cpu", 1)
    found = dispatch.compute_loss(student, teacher, relation, backend, True, index)
    for one, other in zip(found, expected_estimate(student, teacher, relation, index), strict=True):
        assert error(one, other) < 1e-12


@every_backend
@every_normalization
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(backend: str, relation: Relation, dtype: torch.dtype) -> None:
    """Raw features in 16 bits are multiplied exactly; only sums round, in float32, and at the end the gradient."""
    student, teacher = features(relation, dtype=dtype, apart=1e-4)
    index = sampling.draw_columns(2, student.shape[1], 5, CPU)
    expected_loss, expected = expected_estimate(student, teacher, relation, index)
    loss, gradient = dispatch.compute_loss(student, teacher, relation, backend, True, index)
    assert loss.dtype == accumulator(dtype)
    assert error(loss, expected_loss) < 2e-6
    assert error(gradient, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="native cannot be built")
def test_several_threads_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TILE", 16)
    student, teacher = torch.randn(2, 500, 16), torch.randn(2, 500, 32)
    index = sampling.draw_columns(2, 500, 40, CPU)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (4, 4, 3, 4, 1):
            torch.set_num_threads(count)
            results.append(native.sampled_loss_and_gradient(student, teacher, RELATIONS[0], True, index))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif("native" not in BACKENDS, reason="native cannot be built")
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"teacher": torch.ones(1, 5, 5)}, ValueError, r"student \(B, N, C_s\) and teacher \(B, N, C_t\)"),
        ({"teacher": torch.ones(1, 4, 5).double()}, TypeError, "of one floating-point dtype"),
        ({"columns": torch.zeros(1, 4).long()}, ValueError, r"expected columns \(B, sets, m\) of int64"),
        ({"columns": torch.zeros(1, 1, 1).int()}, ValueError, "of int64"),
        ({"columns": torch.zeros(2, 1, 1).long()}, ValueError, "with B = 1"),
        ({"columns": torch.full((1, 1, 1), 4)}, IndexError, "pixels from 0 to 3, received 4"),
        ({"columns": torch.full((1, 1, 1), -1)}, IndexError, "pixels from 0 to 3, received -1"),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_operator(change: dict, kind: type[Exception], message: str) -> None:
    native.extension()
    arguments = {
        "student": torch.ones(1, 4, 3),
        "teacher": torch.ones(1, 4, 5),
        "columns": torch.zeros(1, 1, 1).long(),
    } | change
    with pytest.raises(kind, match=message):
        torch.ops.srpkd.sampled_loss(*arguments.values(), *Relation().arguments, True)


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "columns"), [(64, 5), (61, 20), (7, 7), (1, 1)], ids=str)
def test_sets_draw_disjoint_columns(pixels: int, columns: int) -> None:
    drawn = sampling.draw_columns(2, pixels, columns, CPU)
    sets = -(-pixels // sampling.ROWS)
    assert drawn.shape == (2, sets, columns)
    assert drawn.min() >= 0 and drawn.max() < pixels
    for image in drawn:
        for group in image.split(pixels // columns):
            assert group.unique().numel() == group.numel()


@pytest.mark.parametrize("sorted_keys", [1, 200])
def test_parts_draw_the_same_columns(sorted_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = [], []
    for draws in (expected, found):
        generator = torch.Generator().manual_seed(0)
        draws += [sampling.draw_columns(3, pixels, 20, CPU, generator) for pixels in (61, 64)]
        monkeypatch.setattr(sampling, "SORTED_KEYS", sorted_keys)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_peak_memory_of_a_draw() -> None:
    """Little more than the result, although its random numbers and permutations have the same size."""
    pixels, columns = 2**14, 2**13 - 1
    (peak,) = peaks_in_new_process(f"""
import torch
from srpkd.kernels import sampling
sampling.ROWS, sampling.SORTED_KEYS = 64, 2**16
calls = [lambda: sampling.draw_columns(1, {pixels}, {columns}, torch.device("cpu"))]
""")
    result = pixels // 64 * columns * 8
    assert peak < 1.8 * result


def test_every_pair_is_equally_likely() -> None:
    draws, pixels, columns = 4000, 20, 6
    drawn = sampling.draw_columns(draws, pixels, columns, CPU, torch.Generator().manual_seed(0))
    for columns_of_set in drawn.unbind(1):
        count = torch.bincount(columns_of_set.flatten(), minlength=pixels)
        mean = draws * columns / pixels
        assert (count - mean).abs().max() < 4.5 * (mean * (1 - columns / pixels)) ** 0.5


@every_relation
def test_unbiased(relation: Relation) -> None:
    """The mean of many draws is within 5 standard errors of the exact loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 35, channels, dtype=torch.float64, generator=generator) + 0.5 for channels in (5, 7)
    )
    student[0, 3] = teacher[0, 5] = 0
    draws, columns = 400, 4
    many = student.expand(draws, -1, -1).clone().requires_grad_()  # every image draws columns of its own
    # named, since auto computes l2 of so few channels exactly
    settings = {**options(relation), "layout": "nlc", "reduction": "none", "backend": BACKENDS[0]}
    losses = relation_loss(many, teacher.expand(draws, -1, -1), columns=columns, generator=generator, **settings)
    (gradients,) = torch.autograd.grad(losses.sum(), many)
    exact = relation_loss(student.requires_grad_(), teacher, **settings)
    (gradient,) = torch.autograd.grad(exact.sum(), student)
    for found, expected in ((losses.detach(), exact.detach()), (gradients, gradient)):
        standard_error = found.std(0) / draws**0.5
        assert (standard_error > 0).float().mean() > 0.9  # it varies
        distance = (found.mean(0) - expected[0]).abs()
        assert (distance <= 5 * standard_error + 1e-12 * expected.abs().max()).all()
        # the test is sharp enough to notice a gradient that is off by a few percent
        assert error(found.mean(0), expected[0]) < 0.2
    assert error(losses.mean(0), exact[0]) < 0.02


# --- the options of the loss ----------------------------------------------------------------------------------------


def maps(batch: int = 2, size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student (B, 5, H, W), which requires a gradient, and teacher (B, 7, H, W)."""
    student, teacher = (torch.randn(batch, channels, size, size, dtype=dtype) for channels in (5, 7))
    return student.requires_grad_(), teacher


@every_backend
def test_generators_and_seeds(backend: str) -> None:
    student, teacher = maps()
    options = {"distance": "l1", "columns": 4, "backend": backend}

    def estimate(**more) -> Tensor:
        loss = relation_loss(student, teacher, **options, **more)
        return torch.cat([loss.detach().view(1), *torch.autograd.grad(loss, student)[0].flatten(1)])

    with_generator = [estimate(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(with_generator[0], with_generator[1])
    assert not torch.equal(with_generator[0], with_generator[2])
    torch.manual_seed(3)
    first, second = estimate(), estimate()
    torch.manual_seed(3)
    assert torch.equal(estimate(), first)
    assert not torch.equal(first, second)


@every_backend
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nlc"])
def test_layouts_and_scope(backend: str, layout: str) -> None:
    """The same pixels draw the same columns in any layout; scope="batch" is one image."""
    student, teacher = maps(dtype=torch.float64)
    changed = {
        "nchw": lambda x: x.contiguous(memory_format=torch.channels_last),
        "nhwc": lambda x: x.permute(0, 2, 3, 1).contiguous(),
        "nlc": lambda x: x.flatten(2).mT.contiguous(),
    }[layout]
    options = {"normalize": "row", "distance": "l1", "columns": 4, "backend": backend}
    for scope in ("image", "batch", "global"):
        torch.manual_seed(0)
        expected = relation_loss(student, teacher, scope=scope, **options)
        torch.manual_seed(0)
        loss = relation_loss(changed(student), changed(teacher), scope=scope, layout=layout, **options)
        assert error(loss, expected) < 1e-12
        gradients = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
        assert error(*gradients) < 1e-12
    wide = [x.permute(1, 0, 2, 3).reshape(1, x.shape[1], 12, 6) for x in (student, teacher)]
    torch.manual_seed(0)
    assert error(relation_loss(*wide, **options), expected) < 1e-12


def test_features_without_a_batch() -> None:
    student, teacher = maps(1)
    loss = relation_loss(student[0], teacher[0], distance="l1", columns=4, reduction="none")
    assert loss.shape == ()
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("columns", "exact_pixels"), [(12, 0), (18, 0), (36, 0), (1000, 0), (1, 36)])
def test_exact_where_it_takes_no_longer(columns: int, exact_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "EXACT_PIXELS", exact_pixels)
    student, teacher = maps()
    state = torch.get_rng_state()
    for chosen in ({"distance": "l1"}, {"normalize": "row"}, {"distance": "huber", "backend": "blocked"}):
        loss = relation_loss(student, teacher, columns=columns, **chosen)
        assert torch.equal(loss, relation_loss(student, teacher, **chosen))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_exact_where_the_row_norms_take_as_long(distance: str) -> None:
    """With no more pixels than channels in one of the networks."""
    few, many = torch.randn(1, 4, 17, 17), torch.randn(1, 17 * 17, 17, 17)
    for student, teacher in ((few, many), (many, few)):
        exact, estimate, cosine = (
            relation_loss(student, teacher, normalize=normalize, distance=distance, columns=columns)
            for normalize, columns in (("row", None), ("row", 8), ("cosine", 8))
        )
        assert torch.equal(estimate, exact)
        assert error(cosine, relation_loss(student, teacher, distance=distance)) > 1e-6
    fewer = many[:, :-1]
    exact, estimate = (
        relation_loss(few, fewer, normalize="row", distance=distance, columns=columns) for columns in (None, 8)
    )
    assert error(estimate, exact) > 1e-6


def test_the_pixels_of_a_batch_decide_whether_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "EXACT_PIXELS", 0)
    student, teacher = maps()
    exact = relation_loss(student, teacher, distance="l1", scope="batch")
    estimate, many = (relation_loss(student, teacher, distance="l1", scope="batch", columns=m) for m in (23, 24))
    assert error(estimate, exact) > 1e-6
    assert torch.equal(many, exact)


@pytest.mark.parametrize(("normalize", "columns"), [("row", 208), ("cosine", 130), ("none", 130)])
def test_exact_l2_by_closed_form_where_it_takes_no_longer(normalize: str, columns: int) -> None:
    student, teacher = torch.randn(1, 2, 32, 32), torch.randn(1, 2, 32, 32)
    few, many = (relation_loss(student, teacher, normalize=normalize, columns=m) for m in (columns - 1, columns))
    exact = relation_loss(student, teacher, normalize=normalize, backend="closed_form")
    assert torch.equal(many, exact)
    assert error(few, exact) > 1e-6
    named = relation_loss(student, teacher, normalize=normalize, columns=columns, backend="blocked")
    assert error(named, exact) > 1e-6


def test_estimate_of_l2_that_closed_form_does_not_support() -> None:
    student, teacher = torch.randn(1, 2, 32, 32), torch.randn(1, 2, 32, 32)
    estimate = relation_loss(student, teacher, columns=200, rectify=True)
    assert error(estimate, relation_loss(student, teacher, rectify=True)) > 1e-6


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"columns": 0}, ValueError, "columns=0: expected an integer >= 1"),
        ({"columns": 1.5}, TypeError, "columns=1.5: expected an integer >= 1, received float"),
        ({"columns": True}, TypeError, "columns=True: expected an integer"),
        ({"columns": 4, "generator": 7}, TypeError, "generator: expected a torch.Generator or None, received int"),
        *(
            ({"columns": 4, "backend": name}, ValueError, f"works on cpu with .* 'blocked', received '{name}'")
            for name in ("reference", "closed_form", "triton")
        ),
    ],
    ids=str,
)
def test_wrong_options(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        relation_loss(*maps(), **options)
    with pytest.raises(kind, match=message):
        SRPLoss(**options)(*maps())


def test_generator_of_another_device() -> None:
    features = torch.empty(1, 4, 3, device="meta")
    with pytest.raises(ValueError, match=r"generator is on cpu and the features on meta.*torch.Generator\('meta'\)"):
        SRPLoss(columns=1, generator=torch.Generator(), layout="nlc", distance="l1")(features, features)


def test_module() -> None:
    loss_fn = SRPLoss(distance="l1", columns=4, generator=torch.Generator().manual_seed(0))
    assert "columns=4" in repr(loss_fn)
    student, teacher = maps()
    other = copy.deepcopy(loss_fn)
    first = loss_fn(student, teacher)
    assert torch.equal(other(student, teacher), first)  # a copy has a generator of its own, in the same state
    expected = relation_loss(student, teacher, distance="l1", columns=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, expected)
    loss_fn.columns = None
    assert torch.equal(loss_fn(student, teacher), relation_loss(student, teacher, distance="l1"))


@every_backend
def test_autocast_changes_nothing(backend: str) -> None:
    student, teacher = maps()
    losses = []
    for enabled in (False, True):
        loss_fn = SRPLoss(columns=4, backend=backend, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled):
            losses.append(loss_fn(student, teacher))
    assert torch.equal(*losses)


# --- operator and compiler ------------------------------------------------------------------------------------------


@every_backend
def test_opcheck(backend: str) -> None:
    student, teacher = torch.randn(2, 20, 3), torch.randn(2, 20, 4)
    index = sampling.draw_columns(2, 20, 5, CPU)
    for need_grad in (True, False):
        inputs = (
            student.clone().requires_grad_(need_grad),
            teacher,
            "row",
            "l1",
            1.0,
            1e-12,
            True,
            False,
            backend,
            need_grad,
            index,
        )
        torch.library.opcheck(relation_loss_op, inputs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    """One graph, that draws other columns in every call, as the eager module does from the same seed."""
    loss_fn = SRPLoss(distance="l1", columns=4)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    student, teacher = maps()
    found = []
    for function in (loss_fn, compiled):
        torch.manual_seed(0)
        losses = [function(student, teacher) for _ in range(2)]
        found.append(torch.stack([*losses, *(torch.autograd.grad(x, student)[0].norm() for x in losses)]).detach())
        assert losses[0] != losses[1]
    assert error(found[1], found[0]) < 1e-6
    # another batch makes sizes symbolic
    student, teacher = maps(batch=3)
    found = []
    for function in (loss_fn, compiled):
        torch.manual_seed(0)
        found.append(function(student, teacher))
    assert error(found[1], found[0]) < 1e-6
    exact = torch.compile(SRPLoss(distance="l1", columns=12), fullgraph=True, backend="aot_eager")
    assert error(exact(student, teacher), relation_loss(student, teacher, distance="l1")) < 1e-6


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_relation
def test_blocked_on_a_gpu(relation: Relation) -> None:
    """The same columns give the same estimate as on the CPU, in two runs the same bits, and no synchronisation."""
    student, teacher = features(relation, pixels=300)
    index = sampling.draw_columns(2, 300, 40, CPU)
    expected = dispatch.compute_loss(student, teacher, relation, "blocked", True, index)
    inputs = [x.cuda() for x in (student, teacher)], index.cuda()

    def run() -> tuple[Tensor, Tensor | None]:
        return dispatch.compute_loss(*inputs[0], relation, "auto", True, inputs[1])

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
        sampling.draw_columns(2, 300, 40, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, again, other in zip(first, second, expected, strict=True):
        assert torch.equal(one, again)
        assert error(one, other) < 1e-12


@pytest.mark.gpu
def test_a_cuda_graph_draws_other_columns_in_each_replay() -> None:
    student, teacher = (x.detach().cuda() for x in maps(size=16))
    loss_fn = SRPLoss(distance="l1", columns=8)
    exact = SRPLoss(distance="l1")(student, teacher)
    loss_fn(student, teacher)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_fn(student, teacher)
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.clone())
    assert torch.stack(losses).unique().numel() > 15
    assert error(torch.stack(losses).mean(), exact) < 0.05
