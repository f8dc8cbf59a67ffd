"""Which backend computes a relation loss: the registry, ``auto``, and the environment variable SRPKD_BACKEND.

A backend is a module of this package with

    relation_tiles(student, teacher, scales, relation, need_grad) -> Tiles     the one primitive
    unavailable_reason(device) -> str | None       why it cannot run there and what to do; None where it can
    SCALE_DTYPE                         optional: the least dtype that its scales are computed in
    DISTANCES, DTYPES                   optional: the distances, the dtypes that it can do, all by default
    value_and_gradient(student, teacher, relation, need_grad)
                                        optional: the function below, where it computes the algebra around the tiles too

and a line in BACKENDS. ``reference`` alone brings ``relation_loss`` instead, which autograd differentiates.
"""

from __future__ import annotations

import difflib
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from . import formulas
from .formulas import Relation

BACKENDS = {
    "reference": "the definition, materialised: N x N arrays, autograd's own gradient",
    "blocked": "PyTorch, a strip of rows at a time: any device",
    "closed_form": "the l2 distance exactly, through C x C matrices",
    "native": "C++ for the CPU, tiles in the cache, each pair of blocks once; CUDA C++ for NVIDIA GPUs",
    "triton": "one pass over tiles on an NVIDIA GPU, with the algebra around them: few launches",
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported when first asked for, so that none costs or breaks the others."""
    return importlib.import_module(f".{name}", __package__)


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run on ``device``, or None where it can."""
    return backend_module(name).unavailable_reason(device)


def requested_backend(backend: str) -> str:
    """The backend that the caller wants: the argument; if that is "auto", SRPKD_BACKEND; else "auto".

    Raises:
        ValueError: the name, given either way, is no backend's.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("SRPKD_BACKEND") or "auto", "the environment variable SRPKD_BACKEND"
    check_choice(source, backend, ("auto", *BACKENDS))
    return backend


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the choices, and the nearest one, unless value is among them."""
    if isinstance(value, str) and value in choices:
        return
    nearest = difflib.get_close_matches(str(value), choices, 1, cutoff=0.5)
    raise ValueError(
        f"{what}={value!r} is not one of {', '.join(map(repr, choices))}"
        + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    )


# From how many pixels for each channel, student's and teacher's together, on a CPU O(N C^2) in float64 costs less than
# tiles. On a GPU it was not measured.
CLOSED_FORM_FROM = {"row": 7, "cosine": 4, "none": 4}


def auto_backend(
    device: torch.device,
    relation: Relation,
    dtype: torch.dtype = torch.float32,
    pixels: int = 4096,
    channels: tuple[int, int] = (64, 256),
) -> str:
    """The backend that ``auto`` stands for: the fastest that can run, by the measurements in bench/.

    Args:
        pixels: N; by default that of a 64 x 64 map.
        channels: C_s, C_t.
    """
    pays = device.type != "cpu" or pixels >= CLOSED_FORM_FROM[relation.normalize] * sum(channels)
    if relation.distance == "l2" and pays and unavailable_reason("closed_form", device) is None:
        return "closed_form"
    if device.type == "cpu" and backend_module("native").is_built(device):
        return "native"
    if device.type == "cuda" and dtype != torch.float64:  # which has no kernels for the GPU
        if unavailable_reason("triton", device) is None:
            return "triton"
        if backend_module("native").is_built(device):
            return "native"
    return "blocked"


def value_and_gradient(
    student: Tensor, teacher: Tensor, relation: Relation, backend: str, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each image (B,), and its gradient (B, N, C_s) if asked for, by any backend but the reference.

    Args:
        student: raw features (B, N, C_s), any strides.
        teacher: raw features (B, N, C_t), same device and dtype.
        backend: "auto" or a name from BACKENDS.

    Raises:
        BackendUnavailable: the backend was asked for by name and cannot run on this device.
        ValueError: the backend was asked for by name and cannot do this distance or dtype.
    """
    if backend == "auto":
        _, pixels, channels = student.shape
        backend = auto_backend(student.device, relation, student.dtype, pixels, (channels, teacher.shape[2]))
    module = backend_module(backend)
    if (reason := module.unavailable_reason(student.device)) is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run on {student.device}: {reason}")
    if relation.distance not in getattr(module, "DISTANCES", formulas.DISTANCES):
        raise ValueError(
            f"backend={backend!r} computes distance in {module.DISTANCES} only, not {relation.distance!r}; "
            "use backend='auto'"
        )
    if student.dtype not in (dtypes := getattr(module, "DTYPES", (student.dtype,))):
        raise ValueError(
            f"backend={backend!r} computes features in {', '.join(str(dtype)[6:] for dtype in dtypes)} only, not "
            f"{str(student.dtype)[6:]}; use backend='auto', or convert them"
        )
    if hasattr(module, "value_and_gradient"):
        return module.value_and_gradient(student, teacher, relation, need_grad)
    accumulator = formulas.accumulator(student.dtype)
    scale_dtype = torch.promote_types(accumulator, getattr(module, "SCALE_DTYPE", accumulator))
    scales = formulas.scales_of(student, teacher, relation, scale_dtype)
    tiles = module.relation_tiles(student, teacher, scales, relation, need_grad)
    loss = (tiles.loss / student.shape[1] ** 2).to(accumulator)
    return loss, formulas.gradient_of(student, tiles, scales, relation) if need_grad else None
