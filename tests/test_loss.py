"""``relation_loss`` and ``SRPLoss`` against plain loops over the definition, and their errors."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import reference_loops as loops
import torch
from helpers import cases, distances, error, features, few_cases, options, rounding, widest
from torch import Tensor

from srpkd import SRPLoss, relation_loss
from srpkd.kernels import BACKENDS, Relation, dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_BACKENDS = list(BACKENDS)
ROW_L1 = {"normalize": "row", "distance": "l1"}


def pair(batch: int = 2, height: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student (B, 5, H, W), which requires a gradient, and teacher (B, 7, H, W)."""
    student, teacher = (torch.randn(batch, channels, height, width, dtype=dtype) for channels in (5, 7))
    return student.requires_grad_(), teacher


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_norm", [(), (2,), (0, 4)], ids=["none", "one pixel", "two pixels"])
@pytest.mark.parametrize(("backend", "relation"), cases(ALL_BACKENDS))
def test_loops(backend: str, relation: Relation, zero_norm: tuple[int, ...], device: torch.device) -> None:
    """Value and gradient of plain loops over NumPy arrays, zero-norm pixels of student and teacher included."""
    student, teacher = features(relation, batch=1, pixels=5, channels=(3, 2), apart=1e-2)
    # a pixel of norm 0 in both is a tie: there a central difference of |d| is 0, as sign(0) is
    student[:, zero_norm, :], teacher[:, zero_norm[:1], :] = 0, 0
    s, t = student[0].numpy(), teacher[0].numpy()
    expected = {"normalize": relation.normalize, "distance": relation.distance, "delta": relation.delta}

    dtype = widest(backend)
    student, teacher = student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)
    loss = relation_loss(student, teacher, layout="nlc", backend=backend, **options(relation))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(loops.loss(s, t, **expected), rel=rounding(dtype))
    tolerance = 1e-7 + rounding(dtype)
    np.testing.assert_allclose(gradient[0].cpu(), loops.gradient(s, t, **expected), rtol=10 * tolerance, atol=tolerance)


def test_loops_by_hand() -> None:
    """The loops themselves, on two pixels with known relations."""
    student, teacher = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])
    assert loops.relation_matrix(student, "row", [False, True]) == [[1, 0], [0, 0]]
    assert loops.relation_matrix(teacher, "none", [False, False]) == [[1, 0], [0, 4]]
    assert loops.loss(student, teacher, "row", "l1") == 1 / 4
    assert loops.loss(student, teacher, "cosine", "l1") == 0
    assert loops.loss(student, teacher, "none", "l2") == (24**2 + 4**2) / 4
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


@pytest.mark.parametrize(("backend", "relation"), few_cases(ALL_BACKENDS))
def test_reductions(backend: str, relation: Relation) -> None:
    if (reason := dispatch.unavailable_reason(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
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


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "l1" in distances(name)])
def test_teacher_in_inference_mode(backend: str) -> None:
    if (reason := dispatch.unavailable_reason(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
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


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_features_without_a_batch_are_a_batch_of_one(layout: str, scope: str) -> None:
    student, teacher = pair(batch=1)
    student = student.detach()
    if layout == "nlc":
        student, teacher = student.flatten(2).mT, teacher.flatten(2).mT
    single = student[0].clone().requires_grad_()
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = {"layout": layout, "scope": scope, "reduction": reduction}
        loss, expected = relation_loss(single, teacher[0], **options), relation_loss(student, teacher, **options)
        assert loss.shape == () and torch.equal(loss, expected.squeeze())
    assert torch.equal(torch.autograd.grad(loss, single)[0], torch.autograd.grad(expected, student)[0][0])


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
    for changed in ({"normalize": "row"}, {"distance": "l1"}, {"delta": 0.01}, {"reduction": "sum"}, {"eps": 1e3}):
        other = SRPLoss(**{"distance": "huber", "delta": 0.1, **changed})
        assert not torch.equal(base(student, teacher), other(student, teacher)), changed


# --- errors ---------------------------------------------------------------------------------------------------------

IMAGE = torch.ones(2, 3, 4, 4)
REFUSED = {
    "normalize": ({"normalize": "rows"}, ValueError, ["normalize='rows'", "'row', 'cosine', 'none'", "mean 'row'?"]),
    "distance": ({"distance": "L1"}, ValueError, ["distance='L1'", "'l1', 'l2', 'huber'", "did you mean 'l"]),
    "far from all": ({"distance": "wasserstein"}, ValueError, ["'wasserstein'", "'huber'"]),
    "reduction": ({"reduction": "means"}, ValueError, ["reduction='means'", "did you mean 'mean'?"]),
    "layout": ({"layout": "NCHW"}, ValueError, ["layout='NCHW'", "'nchw', 'nlc'"]),
    "not a word": ({"normalize": None}, ValueError, ["normalize=None", "'none'"]),
    "backend": ({"backend": "blockd"}, ValueError, ["backend='blockd'", "'auto'", "did you mean 'blocked'?"]),
    "delta 0": ({"delta": 0.0}, ValueError, ["delta=0.0", "above 0"]),
    "delta infinite": ({"delta": float("inf")}, ValueError, ["delta=inf", "finite"]),
    "delta below 0": ({"delta": -1}, ValueError, ["delta=-1"]),
    "delta nan": ({"delta": math.nan}, ValueError, ["delta=nan"]),
    "eps below 0": ({"eps": -1e-9}, ValueError, ["eps=-1e-09", "at least 0"]),
    "eps nan": ({"eps": math.nan}, ValueError, ["eps=nan"]),
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
        ["(3, 4, 4)", "(2, 3, 4, 4)", "differ in the batch"],
    ),
    "vectors": (
        {"student": torch.ones(3, 4)},
        ValueError,
        ["student", "(3, 4)", "layout='nchw'", "(B, C, H, W) or (C, H, W)"],
    ),
    "images as nlc": (
        {"layout": "nlc"},
        ValueError,
        ["student", "(2, 3, 4, 4)", "layout='nlc'", "(B, N, C)", "use layout='nchw'"],
    ),
    "one image": ({"student": IMAGE[0, 0]}, ValueError, ["student", "(4, 4)", "(B, C, H, W)"]),
    "video": ({"teacher": IMAGE[..., None]}, ValueError, ["teacher", "(2, 3, 4, 4, 1)"]),
    "no images": ({"student": IMAGE[:0], "teacher": IMAGE[:0]}, ValueError, ["student", "empty", "(0, 3, 4, 4)"]),
    "no channels": ({"teacher": IMAGE[:, :0]}, ValueError, ["teacher", "empty", "(2, 0, 4, 4)"]),
    "no pixels": ({"student": IMAGE[:, :, :0]}, ValueError, ["student", "empty"]),
    "batches differ": ({"teacher": IMAGE[:1]}, ValueError, ["(2, 3, 4, 4)", "(1, 3, 4, 4)", "the batch"]),
    "pixels differ": (
        {"teacher": IMAGE[..., :2]},
        ValueError,
        ["(2, 3, 4, 4)", "(2, 3, 4, 2)", "their pixels", "interpolate"],
    ),
    "as many pixels, otherwise": ({"teacher": IMAGE.reshape(2, 3, 2, 8)}, ValueError, ["their pixels"]),
    "tokens differ": (
        {"student": torch.ones(2, 5, 3), "teacher": torch.ones(2, 6, 3), "layout": "nlc"},
        ValueError,
        ["(2, 5, 3)", "(2, 6, 3)", "their pixels"],
    ),
    "devices": ({"teacher": IMAGE.to("meta")}, ValueError, ["cpu", "meta", "one device"]),
    "teacher's gradient": ({"teacher": IMAGE.clone().requires_grad_()}, ValueError, ["torch.no_grad()", ".detach()"]),
}


@pytest.mark.parametrize(("given", "kind", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_input_is_refused(given: dict, kind: type[Exception], parts: list[str]) -> None:
    """Errors say what was received, what was expected and what to do."""
    with pytest.raises(kind) as caught:
        relation_loss(**{"student": IMAGE, "teacher": IMAGE, **given})
    for part in parts:
        assert part in str(caught.value)
    wrong = {name: value for name, value in given.items() if name not in ("student", "teacher")}
    if wrong and len(wrong) == len(given) and "nlc" not in wrong.values():  # SRPLoss refuses options before features
        with pytest.raises(kind) as again:
            SRPLoss(**wrong)
        assert str(again.value) == str(caught.value)


def test_eps_of_zero_is_allowed() -> None:
    student, teacher = pair()
    student.data[:, :, 0, 0] = 0
    relation_loss(student, teacher, eps=0, **ROW_L1).backward()
    assert student.grad.isfinite().all()
