"""``relation_loss`` and ``SRPLoss`` against plain loops over the definition, and their errors."""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pytest
import reference_loops as loops
import torch
from helpers import FLAG_SETS, cases, distances, error, features, few_cases, options, rounding, widest
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from srpkd import SRPLoss, relation_loss
from srpkd.kernels import BACKENDS, Relation, dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_BACKENDS = list(BACKENDS)
ROW_L1 = {"normalize": "row", "distance": "l1"}
on_the_cpu = pytest.mark.parametrize("device", [torch.device("cpu")])  # of the backends that can run there


def pair(batch: int = 2, height: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student (B, 5, H, W), which requires a gradient, and teacher (B, 7, H, W)."""
    student, teacher = (torch.randn(batch, channels, height, width, dtype=dtype) for channels in (5, 7))
    return student.requires_grad_(), teacher


# --- the definition -------------------------------------------------------------------------------------------------


LOOPS = [
    pytest.param(*case.values, zero_norm, id=f"{case.id}-{len(zero_norm)}")
    for case in cases(ALL_BACKENDS, [(), *FLAG_SETS])
    for zero_norm in ((), (2,), (0, 4))
    # a central difference of max(A, 0) at A = 0 is half its slope, autograd's is 0
    if not (zero_norm and case.values[1].rectify)
]


@pytest.mark.parametrize(("backend", "relation", "zero_norm"), LOOPS)
@pytest.mark.core(90)
def test_loops(backend: str, relation: Relation, zero_norm: tuple[int, ...], device: torch.device) -> None:
    """Value and gradient of plain loops over NumPy arrays, zero-norm pixels of student and teacher included."""
    student, teacher = features(relation, batch=1, pixels=5, channels=(3, 2), apart=1e-2)
    # a pixel of norm 0 in both is a tie: there a central difference of |d| is 0, as sign(0) is
    student[:, zero_norm, :], teacher[:, zero_norm[:1], :] = 0, 0
    s, t = student[0].numpy(), teacher[0].numpy()
    expected = {name: getattr(relation, name) for name in ("normalize", "distance", "delta", "rectify")}

    dtype = widest(backend, device)
    student, teacher = student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)
    loss = relation_loss(student, teacher, layout="nlc", backend=backend, **options(relation))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(loops.loss(s, t, **expected), rel=rounding(dtype))
    tolerance = 1e-7 + rounding(dtype)
    expected_gradient = loops.gradient(s, t, **expected, detach_norms=relation.detach_norms)
    np.testing.assert_allclose(gradient[0].cpu(), expected_gradient, rtol=10 * tolerance, atol=tolerance)


def test_loops_by_hand() -> None:
    """The loops themselves, on two pixels with known relations."""
    student, teacher = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])
    assert loops.relation_matrix(student, "row", [False, True]) == [[1, 0], [0, 0]]
    assert loops.relation_matrix(teacher, "none", [False, False]) == [[1, 0], [0, 4]]
    assert loops.loss(student, teacher, "row", "l1") == 1 / 4
    assert loops.loss(student, teacher, "cosine", "l1") == 0
    assert loops.loss(student, teacher, "none", "l2") == (24**2 + 4**2) / 4
    opposite = np.array([[2.0, 0.0], [-1.0, 0.0]])  # G = [[4, -2], [-2, 1]]
    assert loops.loss(opposite, 0 * opposite, "none", "l1") == 9 / 4
    assert loops.loss(opposite, 0 * opposite, "none", "l1", rectify=True) == 5 / 4
    assert loops.loss(student, teacher, "none", "huber", delta=10) == (10 * (24 - 5) + 8) / 4


def test_layouts_agree() -> None:
    """(B, C, H, W) equals (B, N, C) with the pixels in row-major order."""
    student, teacher = pair(dtype=torch.float64)
    tokens = [x.detach().permute(0, 2, 3, 1).reshape(2, 12, -1) for x in (student, teacher)]
    tokens[0].requires_grad_()
    loss, same = relation_loss(student, teacher, **ROW_L1), relation_loss(*tokens, layout="nlc", **ROW_L1)
    torch.testing.assert_close(loss, same, rtol=1e-14, atol=0)
    gradients = torch.autograd.grad(loss, student)[0], torch.autograd.grad(same, tokens[0])[0]
    assert error(gradients[0].flatten(2).mT, gradients[1]) <= 1e-13


@pytest.mark.parametrize("relation", [ROW_L1, {}], ids=["row l1", "cosine l2"])
def test_channels_last_maps(relation: dict) -> None:
    """(B, H, W, C), contiguous or a view of (B, C, H, W), has the loss and gradient of (B, C, H, W)."""
    student, teacher = pair(dtype=torch.float64)
    expected = relation_loss(student, teacher, **relation)
    (gradient,) = torch.autograd.grad(expected, student)
    for is_contiguous in (False, True):
        maps = [x.detach().permute(0, 2, 3, 1) for x in (student, teacher)]
        maps = [x.contiguous() if is_contiguous else x for x in maps]
        maps[0].requires_grad_()
        loss = relation_loss(*maps, layout="nhwc", **relation)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        assert error(torch.autograd.grad(loss, maps[0])[0].permute(0, 3, 1, 2), gradient) <= 1e-13


@on_the_cpu
@pytest.mark.parametrize("backend", ["blocked", "native"])
def test_channels_last_maps_are_read_in_place(backend: str, device: torch.device) -> None:
    maps = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3, 4).permute(0, 2, 3, 1)
    relation_loss(*maps, layout="nhwc", backend=backend)  # loads the backend
    received = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "relation_loss" in func.name():
                received.extend(args[:2])
            return func(*args, **(kwargs or {}))

    with Record():
        relation_loss(*maps, layout="nhwc", backend=backend)
    assert [x.data_ptr() for x in received] == [x.data_ptr() for x in maps]
    assert [tuple(x.shape) for x in received] == [(2, 12, 5), (2, 12, 7)]


@on_the_cpu
@pytest.mark.parametrize(("backend", "relation"), few_cases(ALL_BACKENDS))
def test_reductions(backend: str, relation: Relation, device: torch.device) -> None:
    student, teacher = pair(batch=3, dtype=widest(backend))
    values, gradients = {}, {}
    for reduction in ("none", "sum", "mean"):
        values[reduction] = relation_loss(student, teacher, reduction=reduction, backend=backend, **options(relation))
        (gradients[reduction],) = torch.autograd.grad(values[reduction].sum(), student)
    assert values["none"].shape == (3,)
    assert values["sum"].shape == values["mean"].shape == ()
    torch.testing.assert_close(values["none"].sum(), values["sum"])
    torch.testing.assert_close(values["none"].mean(), values["mean"])
    torch.testing.assert_close(gradients["none"], gradients["sum"])
    torch.testing.assert_close(gradients["sum"] / 3, gradients["mean"])


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=lambda dtype: str(dtype)[6:],
)
def test_mixed_dtypes_are_promoted(backend: str, ours: torch.dtype, theirs: torch.dtype, result: torch.dtype) -> None:
    student, teacher = pair()
    student, teacher = student.detach().to(ours).requires_grad_(), teacher.to(theirs)
    loss = relation_loss(student, teacher, backend=backend, **ROW_L1)
    loss.backward()
    assert loss.dtype == result
    assert student.grad.dtype == ours
    exact = relation_loss(student.double(), teacher.double(), backend="reference", **ROW_L1)
    assert error(loss, exact) <= 4 * torch.finfo(result).eps


def test_gradient_of_one_image_through_its_norm() -> None:
    """PyTorch's backward of nn.InstanceNorm2d on a CPU depends on the strides of the gradient."""
    images, teacher = torch.randn(1, 8, 6, 5), torch.randn(1, 4, 6, 5)

    def gradient(backend: str) -> Tensor:
        leaf = images.clone().requires_grad_()
        relation_loss(F.instance_norm(leaf), teacher, backend=backend, **ROW_L1).backward()
        return leaf.grad

    torch.testing.assert_close(gradient("reference"), gradient("blocked"))


@on_the_cpu
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "l1" in distances(name)])
def test_teacher_in_inference_mode(backend: str, device: torch.device) -> None:
    student, teacher = pair()
    with torch.inference_mode():
        inferred = teacher * 1
    loss = relation_loss(student, inferred, backend=backend, **ROW_L1)
    loss.backward()
    assert torch.equal(loss, relation_loss(student, teacher, backend=backend, **ROW_L1))
    assert student.grad.isfinite().all()


# --- the module -----------------------------------------------------------------------------------------------------


def test_module_equals_the_function() -> None:
    student, teacher = pair()
    assert torch.equal(SRPLoss()(student, teacher), relation_loss(student, teacher))
    given = {
        "normalize": "cosine",
        "distance": "huber",
        "delta": 0.2,
        "reduction": "none",
        "layout": "nlc",
        "eps": 1e-6,
        "backend": "blocked",
        "rectify": True,
        "detach_norms": True,
    }
    module = SRPLoss(**given)
    tokens = student.flatten(2).mT, teacher.flatten(2).mT
    assert torch.equal(module(*tokens), relation_loss(*tokens, **given))
    for name, value in given.items():
        assert f"{name}={value!r}" in repr(module)
        assert getattr(module, name) == value
    assert not list(module.parameters())
    assert not module.state_dict()


def test_default_is_cosine_and_l2_everywhere() -> None:
    from srpkd.training.options import TrainConfig

    student, teacher = pair()
    named = relation_loss(student, teacher, normalize="cosine", distance="l2")
    assert torch.equal(relation_loss(student, teacher), named)
    for holder in (SRPLoss(), Relation(), TrainConfig()):
        assert (holder.normalize, holder.distance) == ("cosine", "l2")


def test_options_are_validated_when_they_are_set_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SRPLoss()
    with pytest.raises(ValueError, match=r"normalize='rows' is not one of .* did you mean 'row'"):
        module.normalize = "rows"
    module.normalize, module.delta = "row", 2
    student, teacher = pair()
    expected = relation_loss(student, teacher, normalize="row")
    monkeypatch.setattr("srpkd.loss._check_option", lambda *_: pytest.fail("validated again"))
    assert torch.equal(module(student, teacher), expected)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("layout", ["nchw", "nlc", "nhwc"])
def test_features_without_a_batch_are_a_batch_of_one(layout: str, scope: str, backend: str) -> None:
    student, teacher = pair(batch=1)
    student = student.detach()
    if layout == "nlc":
        student, teacher = student.flatten(2).mT, teacher.flatten(2).mT
    elif layout == "nhwc":
        student, teacher = student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)
    single = student[0].clone().requires_grad_()
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = {"layout": layout, "scope": scope, "reduction": reduction, "backend": backend}
        loss, expected = relation_loss(single, teacher[0], **options), relation_loss(student, teacher, **options)
        assert loss.shape == () and expected.shape == ((1,) if reduction == "none" else ())
        assert torch.equal(loss, expected.squeeze())
    assert torch.equal(torch.autograd.grad(loss, single)[0], torch.autograd.grad(expected, student)[0][0])


def test_module_warns_once_of_an_unlikely_layout() -> None:
    swin = torch.ones(2, 16, 16, 96)  # (B, H, W, C)
    module = SRPLoss()
    with pytest.warns(UserWarning, match=r"\(2, 16, 16, 96\) are read as \(B, C, H, W\), .* pass layout='nhwc'"):
        module(swin, swin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(swin, swin)
        SRPLoss(layout="nhwc")(swin, swin)
        SRPLoss()(swin.permute(0, 3, 1, 2), swin.permute(0, 3, 1, 2))
    with pytest.warns(UserWarning, match="pass layout='nhwc'"):
        relation_loss(swin, swin)
    with pytest.warns(UserWarning, match="pass layout='nchw'"):
        SRPLoss(layout="nhwc")(swin.permute(0, 3, 1, 2), swin.permute(0, 3, 1, 2))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_module_reads_channels_last_maps() -> None:
    """A full graph, also for a shape that would give a warning."""
    student, teacher = torch.randn(2, 4, 4, 16, requires_grad=True), torch.randn(2, 4, 4, 16)
    for layout in ("nhwc", "nchw"):
        module = SRPLoss(layout=layout)
        loss = torch.compile(module, fullgraph=True, backend="aot_eager")(student, teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(loss, module(student, teacher))


# --- the package ----------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    import srpkd.distill_loop
    from srpkd.kernels.dispatch import BackendUnavailable
    from srpkd.models.checkpoints import CheckpointError

    assert srpkd.BackendUnavailable is BackendUnavailable and srpkd.CheckpointError is CheckpointError
    assert srpkd.distill is srpkd.distill_loop.distill
    assert all(hasattr(srpkd, name) for name in srpkd.__all__)
    with pytest.raises(ModuleNotFoundError):  # a function, not a module that the function hides
        importlib.import_module("srpkd.distill")


def test_every_option_matters() -> None:
    """Every option reaches the computation."""
    student, teacher = pair()
    base = SRPLoss(distance="huber", delta=0.1)
    changes = {"normalize": "row", "distance": "l1", "delta": 0.01, "reduction": "sum", "eps": 1e3, "rectify": True}
    for name, value in changes.items():
        other = SRPLoss(**{"distance": "huber", "delta": 0.1, name: value})
        assert not torch.equal(base(student, teacher), other(student, teacher)), name
    constant = SRPLoss(distance="huber", delta=0.1, detach_norms=True)  # changes only the gradient
    losses = base(student, teacher), constant(student, teacher)
    torch.testing.assert_close(*losses)
    assert not torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in losses))


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if dispatch.unsupported_flag(name, Relation(rectify=True)) is None]
)
def test_rectified_equals_the_relu_of_both_matrices(backend: str, device: torch.device) -> None:
    """Gram anchoring as it is usually written: negative similarities of both networks are clamped to 0."""
    student, teacher = features(Relation(rectify=True), dtype=widest(backend, device), device=device)
    student.requires_grad_()
    grams = [(x @ x.mT).relu() for x in (F.normalize(x, dim=-1) for x in (student, teacher))]
    expected = (grams[0] - grams[1]).square().mean()
    loss = relation_loss(student, teacher, layout="nlc", rectify=True, backend=backend)
    assert error(loss, expected) <= 3 * rounding(student.dtype)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    assert error(*gradients) <= 3 * rounding(student.dtype)


def test_detached_norms_equal_the_pairwise_loss_of_structured_distillation() -> None:
    """The published code divides by the norm plus 1e-8, computed from the features' values."""
    student, teacher = pair(dtype=torch.float64)
    scaled = [x / (x.detach().square().sum(1, keepdim=True).sqrt() + 1e-8) for x in (student, teacher)]
    grams = [torch.einsum("icm,icn->imn", x.flatten(2), x.flatten(2)) for x in scaled]
    expected = (grams[1] - grams[0]).square().sum() / 12**2 / 2
    loss = relation_loss(student, teacher, detach_norms=True)
    assert error(loss, expected) <= 1e-7
    assert error(*(torch.autograd.grad(value, student)[0] for value in (loss, expected))) <= 1e-7


def test_a_backend_without_rectify_says_so() -> None:
    student, teacher = pair()
    message = r"backend='closed_form' does not support rectify=True: use backend='auto', or rectify=False"
    with pytest.raises(ValueError, match=message):
        relation_loss(student, teacher, rectify=True, backend="closed_form")
    assert relation_loss(student, teacher, rectify=True) > 0  # auto takes tiles


# --- errors ---------------------------------------------------------------------------------------------------------

IMAGE = torch.ones(2, 3, 4, 4)
REFUSED = {
    "normalize": ({"normalize": "rows"}, ValueError, ["normalize='rows'", "'row', 'cosine', 'none'", "mean 'row'?"]),
    "distance": ({"distance": "L1"}, ValueError, ["distance='L1'", "'l1', 'l2', 'huber'", "did you mean 'l"]),
    "far from all": ({"distance": "wasserstein"}, ValueError, ["'wasserstein'", "'huber'"]),
    "reduction": ({"reduction": "means"}, ValueError, ["reduction='means'", "did you mean 'mean'?"]),
    "layout": ({"layout": "NCHW"}, ValueError, ["layout='NCHW'", "'nchw', 'nlc', 'nhwc'"]),
    "not a word": ({"normalize": None}, ValueError, ["normalize=None", "'none'"]),
    "a list": ({"normalize": ["row"]}, ValueError, ["normalize=['row'] is not one of", "mean 'row'"]),
    "an array": ({"normalize": np.array(["row", "none"])}, ValueError, ["is not one of 'row', 'cosine'"]),
    "backend": ({"backend": "blockd"}, ValueError, ["backend='blockd'", "'auto'", "did you mean 'blocked'?"]),
    "delta 0": ({"delta": 0.0}, ValueError, ["delta=0.0", "above 0"]),
    "delta infinite": ({"delta": float("inf")}, ValueError, ["delta=inf", "finite"]),
    "delta nan": ({"delta": math.nan}, ValueError, ["delta=nan"]),
    "delta is a text": ({"delta": "1"}, TypeError, ["delta='1': expected a number above 0, received str"]),
    "delta is a tensor": ({"delta": torch.ones(2)}, TypeError, ["expected a number above 0, received Tensor"]),
    "delta is a bool": ({"delta": True}, TypeError, ["delta=True: expected a number"]),
    "eps is nothing": ({"eps": None}, TypeError, ["eps=None: expected a number of at least 0"]),
    "eps below 0": ({"eps": -1e-9}, ValueError, ["eps=-1e-09", "at least 0"]),
    "eps nan": ({"eps": math.nan}, ValueError, ["eps=nan"]),
    "rectify": ({"rectify": "yes"}, TypeError, ["rectify='yes'", "True or False", "received str"]),
    "detach_norms": ({"detach_norms": 1}, TypeError, ["detach_norms=1", "True or False", "received int"]),
    "generator": ({"generator": torch.Generator()}, ValueError, ["give columns, their number, or leave out"]),
    "group": ({"group": -100}, ValueError, ["scope='global', received scope='image': change scope, or"]),
    "group is a name": ({"scope": "global", "group": "workers"}, TypeError, ["ProcessGroup or None, received str"]),
    "sparse": ({"student": IMAGE.to_sparse()}, TypeError, ["student", "call .to_dense()"]),
    "packed": ({"teacher": IMAGE.to_mkldnn()}, TypeError, ["teacher", "call .to_dense()"]),
    "ragged": (
        {"student": torch.nested.nested_tensor([torch.ones(3, 4, 4)] * 2)},
        TypeError,
        ["student features are nested: ", "call .to_padded_tensor(0.0)"],
    ),
    "array": ({"student": np.ones((2, 3, 4, 4))}, TypeError, ["student", "(B, C, H, W)", "received ndarray"]),
    "no teacher": ({"teacher": None}, TypeError, ["teacher", "received NoneType"]),
    "integers": ({"student": IMAGE.long()}, TypeError, ["student", "torch.int64", "float32", ".float()"]),
    "complex": ({"teacher": IMAGE.to(torch.complex64)}, TypeError, ["teacher", "torch.complex64"]),
    "float8": ({"teacher": IMAGE.to(torch.float8_e4m3fn)}, TypeError, ["teacher", "torch.float8_e4m3fn"]),
    "tokens as nchw": (
        {"student": torch.ones(2, 16, 3), "teacher": torch.ones(2, 16, 5)},
        ValueError,
        ["(2, 16, 3)", "(2, 16, 5)", "differ in their pixels", "for tokens (B, N, C) use layout='nlc'"],
    ),
    "one with a batch": (
        {"student": torch.ones(3, 4, 4)},
        ValueError,
        ["(3, 4, 4)", "(2, 3, 4, 4)", "differ in the number of dimensions"],
    ),
    "tokens and a map": (
        {"student": torch.ones(2, 16, 3)},
        ValueError,
        ["(2, 16, 3)", "the student has tokens", "layout=('nlc', 'nchw')", "the teacher's map", ".flatten(2).mT"],
    ),
    "a map and tokens": (
        {"teacher": torch.ones(2, 16, 3), "layout": "nlc"},
        ValueError,
        ["(2, 16, 3)", "the teacher has tokens", "layout=('nchw', 'nlc')", "the student's map"],
    ),
    "a map (B, H, W, C) and tokens": (
        {"student": torch.ones(2, 4, 4, 3), "teacher": torch.ones(2, 16, 5), "layout": "nhwc"},
        ValueError,
        ["the teacher has tokens", "layout=('nhwc', 'nlc')", "the student's map", ".flatten(1, 2)"],
    ),
    "tokens and a flattened map": (
        {"student": torch.ones(2, 16, 3), "teacher": torch.ones(2, 5, 16), "layout": "nlc"},
        ValueError,
        ["differ in their tokens", "if one of them is (B, C, N), transpose it"],
    ),
    "layouts of two networks": (
        {"layout": ("nlc", "nchw")},
        ValueError,
        ["layout=('nlc', 'nchw')", "RelationDistiller takes a pair"],
    ),
    "vectors": (
        {"student": torch.ones(3, 4)},
        ValueError,
        ["student", "(3, 4)", "layout='nchw'", "(B, C, H, W) or (C, H, W)", "scope='batch'"],
    ),
    "several maps": ({"student": [IMAGE, IMAGE]}, TypeError, ["received list: add the losses of its tensors"]),
    "images as nlc": (
        {"layout": "nlc"},
        ValueError,
        ["student", "(2, 3, 4, 4)", "layout='nlc'", "(B, N, C)", "use layout='nchw' or 'nhwc'"],
    ),
    "channels last as nchw": (
        {"student": torch.ones(2, 16, 16, 32), "teacher": torch.ones(2, 16, 16, 96)},
        ValueError,
        ["(2, 16, 16, 32)", "(2, 16, 16, 96)", "for maps (B, H, W, C) use layout='nhwc'"],
    ),
    "one channels last": (
        {"student": torch.ones(2, 32, 16, 16), "teacher": torch.ones(2, 16, 16, 96)},
        ValueError,
        ["(2, 32, 16, 16)", "(2, 16, 16, 96)", "one of them looks like (B, H, W, C)", "the layouts of both networks"],
    ),
    "nchw as channels last": (
        {"student": torch.ones(2, 32, 8, 8), "teacher": torch.ones(2, 96, 8, 8), "layout": "nhwc"},
        ValueError,
        ["(2, 32, 8, 8)", "(2, 96, 8, 8)", "for maps (B, C, H, W) use layout='nchw'"],
    ),
    "tokens as channels last": (
        {"student": torch.ones(9, 5), "layout": "nhwc"},
        ValueError,
        ["student", "(9, 5)", "(B, H, W, C) or (H, W, C)"],
    ),
    "one image": ({"student": IMAGE[0, 0]}, ValueError, ["student", "(4, 4)", "(B, C, H, W)"]),
    "video": ({"teacher": IMAGE[..., None]}, ValueError, ["teacher", "(2, 3, 4, 4, 1)", "with .flatten(2, 3)"]),
    "no images": ({"student": IMAGE[:0], "teacher": IMAGE[:0]}, ValueError, ["student", "empty", "(0, 3, 4, 4)"]),
    "no channels": ({"teacher": IMAGE[:, :0]}, ValueError, ["teacher", "empty", "(2, 0, 4, 4)"]),
    "no pixels": ({"student": IMAGE[:, :, :0]}, ValueError, ["student", "empty"]),
    "batches differ": ({"teacher": IMAGE[:1]}, ValueError, ["(2, 3, 4, 4)", "(1, 3, 4, 4)", "the batch"]),
    "pixels differ": (
        {"teacher": IMAGE[..., :2]},
        ValueError,
        ["(2, 3, 4, 4)", "(2, 3, 4, 2)", "their pixels", "interpolate"],
    ),
    "pixels of single images": (
        {"student": torch.ones(3, 4, 4), "teacher": torch.ones(5, 4, 2)},
        ValueError,
        ["(3, 4, 4)", "(5, 4, 2)", "their pixels"],
    ),
    "as many pixels, otherwise": ({"teacher": IMAGE.reshape(2, 3, 2, 8)}, ValueError, ["their pixels"]),
    "tokens differ": (
        {"student": torch.ones(2, 5, 3), "teacher": torch.ones(2, 6, 3), "layout": "nlc"},
        ValueError,
        ["(2, 5, 3)", "(2, 6, 3)", "their tokens", "class tokens with features[:, 1:]", "if both are (B, C, N)"],
    ),
    "devices": ({"teacher": IMAGE.to("meta")}, ValueError, ["cpu", "meta", "one device"]),
    "teacher's gradient": ({"teacher": IMAGE.clone().requires_grad_()}, ValueError, ["torch.no_grad()", ".detach()"]),
}


@pytest.mark.parametrize(("given", "kind", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_input_is_refused(given: dict, kind: type[Exception], parts: list[str]) -> None:
    """Errors say what was received, what was expected and what to do."""
    arguments = {"student": IMAGE, "teacher": IMAGE, **given}
    with pytest.raises(kind) as caught:
        relation_loss(**arguments)
    for part in parts:
        assert part in str(caught.value)
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(kind) as again:
        SRPLoss(**arguments)(student, teacher)
    assert str(again.value) == str(caught.value)


def test_eps_of_zero_is_allowed() -> None:
    student, teacher = pair()
    student.data[:, :, 0, 0] = 0
    relation_loss(student, teacher, eps=0, **ROW_L1).backward()
    assert student.grad.isfinite().all()
