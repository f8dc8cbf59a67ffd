"""Plans of launches: scratch memory, and direct launches of compiled kernels on a driver that only records them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from srpkd.kernels import Relation, dispatch, op, triton
from srpkd.kernels.triton import closed_form, plans
from srpkd.kernels.triton.plans import ALIGNMENT, Plan

package = pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

ROW_L1 = Relation("row", "l1")
KERNELS = ["moment", "terms", "scale", "relation", "weighted_moment", "gradient"]


# --- scratch memory ---------------------------------------------------------------------------------------------------


def test_scratch_arrays_do_not_overlap() -> None:
    plan = Plan(torch.device("cpu"))
    arrays = [plan.scratch(3, 5), plan.scratch(7, dtype=torch.bfloat16), plan.scratch(100)]
    for one, other in pairwise(arrays):
        assert one.offset + one.bytes <= other.offset
        assert other.offset % ALIGNMENT == 0
    assert arrays[-1].offset + arrays[-1].bytes <= plan.scratch_bytes


def test_freed_scratch_memory_is_used_again() -> None:
    plan = Plan(torch.device("cpu"))
    first, second, third = (plan.scratch(64) for _ in range(3))
    plan.free(second)
    assert plan.scratch(1000).offset > third.offset  # too large for the gap
    assert plan.scratch(32).offset == second.offset
    assert plan.scratch(32).offset == second.offset + ALIGNMENT
    plan.free(first)
    assert plan.scratch(64).offset == first.offset


# --- launches ---------------------------------------------------------------------------------------------------------


class _Driver:
    """A driver of triton for an H100 that is not there: it records launches."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.metadata: list = []
        self.stream = 5
        self.utils = SimpleNamespace(
            load_binary=lambda name, *arguments: (1, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self):
        return package.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_device_interface(self):
        return torch.cuda

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            assert len(arguments) == len(source.fn.arg_names)
            values = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
            self.metadata.append(launch_metadata)
            self.launched.append((function, (x, y, z), stream, values))

        return launch


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[_Driver]:
    """Replace triton's driver, and forget plans and compiled kernels before and after the test."""
    fake, active = _Driver(), package.runtime.driver
    kernels = [getattr(module, name) for module in _modules() for name in vars(module) if name.endswith("_kernel")]
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(active, "_active", fake)
    yield fake
    plans._plans.clear()
    for kernel in kernels:
        kernel.device_caches.clear()
    gc.collect()  # kernels unload themselves, by the driver


def _modules() -> list:
    from srpkd.kernels.triton import backward, gradient, moments, scales, tiles

    of_closed_form = [getattr(closed_form, name) for name in ("moments", "sums", "row", "gradient")]
    return [moments, scales, tiles, gradient, backward, *of_closed_form]


def features(pixels: int = 256, channels: tuple[int, int] = (64, 256)) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(1, count, pixels, dtype=torch.bfloat16).mT for count in channels)
    return student, teacher


@pytest.mark.slow
def test_compiled_kernels_are_launched_directly(driver, monkeypatch, capsys) -> None:
    """The second call does not pass through triton.jit, and launches the same kernels with the same arguments."""
    monkeypatch.setattr(plans, "PATIENCE", 0.01)
    monkeypatch.setattr(plans, "_told", iter(range(2)))
    # both calls get the same memory
    empty, kept = torch.Tensor.new_empty, {}
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *shape, dtype: kept.setdefault((shape, dtype), empty(self, *shape, dtype=dtype)),
    )
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype: kept.setdefault("gradient", like(x, dtype=dtype)))
    student, teacher = features()
    triton.loss_and_gradient(student, teacher, ROW_L1, True)
    first, driver.launched = driver.launched, []
    assert [name for name, *_ in first] == [f"{name}_kernel" for name in KERNELS]
    assert "compiling Triton kernels" in capsys.readouterr().err

    def unexpected(*arguments: object, **options: object) -> None:
        raise AssertionError("triton.jit was called")

    monkeypatch.setattr(package.runtime.jit.JITFunction, "run", unexpected)
    driver.stream = 7
    triton.loss_and_gradient(student, teacher, ROW_L1, True)
    assert len(plans._plans) == 1
    for (name, grid, stream, values), (again, again_grid, again_stream, again_values) in zip(
        first, driver.launched, strict=True
    ):
        assert (name, grid) == (again, again_grid)
        assert (stream, again_stream) == (5, 7)
        assert values == again_values


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.core(0)
def test_launches_of_a_training_step(driver, reduction, monkeypatch) -> None:
    """Backward is one launch, with the weight of the mean in it."""
    monkeypatch.setattr(op, "_gpu_kernels", lambda device: triton)
    monkeypatch.setattr(dispatch, "check_supported", lambda *_: None)
    student, teacher = (x.expand(4, -1, -1).contiguous() for x in features())
    student.requires_grad_()
    for _ in range(2):
        driver.launched = []
        loss = op.python_relation_loss(student, teacher, ROW_L1, "triton", reduction)
        torch.autograd.grad(loss, student, torch.ones_like(loss))
        assert [name for name, *_ in driver.launched] == [f"{name}_kernel" for name in (*KERNELS, "backward")]
    _, grid, _, (*_, elements, blocks, _, weight, block) = driver.launched[-1]
    factors, mean_weight = (1, 0.25) if reduction == "mean" else (4, 1.0)
    assert grid == (student.numel() // block, 1, 1)
    assert (elements, blocks, weight) == (student.numel() // factors, grid[0] // factors, mean_weight)


@pytest.mark.slow
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("channels", [(64, 256), (64, 64)], ids=str)
@pytest.mark.core(1)
def test_the_closed_form_of_row_is_compiled_and_launched(driver, channels, need_grad) -> None:
    """The second stage uses the kernels of the first, specialised in another way."""
    for _ in range(2):
        driver.launched = []
        closed_form.loss_and_gradient(*features(128, channels), Relation("row", "l2"), need_grad)
    stage = ["moments_kernel", "finish_kernel"]
    second = stage if need_grad or channels == (64, 64) else []
    last = "closed_form_gradient_kernel" if need_grad else "loss_kernel"
    names = [name for name, *_ in driver.launched]
    assert names == ["gains_kernel", *stage, "row_scales_kernel", *second, last]


@pytest.mark.slow
@pytest.mark.core(0)
def test_features_of_another_alignment_are_specialised_again(driver) -> None:
    """A pointer that is not a multiple of 16 must not reach a kernel that was compiled for one that is."""
    student, teacher = features()
    shifted = torch.empty(student.numel() + 1, dtype=student.dtype)[1:].as_strided(student.shape, student.stride())
    relation = Relation("none", "l1")
    for each in (student, shifted, student, shifted):
        triton.loss_and_gradient(each, teacher, relation, True)
    (plan,) = plans._plans.values()
    assert len(plan._prepared) == 2
    assert len(driver.launched) == 8
    compiled = [prepared[0].run for prepared in plan._prepared.values()]
    assert compiled[0] is not compiled[1]


@pytest.mark.slow
@pytest.mark.core(0)
def test_another_batch_needs_no_other_kernel(driver) -> None:
    """Nor do other numbers of splits, which follow from it."""
    student, teacher = features()
    for batch in (4, 5, 16, 40):  # all so large that they use the larger tiles
        triton.loss_and_gradient(student.expand(batch, -1, -1), teacher.expand(batch, -1, -1), ROW_L1, True)
    splits = {
        dict(zip(launch.kernel.arg_names, launch.arguments)).get("splits")
        for plan in plans._plans.values()
        for launch in plan.launches
    }
    assert {1, 2} <= splits
    compiled = {prepared.run for plan in plans._plans.values() for (prepared, *_) in zip(*plan._prepared.values())}
    assert len(compiled) == len(set(KERNELS))


@pytest.mark.slow
def test_launch_hooks_are_called(driver) -> None:
    """A profiler hears of every launch, of the first call and the later ones."""
    heard = []
    hooks = package.knobs.runtime.launch_enter_hook
    hooks.add(heard.append)
    try:
        for calls in (1, 2):
            triton.loss_and_gradient(*features(), Relation("none", "l1"), True)
            assert len(driver.launched) == 2 * calls
            assert len(driver.metadata) == 2 * calls
            assert all(metadata is not None for metadata in driver.metadata)
    finally:
        hooks.remove(heard.append)
    triton.loss_and_gradient(*features(), Relation("none", "l1"), True)
    assert driver.metadata[-2:] == [None, None]


@pytest.mark.slow
def test_another_triton_is_used_through_its_public_interface(driver, monkeypatch) -> None:
    """If compiled kernels are not what they are today, every call passes through triton.jit."""
    monkeypatch.setattr(plans, "hasattr", lambda value, name: name == "result" and hasattr(value, name), raising=False)
    for _ in range(2):
        triton.loss_and_gradient(*features(), Relation("none", "l1"), True)
    (plan,) = plans._plans.values()
    assert not any(plan._prepared.values())
    assert len(driver.launched) == 4


def test_plans_depend_on_what_they_contain(monkeypatch, set_precision) -> None:
    """Another shape, stride, relation or matmul precision has a plan of its own."""
    runs = []
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(
        Plan, "run", lambda self, *tensors: runs.append(self) or (torch.empty(1 << 20, dtype=torch.uint8),)
    )
    student, teacher = (x.float() for x in features(64))
    for _ in range(2):
        set_precision("highest")
        triton.loss_and_gradient(student, teacher, ROW_L1, True)
        triton.loss_and_gradient(student.contiguous(), teacher, ROW_L1, True)
        triton.loss_and_gradient(student[:, :63], teacher[:, :63], ROW_L1, True)
        triton.loss_and_gradient(student, teacher, Relation("row", "l1", eps=1.0), True)
        triton.loss_and_gradient(student, teacher, ROW_L1, False)
        set_precision("medium")
        triton.loss_and_gradient(student, teacher, ROW_L1, True)
    assert len(set(map(id, runs[:6]))) == 6
    assert runs[6:] == runs[:6]


def test_few_plans_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(plans, "PLANS", 3)
    monkeypatch.setattr(Plan, "run", lambda self, *tensors: ())
    for pixels in range(1, 9):
        triton.loss_and_gradient(*features(pixels), ROW_L1, True)
    assert len(plans._plans) == 3


@pytest.mark.parametrize("numbers", ["bfloat16", "float16"])
def test_the_tile_kernel_writes_float32(numbers) -> None:
    """Into the gradient itself only if that is float32: sums that bfloat16 rounds would be rounded twice."""
    from srpkd.kernels.triton.compiler_report import Case, launch_of

    launch = launch_of(Case("relation", (9, 0), numbers))
    U = dict(zip(launch.kernel.arg_names, launch.arguments))["U_ptr"]
    assert U.dtype == torch.float32 and (U.base != plans.SCRATCH) == (numbers == "float16")


# --- compile-time constants -------------------------------------------------------------------------------------------


def test_few_channel_counts_need_another_kernel() -> None:
    """The counts from 33 to 63, and all multiples of the block beyond one block, share compile-time constants."""
    from srpkd.kernels.triton.compiler_report import Case, launch_of

    def known(channels_s: int, channels_t: int) -> dict:
        return launch_of(Case("relation", (9, 0), "bfloat16", (channels_s, channels_t))).constants

    assert known(33, 256) == known(48, 256) == known(63, 256) != known(64, 256)
    assert known(192, 512) == known(320, 1024) != known(192, 500)
