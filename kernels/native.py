"""Backend ``native``: the tiles in C++ (``csrc/``), through the operator ``srpkd::relation_tiles``.

The extension is built when the package is installed beside torch, and else when the backend is first asked for by
name: see build.py. ``auto`` takes it where it is built, and never builds it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import build
from . import cuda_device as nvidia
from .formulas import Relation, Scales, TileSums

# Pixels in a block, rounded up to a multiple of 16; 0: what suits the cache and the number of threads. Results are
# the same to the bit for the same size of block.
TILE = 0


def relation_tiles(student: Tensor, teacher: Tensor, scales: Scales, relation: Relation, need_grad: bool) -> TileSums:
    """The primitive: (B, N, C_s), (B, N, C_t) -> loss (B,) in float64, U (B, N, C_s), h (B, N). See ``Tiles``."""
    extension()
    loss, U, h = torch.ops.srpkd.relation_tiles(
        student,
        teacher,
        scales.student,
        scales.teacher,
        relation.normalize,
        relation.distance,
        relation.delta,
        need_grad,
        TILE,
    )
    return TileSums(loss, U if need_grad else None, h if need_grad and relation.normalize != "none" else None)


def extension() -> ModuleType:
    """The extension's module, built first if need be.

    Raises:
        RuntimeError: it cannot be had here; says why.
    """
    module, reason = _existing()
    if module is None:
        if reason := reason or build.unavailable_reason():
            raise RuntimeError(f"the native backend is not available: {reason}")
        build.build()
        _existing.cache_clear()
        module, reason = _existing()
        if module is None:
            raise RuntimeError(f"the native backend was built and is not available: {reason}")
    return module


@functools.cache
def _existing() -> tuple[ModuleType | None, str | None]:
    """The extension if it is built already; else None, and why what was found is of no use, None if nothing was."""
    name = f"{__package__}.{build.NAME}"
    spec = importlib.util.find_spec(name)
    if spec is None:
        library = build.cached_library()
        if not library.exists():
            return None, None
        spec = importlib.util.spec_from_file_location(name, library)
    if reason := build.stale_reason(Path(spec.origin)):
        return None, f"{reason}: install srpkd again, with --no-build-isolation"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{spec.origin} does not load: {error}"
    return module, None


def is_built(device: torch.device) -> bool:
    """Whether it can run there without building anything: what ``auto`` asks."""
    return _existing()[0] is not None and unavailable_reason(device) is None


def unavailable_reason(device: torch.device) -> str | None:
    """Why it cannot run there, or None where it can, if need be after building it."""
    module, reason = _existing()
    if module is None and (reason := reason or build.unavailable_reason()):
        return reason
    if device.type == "cpu":
        return None
    if reason := nvidia.unavailable_reason(device):
        return reason
    if module is None:
        return build.cuda_unavailable_reason()
    return None if module.cuda_architectures else "it was built without its CUDA part"


def status() -> str:
    """One line on the extension, for ``srpkd.info``."""
    module, reason = _existing()
    if module is None:
        reason = reason or build.unavailable_reason()
        return f"not available: {reason}" if reason else 'not built: the first use of backend="native" builds it'
    capability = module.cpu_capability()
    return (
        f"built for torch {module.torch_version}; CPU: {capability['instructions']}, "
        f"{capability['cache_bytes'] // 1024} KB of cache a core; GPU: {module.cuda_architectures or 'not built'}"
    )
