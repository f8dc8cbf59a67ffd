"""Backend ``native``: the loss in C++ and CUDA (``csrc/``), through the operator ``srpkd::relation_loss``.

The extension is built when the package is installed into an environment with torch, or else when the backend is first
requested by name: see build.py. ``auto`` uses it if it is built, and never builds it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import build, cuda_device, measured
from .formulas import Pixels, Relation, Scales, TileSums

# Pixels in a block, rounded up to a multiple of 16. 0 chooses a size by the cache and the number of threads. Results
# are bit-identical for the same size.
TILE = 0
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relation_loss(
    student: Tensor, teacher: Tensor, relation: Relation, reduction: str, layout: str, scope: str, method: str
) -> Tensor:
    """The whole loss of features in ``layout``, differentiable in the student, in one call of a C++ operator."""
    extension()
    scope = "image" if scope == "image" else "batch"
    return torch.ops.srpkd.relation_loss.default(
        student, teacher, *relation.arguments, reduction, layout, scope, method
    )


def loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, method: str = "tiles"
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,) and its gradient (B, N, C_s)."""
    extension()
    loss, gradient = torch.ops.srpkd.relation_loss_forward.default(
        student, teacher, *relation.arguments, "none", method, need_grad
    )
    return loss, gradient if need_grad else None


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,) in float64, U (B, N, C_s), h (B, N). See ``TileSums``."""
    pixels = student, teacher, scales.student, scales.teacher
    return _tile_sums("relation_tiles", pixels, relation, need_grad)


def sampled_loss_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool, columns: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each image (B,) over the sampled pairs and its gradient (B, N, C_s), on the CPU.

    ``columns`` are those of ``sampling.draw_columns``, (B, S, m).
    """
    extension()
    loss, gradient = torch.ops.srpkd.sampled_loss(student, teacher, columns, *relation.arguments, need_grad, TILE)
    return loss, gradient if need_grad else None


def remote_tiles(rows: Pixels, columns: Pixels, relation: Relation, need_grad: bool) -> TileSums:
    """Return ``TileSums`` of the rows (1, N, C) over the columns (1, N', C) of another rank, on the CPU."""
    present = [[x for x in pixels if x is not None] for pixels in (rows, columns)]
    return _tile_sums("remote_tiles", present, relation, need_grad)


def _tile_sums(operator: str, pixels: Iterable[object], relation: Relation, need_grad: bool) -> TileSums:
    """Return the sums that an operator of the extension computes of some pixels."""
    extension()
    options = relation.normalize, relation.distance, relation.delta, relation.rectify
    loss, U, h = getattr(torch.ops.srpkd, operator)(*pixels, *options, need_grad, TILE)
    return TileSums(loss, U if need_grad else None, h if need_grad and relation.differentiates_norms else None)


def extension() -> ModuleType:
    """Return the module of the extension. Build it first if it is not built yet.

    Raises:
        RuntimeError: the extension cannot be built or loaded.
    """
    module, reason = load_existing()
    if module is None:
        if reason := reason or build.unavailable_reason():
            raise RuntimeError(f"the native backend is not available: {reason}")
        build.build()
        load_existing.cache_clear()
        module, reason = load_existing()
        if module is None:
            raise RuntimeError(f"the native backend was built but is not available: {reason}")
    return module


@functools.cache
def load_existing() -> tuple[ModuleType | None, str | None]:
    """Load the extension if it is built. Return (module, None), (None, why it cannot be used) or (None, None)."""
    name = f"{__package__}.{build.NAME}"
    spec = importlib.util.find_spec(name)
    try:
        library = Path(spec.origin) if spec is not None and spec.origin is not None else build.cached_library()
    except build.BuildError as error:
        return None, str(error)
    if not os.path.exists(library):  # False also for the home of another user, for which Path.exists() raises
        return None, None
    try:
        reason = build.stale_reason(library)
    except OSError as error:  # such as a file of another user
        return None, f"{library} cannot be read: {error.strerror}"
    if reason:
        return None, f"{reason}: install srpkd again with --no-build-isolation"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None, library  # known from the suffix .so
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{library} does not load: {error}"
    return module, None


def is_built(device: torch.device) -> bool:
    """Return whether the backend can run on ``device`` without a build, as ``auto`` requires."""
    module, _ = load_existing()
    if module is None:
        return False
    return unavailable_reason(device) is None if device.type == "cpu" else _can_run(module.cuda_architectures, device)


@functools.lru_cache(maxsize=64)
def _can_run(architectures: str, device: torch.device) -> bool:
    """Return whether an extension that is built for some architectures can run on a GPU.

    Each call of ``closed_form`` asks. It does not look for the reason, which may run nvcc, and asks torch.cuda once,
    which takes as long as a launch.
    """
    return cuda_device.unavailable_reason(device) is None and build.has_code_for(
        architectures, torch.cuda.get_device_capability(device)
    )


def unavailable_reason(device: torch.device) -> str | None:
    """Return why the backend cannot run on ``device``, or None if it can, possibly after a build."""
    # first, since no compiler and no build would help there
    if device.type != "cpu" and (reason := cuda_device.unavailable_reason(device)):
        return reason
    module, reason = load_existing()
    if module is None and (reason := reason or build.unavailable_reason()):
        return reason
    if device.type == "cpu":
        return None
    if module is None:
        return build.cuda_unavailable_reason()
    if not module.cuda_architectures:
        again = "install srpkd again with --no-build-isolation"
        remedy = build.cuda_unavailable_reason()
        if remedy is None:
            remedy = f"{problem}, and {again}" if (problem := build.nvcc_problem()) else again
        return f"it was built without the CUDA part: {remedy}"
    capability = torch.cuda.get_device_capability(device)
    if build.has_code_for(module.cuda_architectures, capability):
        return None
    version, needed = "{}.{}".format(*capability), shlex.quote(";".join(build.installed_architectures()))
    return (
        f"it was built for the GPU architectures {module.cuda_architectures}, and this GPU has {version}: install "
        f"srpkd again with --no-build-isolation and TORCH_CUDA_ARCH_LIST={needed}"
    )


def cuda_kernel(case: measured.Case, relation: Relation, gpu: cuda_device.Gpu) -> str:
    """Return the tiles that compute a loss on a GPU, as csrc/cuda/choose_kernel.h chooses them: "sm80" or "sm90"."""
    module, _ = load_existing()
    if module is None:
        return "sm80"
    if (setting := os.environ.get("SRPKD_CUDA_KERNEL", "auto")) != "auto":
        return setting
    return module.fastest_cuda_kernel(
        **case._asdict(),
        delta=relation.delta,
        rectify=relation.rectify,
        detach_norms=relation.detach_norms,
        major=gpu.capability[0],
        multiprocessors=gpu.multiprocessors,
        shared_of_block=gpu.shared_of_block,
        architectures=module.cuda_architectures,
    )


def status() -> str:
    """Return one line about the extension, for ``srpkd.info``."""
    module, reason = load_existing()
    if module is None:
        reason = reason or build.unavailable_reason()
        return f"not available: {reason}" if reason else 'not built: the first use of backend="native" builds it'
    capability = module.cpu_capability()
    return (
        f"built for torch {module.torch_version}; CPU: {capability['instructions']}, "
        f"{capability['cache_bytes'] // 1024} KB of cache per core; GPU: {_cuda_kernels(module.cuda_architectures)}"
    )


def _cuda_kernels(architectures: str) -> str:
    """Describe the kernels of the relation tiles, given the architectures that they are built for."""
    if not architectures:
        return "not built"
    wgmma = ", and on Hopper by wgmma where that is verified and faster" if "9.0a" in architectures else ""
    return f"{architectures}, tiles by mma.sync{wgmma}"
