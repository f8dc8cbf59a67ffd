"""Devices without kernels, without float64 and with other architectures than those of the build."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srpkd import relation_loss
from srpkd.kernels import (
    BACKENDS,
    DISTANCES,
    NORMALIZATIONS,
    Relation,
    auto_backend,
    build,
    closed_form,
    dispatch,
    formulas,
    native,
    reference,
    sampling,
    unavailable_reason,
)

CPU = torch.device("cpu")
META = torch.device("meta")  # stands for a device that this machine does not have
GPU = torch.device("cuda", 0)


class NoFloat64(TorchDispatchMode):
    """Raise an error if an operator returns a tensor in float64 on the device "meta"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META and tensor.dtype == torch.float64:
                raise TypeError(f"{func} returned float64")
        return result


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    for module in (formulas, sampling):
        monkeypatch.setattr(module, "has_float64", lambda device: device.type == "cpu")
    return NoFloat64()


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_nothing_is_computed_in_float64(
    normalize: Any, distance: Any, precision: str, no_float64: NoFloat64, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "matmul_precision", lambda on_cpu=False: precision)
    for dtype, rectify, need_grad in itertools.product((torch.float32, torch.float16), (False, True), (False, True)):
        relation = Relation(normalize, distance, rectify=rectify)
        student, teacher = (torch.empty(2, 600, channels, dtype=dtype, device=META) for channels in (8, 16))
        with no_float64:
            columns = sampling.draw_columns(2, 600, 32, META)
            for index in (None, columns):
                loss, gradient = dispatch.compute_loss(student, teacher, relation, "auto", need_grad, index)
                assert loss.shape == (2,) and (gradient is not None) == need_grad
            loss = reference.relation_loss(student.requires_grad_(need_grad), teacher, relation)
            if need_grad:
                loss.sum().backward()
    assert sampling.exact_backend("auto", Relation(), META, 10_000, (8, 8), 100) is None


def test_float64_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    assert formulas.has_float64(torch.device("cpu")) and formulas.has_float64(GPU)
    assert not formulas.has_float64(torch.device("mps"))
    arc = torch.device("xpu", 0)
    for lacking in (True, False):

        def ones(*size: int, dtype: torch.dtype, device: torch.device, lacking: bool = lacking) -> torch.Tensor:
            assert device == arc and dtype == torch.float64
            if lacking:
                raise RuntimeError("Required aspect fp64 is not supported on the device")
            return torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=dtype)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "ones", ones)
            formulas._multiplies_float64.cache_clear()
            assert formulas.has_float64(arc) != lacking
            assert (unavailable_reason("closed_form", arc) is not None) == lacking
            assert auto_backend(arc, Relation("cosine", "l2")) == ("blocked" if lacking else "closed_form")


@pytest.mark.parametrize("name", [name for name in BACKENDS if unavailable_reason(name, CPU) is None])
def test_default_device_and_dtype_do_not_matter(name: str) -> None:
    """Tensors are made on the device of the features, whatever torch.set_default_device and _dtype say."""
    student, teacher = (torch.randn(1, 40, channels) for channels in (5, 7))
    options: dict[str, Any] = {"backend": name, "layout": "nlc", "distance": "l2" if name == "closed_form" else "l1"}
    columns = [None, 8] if name in dispatch.partial_backends(CPU) else [None]

    def results() -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for count in columns:
            own = student.clone().requires_grad_()
            generator = None if count is None else torch.Generator("cpu").manual_seed(0)
            loss = relation_loss(own, teacher, columns=count, generator=generator, **options)
            found += [loss.detach(), *torch.autograd.grad(loss, own)]
        if len(columns) > 1:
            pixels = formulas.Pixels(student, teacher, None, None)
            found += dispatch.backend_module(name).remote_tiles(pixels, pixels, Relation("none", "l1"), True)
        return found

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        with META:
            found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_maps_are_not_computed_in_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4: the closed form in PyTorch computes C x C matrices, more than the pairs of few pixels."""
    monkeypatch.setattr(closed_form, "implementation", lambda *_: "pytorch")
    for name in ("triton", "native"):
        monkeypatch.setattr(dispatch.backend_module(name), "unavailable_reason", lambda device: "no kernels")
    monkeypatch.setattr(native, "is_built", lambda device: False)
    for normalize in NORMALIZATIONS:
        enough = dispatch.closed_form_pixels(GPU, normalize, (64, 256))
        l2 = Relation(normalize, "l2")
        assert auto_backend(GPU, l2, dtype, enough) == "closed_form"
        assert auto_backend(GPU, l2, dtype, enough - 1) == "blocked"


@pytest.mark.parametrize("device", ["mps", "xpu", "cuda"])
def test_the_device_is_the_reason_and_not_the_build(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler helps where there is no NVIDIA GPU."""
    monkeypatch.setattr(native, "load_existing", lambda: (None, None))
    monkeypatch.setattr(native.build, "unavailable_reason", lambda: "no C++ compiler (c++) found")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA GPUs" in str(unavailable_reason("native", torch.device(device)))
    assert "C++ compiler" in str(unavailable_reason("native", torch.device("cpu")))


RUNS = {  # by the architectures of a build: capabilities that run it, of those below
    "8.0+PTX;9.0a": {(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)},
    "8.0": {(8, 0), (8, 6), (8, 9)},
    "8.6": {(8, 6), (8, 9)},
    "8.7": {(8, 7)},
    "8.9+PTX": {(8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)},
    "9.0a": {(9, 0)},
    "9.0a+PTX": {(9, 0)},
    "10.0": {(10, 0), (10, 3)},
    "10.0a": {(10, 0)},
    "10.0f": {(10, 0), (10, 3)},
    "12.0": {(12, 0), (12, 1)},
    "": set(),
}


@pytest.mark.parametrize("architectures", RUNS)
def test_code_for_a_gpu(architectures: str) -> None:
    capabilities = RUNS["8.0+PTX;9.0a"] | {(7, 0), (7, 5)}
    assert {c for c in capabilities if build.has_code_for(architectures, c)} == RUNS[architectures]


@pytest.mark.parametrize(
    ("setting", "of_gpus", "of_cpus", "expected", "on_cpu"),
    [
        ("highest", None, None, "highest", "highest"),
        ("high", None, None, "high", "high"),
        ("medium", None, None, "medium", "medium"),
        ("highest", "tf32", None, "high", "highest"),
        ("medium", "ieee", None, "highest", "medium"),
        ("highest", None, "bf16", "highest", "medium"),
        ("high", None, "ieee", "high", "highest"),
    ],
)
def test_matmul_precision(
    setting: str,
    of_gpus: str | None,
    of_cpus: str | None,
    expected: str,
    on_cpu: str,
    set_precision: Callable[[str], None],
) -> None:
    set_precision(setting)
    if of_gpus:
        torch.backends.cuda.matmul.fp32_precision = of_gpus
    if of_cpus:
        torch.backends.mkldnn.matmul.fp32_precision = of_cpus
    assert (formulas.matmul_precision(), formulas.matmul_precision(on_cpu=True)) == (expected, on_cpu)
