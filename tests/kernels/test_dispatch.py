"""The choice of the backend: the registry, ``auto``, SRPKD_BACKEND; and the imports of the package."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FAST, assert_equal_to_reference, cases, features, options

from srpkd import SRPLoss, relation_loss
from srpkd.kernels import (
    BACKENDS,
    DISTANCES,
    NORMALIZATIONS,
    BackendUnavailable,
    Relation,
    auto_backend,
    blocked,
    cpu_info,
    dispatch,
    native,
    op,
    requested_backend,
    unavailable_reason,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RESTRICTED = [
    (name, distance)
    for name in FAST
    for distance in DISTANCES
    if distance not in getattr(dispatch.backend_module(name), "DISTANCES", DISTANCES)
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran, in order."""
    names = []
    for name in FAST:
        module = dispatch.backend_module(name)
        function = "relation_loss" if name == "native" else "relation_tiles"
        original = getattr(module, function)

        def spy(*arguments, name=name, original=original):
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, function, spy)
    return names


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_keeps_the_contract(name: str) -> None:
    module = dispatch.backend_module(name)
    assert BACKENDS[name] and module.__doc__
    for device in (CPU, torch.device("cuda"), torch.device("mps")):
        reason = unavailable_reason(name, device)
        assert reason is None or (isinstance(reason, str) and reason)
    assert set(getattr(module, "DISTANCES", DISTANCES)) <= set(DISTANCES)
    if name != "reference":
        for function in ("relation_tiles", "loss_and_gradient"):
            parameters = list(inspect.signature(getattr(module, function)).parameters)
            expected = list(inspect.signature(getattr(blocked, function)).parameters)
            assert parameters[: len(expected)] == expected  # loss_and_gradient may take a reduction, see REDUCES


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_the_named_backend_runs(name: str, taken: list[str]) -> None:
    if (reason := unavailable_reason(name, CPU)) is not None:
        pytest.skip(reason)
    relation_loss(*features(dtype=torch.float32), layout="nlc", distance="l2", backend=name)
    assert taken == [name]


@pytest.mark.parametrize("backend", FAST)
def test_a_named_backend_that_cannot_run_raises(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.backend_module(backend), "unavailable_reason", lambda device: "no such chip; buy one")
    pair = features(dtype=torch.float32)
    with pytest.raises(BackendUnavailable, match=rf"backend='{backend}' cannot run on cpu: no such chip; buy one"):
        relation_loss(*pair, layout="nlc", distance="l2", backend=backend)
    monkeypatch.setenv("SRPKD_BACKEND", backend)
    with pytest.raises(BackendUnavailable, match="no such chip"):
        relation_loss(*pair, layout="nlc", distance="l2")


@pytest.mark.parametrize(("backend", "distance"), RESTRICTED)
def test_a_distance_that_a_backend_does_not_support(
    backend: str, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch.backend_module(backend), "unavailable_reason", lambda device: None)
    with pytest.raises(ValueError, match=rf"backend='{backend}' supports .*received '{distance}': use backend='auto'"):
        relation_loss(*features(dtype=torch.float32), layout="nlc", distance=distance, backend=backend)


def test_a_dtype_that_a_backend_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "DTYPES", (torch.float32, torch.bfloat16), raising=False)
    message = "backend='blocked' supports features in float32, bfloat16, received float64: use backend='auto'"
    with pytest.raises(ValueError, match=message):
        relation_loss(*features(dtype=torch.float64), layout="nlc", backend="blocked")


# --- auto -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "relation"), cases(["blocked"]))
def test_auto_never_fails(backend: str, relation: Relation, monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    """Without any accelerated backend, PyTorch computes the values."""
    pair = features(relation)
    assert_equal_to_reference(*pair, relation, "auto")
    for name in FAST:
        if name != backend:
            monkeypatch.setattr(dispatch.backend_module(name), "unavailable_reason", lambda device: "missing")
    dispatch.cached_auto_backend.cache_clear()
    taken.clear()
    assert_equal_to_reference(*pair, relation, "auto")
    assert taken == [backend]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_auto_takes_what_can_run(normalize: str, distance: str, dtype: torch.dtype, taken: list[str]) -> None:
    relation = Relation(normalize, distance)
    for pixels in (1, 40):
        student, teacher = features(pixels=pixels, dtype=dtype)
        loss = relation_loss(student.requires_grad_(), teacher, layout="nlc", **options(relation))
        loss.backward()
        assert loss.isfinite()
    assert len(taken) == 2
    assert all(unavailable_reason(name, CPU) is None for name in taken)


FAMILY = "vendor_id\t: {}\ncpu family\t: {}\nmodel name\t: EPYC\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FAMILY.format("AuthenticAMD", 25), False),
        (FAMILY.format("AuthenticAMD", 26), True),
        (FAMILY.format("GenuineIntel", 26), False),
        ("vendor_id\t: AuthenticAMD\n", False),
        (None, False),
    ],
)
def test_processors_of_amd(text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_info, "PATH", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert dispatch.is_zen5.__wrapped__() is expected


@pytest.mark.parametrize(("instructions", "zen5"), [("AVX512", True), ("AVX512", False), ("AVX2", True)])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_auto_prefers_the_closed_form_for_l2_of_many_pixels(
    normalize: str, instructions: str, zen5: bool, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(dispatch, "is_zen5", lambda: zen5)
    monkeypatch.setattr(dispatch, "cached_auto_backend", auto_backend)
    least, per_channel = dispatch.CLOSED_FORM_FROM["zen5" if zen5 and instructions == "AVX512" else "cpu"][normalize]
    assert dispatch.closed_form_pixels(CPU, normalize, (64, 2048)) == 2112 * per_channel
    for pixels in (least, least - 1):
        student, teacher = (torch.randn(1, pixels, channels) for channels in (3, 5))
        relation_loss(student, teacher, layout="nlc", normalize=normalize, distance="l2")
    assert taken[0] == "closed_form" != taken[1]
    assert auto_backend(CPU, Relation(normalize, "l2"), pixels=16_384) == "closed_form"
    assert auto_backend(CPU, Relation(normalize, "l2", rectify=True), pixels=16_384) != "closed_form"
    fastest = "blocked" if native.load_existing()[0] is None else "native"
    assert auto_backend(CPU, Relation(normalize, "l1")) == fastest


# --- SRPKD_BACKEND --------------------------------------------------------------------------------------------------


def test_the_environment_variable_decides_for_auto(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    loss_fn = SRPLoss(distance="l2", layout="nlc")  # made before the variable is set
    monkeypatch.setenv("SRPKD_BACKEND", "blocked")
    loss_fn(*features())
    assert taken == ["blocked"]
    assert requested_backend("auto") == "blocked"


def test_the_argument_overrides_the_environment_variable(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    for setting in ("blocked", "reference", "nonsense"):
        monkeypatch.setenv("SRPKD_BACKEND", setting)
        relation_loss(*features(), distance="l2", layout="nlc", backend="closed_form")
    assert taken == ["closed_form"] * 3


@pytest.mark.parametrize("setting", ["", "auto"])
def test_an_empty_environment_variable_is_ignored(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPKD_BACKEND", setting)
    assert requested_backend("auto") == "auto"


def test_the_environment_variable_may_name_the_reference(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    monkeypatch.setenv("SRPKD_BACKEND", "reference")
    monkeypatch.setattr(op, "compute_loss", lambda *_: pytest.fail("the reference needs no operator"))
    relation_loss(*features(), layout="nlc")
    assert not taken


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPKD_BACKEND", "closed-form")
    for call in (lambda: relation_loss(*features(), layout="nlc"), SRPLoss):
        with pytest.raises(ValueError, match=r"variable SRPKD_BACKEND='closed-form' .* did you mean 'closed_form'\?"):
            call()


# --- imports --------------------------------------------------------------------------------------------------------


def test_needs_no_extras() -> None:
    """The package imports no optional package and no backend, and runs without them."""
    code = """
import sys
import torch
before = set(sys.modules)
import srpkd, srpkd.kernels
from srpkd.info import describe
assert "srpkd.kernels.closed_form" not in sys.modules, "a backend is imported when first asked for"
extras = {"triton", "torchvision", "ninja", "pybind11", "PIL", "matplotlib", "jinja2", "jsonargparse", "yaml", "tqdm"}
brought = set(sys.modules) - before
heavy = (*extras, "onnx", "pandas", "torchmetrics", "torch._inductor")
assert not [name for name in brought if name.startswith(heavy)], brought
for name in extras:
    sys.modules[name] = None  # importing it fails from here on
student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
for distance in ("l1", "l2", "huber"):
    srpkd.SRPLoss(distance=distance)(student, teacher).backward()
assert torch.isfinite(student.grad).all()
print(describe())
"""
    environment = {name: value for name, value in os.environ.items() if name != "SRPKD_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in BACKENDS)
