"""Which kernels the backend ``closed_form`` uses on a GPU. The kernels' own tests are in triton/ and in csrc/."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_to_reference, features
from torch import Tensor

from srpkd.kernels import NORMALIZATIONS, Relation, build, closed_form, formulas, native, triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COSINE = Relation("cosine", "l2")


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU on which the kernels of csrc/cuda and those of Triton can run."""
    monkeypatch.setattr(native, "is_built", lambda device: True)
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: None)
    return monkeypatch


@pytest.mark.parametrize("normalize", ["row", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu(both: pytest.MonkeyPatch, dtype: torch.dtype, normalize: str) -> None:
    relation = Relation(normalize, "l2")
    assert closed_form.implementation(GPU, dtype, relation) == "native"
    both.setattr(native, "is_built", lambda device: False)
    assert closed_form.implementation(GPU, dtype, relation) == "triton"
    both.setattr(triton, "unavailable_reason", lambda device: "not installed")
    assert closed_form.implementation(GPU, dtype, relation) == "pytorch"


def test_pytorch_for_what_the_kernels_do_not_support(both: pytest.MonkeyPatch) -> None:
    assert closed_form.implementation(GPU, torch.float64, COSINE) == "pytorch"
    assert closed_form.implementation(CPU, torch.float32, COSINE) == "pytorch"
    assert closed_form.implementation(GPU, torch.float32, Relation("cosine", "l2", detach_norms=True)) == "native"
    assert closed_form.implementation(GPU, torch.float32, Relation("row", "l2", detach_norms=True)) == "pytorch"


@pytest.mark.parametrize("kernels", ["native", "triton"])
def test_the_kernels_are_called(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpkd.kernels.triton import closed_form as triton_closed_form

    called = []

    def record(student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, **options: str) -> tuple:
        called.append((student, teacher, relation, need_grad, options))
        return "loss", "gradient"

    monkeypatch.setattr(closed_form, "implementation", lambda device, dtype, relation: kernels)
    monkeypatch.setattr(native if kernels == "native" else triton_closed_form, "loss_and_gradient", record)
    student, teacher = torch.rand(1, 4, 2), torch.rand(1, 4, 3)
    assert closed_form.loss_and_gradient(student, teacher, COSINE, True) == ("loss", "gradient")
    options = {"method": "closed_form"} if kernels == "native" else {}
    assert called == [(student, teacher, COSINE, True, options)]


@pytest.mark.parametrize("channels", [(5, 7), (3, 150), (200, 130)], ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.usefixtures("one_thread")
def test_an_image_in_parts(normalize: str, channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, of more pixels than its caches hold: here 64 at a time."""
    monkeypatch.setattr(formulas, "PART_ELEMENTS", 1)
    relation = Relation(normalize, "l2")
    student, teacher = features(relation, pixels=250, channels=channels)
    student[0, 3] = teacher[1, 240] = 0
    assert len(formulas.parts_of(student, teacher)) == 4
    for backend in ("closed_form", "blocked"):
        assert_equal_to_reference(student, teacher, relation, backend)


@pytest.mark.skipif(build.unavailable_reason() is not None, reason="the extension cannot be built")
@pytest.mark.skipif(not native.is_built(CPU), reason="the extension is not built")
def test_the_extension_has_no_closed_form_on_the_cpu() -> None:
    """There, PyTorch's float64 products are as fast."""
    student, teacher = torch.rand(1, 4, 2), torch.rand(1, 4, 3)
    with pytest.raises(NotImplementedError, match="closed_form"):
        native.loss_and_gradient(student, teacher, COSINE, True, method="closed_form")
