"""The choice of the backend: the registry, ``auto``, and the environment variable SRPKD_BACKEND.

A backend is a line in BACKENDS and a module of this package that defines

    relation_tiles(student, teacher, scales, relation, need_grad) -> TileSums
                                        the primitive
    loss_and_gradient(student, teacher, relation, need_grad) -> (loss, gradient or None)
                                        the loss by the primitive and the formulas around it, as by
                                        ``formulas.loss_and_gradient``
    unavailable_reason(device) -> str | None
                                        why the backend cannot run there and what to do; None if it can
    DISTANCES, DTYPES                   optional: the supported distances and dtypes; all by default
    GPU_DTYPES                          optional: the dtypes on GPUs, if they differ
    UNSUPPORTED                         optional: the flags of ``Relation`` that it does not support; none by default
    REDUCES                             optional: whether ``loss_and_gradient`` takes the reduction of the loss too
    is_built(device) -> bool            optional: whether it can run without a build, which ``auto`` does not start

    sampled_loss_and_gradient(student, teacher, relation, need_grad, columns) -> (loss, gradient or None)
    remote_tiles(rows, columns, relation, need_grad) -> TileSums
                                        optional: the loss over sampled columns, and the sums over those of another
                                        rank, for ``partial_backends``

The exceptions: ``reference`` defines ``relation_loss``, which autograd differentiates, and ``native`` defines
``relation_loss``, a C++ operator that also converts layouts, reduces over the batch and is differentiable.
``closed_form`` defines ``implementation``, by which ``auto`` knows whether kernels compute it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from . import cuda_device, formulas, measured
from .cpu_info import cpu_info
from .formulas import Relation

BACKENDS = {
    "reference": "the definition with N x N arrays, differentiated by autograd: to check against",
    "blocked": "PyTorch, a strip of rows at a time: any device",
    "closed_form": "exact l2 through C x C matrices, O(N C^2)",
    "native": "C++ tiles in the CPU cache; CUDA C++ for NVIDIA GPUs",
    "triton": "Triton kernels for NVIDIA GPUs: one pass over tiles, few launches",
}


class BackendUnavailable(RuntimeError):
    """A backend that was requested by name cannot run here."""


@functools.cache
def backend_module(name: str) -> ModuleType:
    """Import a backend's module at its first use, so that backends do not slow down or break each other."""
    return importlib.import_module(f".{name}", __package__)


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Return why backend ``name`` cannot run on ``device``, or None if it can."""
    return backend_module(name).unavailable_reason(device)


def supported_dtypes(name: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes of features that backend ``name`` supports on ``device``."""
    module = backend_module(name)
    everywhere = getattr(module, "DTYPES", formulas.DTYPES)
    return everywhere if device.type == "cpu" else getattr(module, "GPU_DTYPES", everywhere)


def unsupported_flag(name: str, relation: Relation) -> str | None:
    """Return the first flag of the relation that backend ``name`` does not support, or None."""
    return next((flag for flag in getattr(backend_module(name), "UNSUPPORTED", ()) if getattr(relation, flag)), None)


def requested_backend(backend: str) -> str:
    """Return the requested backend: the argument, or SRPKD_BACKEND if the argument is "auto" and the variable is set.

    Raises:
        ValueError: the argument or the variable is not a backend's name.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("SRPKD_BACKEND") or "auto", "the environment variable SRPKD_BACKEND"
    check_choice(source, backend, ("auto", *BACKENDS))
    return backend


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the choices and suggests the nearest, unless ``value`` is one of them."""
    if isinstance(value, str) and value in choices:
        return
    nearest = difflib.get_close_matches(str(value), choices, 1, cutoff=0.5)
    raise ValueError(
        f"{what}={value!r} is not one of {', '.join(map(repr, choices))}"
        + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    )


# O(N C^2) costs less than tiles from this number of pixels on, and from this number per channel (C_s + C_t): on a CPU
# in float64, by measurement (bench/NOTES.md); on a GPU by a wide margin. There the recorded GPU does not decide between
# the two: one image takes as long as the host, with either, and slower GPUs would get the tiles.
CLOSED_FORM_FROM = {
    "zen5": {"row": (1600, 16), "cosine": (1200, 8), "none": (1200, 8)},
    "cpu": {"row": (1500, 8), "cosine": (900, 4), "none": (900, 4)},
    "cuda": {"row": (0, 7), "cosine": (0, 4), "none": (0, 4)},
}
# On GPUs, native and triton compute row norms from C x C matrices, and ``blocked`` from N x N ones where these are
# smaller. It is faster, by estimate, where the first have so many elements, and up to this ratio of N^2 to C, since its
# products are in float32. This was not measured.
LARGE_MOMENTS, GRAM_RATIO = 2**25, 64
ZEN5_FAMILY = 26
GPU_BACKENDS = ("triton", "native", "closed_form")  # for GPUs of which nothing is recorded, the first that can run


def auto_backend(
    device: torch.device,
    relation: Relation,
    dtype: torch.dtype = torch.float32,
    pixels: int = 4096,
    channels: tuple[int, int] = (64, 256),
    batch: int = 1,
    precision: str = "highest",
    need_grad: bool = True,
) -> str:
    """Return the backend that ``auto`` selects: the fastest that can run, by the measurements in bench/results.

    Args:
        pixels: N; by default that of a 64 x 64 map.
        channels: C_s, C_t.
        batch: B. Only matters on GPUs, as the remaining arguments.
        precision: of float32 matrix products: "highest", "high" or "medium".
        need_grad: whether the gradient is computed too.
    """
    enough = pixels >= closed_form_pixels(device, relation.normalize, channels)
    if device.type == "cpu":
        names = ("closed_form", "native") if enough else ("native",)
        return next((name for name in names if _auto_can_run(name, device, relation, dtype)), "blocked")
    moments = batch * sum(count**2 for count in channels)
    if relation.normalize == "row" and moments >= LARGE_MOMENTS and pixels**2 <= GRAM_RATIO * max(channels):
        return "blocked"
    runnable = [name for name in GPU_BACKENDS if _auto_can_run(name, device, relation, dtype)]
    # the recorded times are those of its kernels; where there are none, few pixels take less time in strips
    may_replace_it = len(runnable) > 1 or not enough
    if may_replace_it and backend_module("closed_form").implementation(device, dtype, relation) == "pytorch":
        runnable = [name for name in runnable if name != "closed_form"]
    if enough and "closed_form" in runnable:
        return "closed_form"
    if len(runnable) > 1:
        case = measured.Case(
            str(dtype)[6:], precision, relation.normalize, relation.distance, need_grad, pixels, *channels, batch
        )
        gpu = cuda_device.gpu_of(device)
        kernel = backend_module("native").cuda_kernel(case, relation, gpu) if "native" in runnable else "sm80"
        for name in measured.ranking(gpu.name, gpu.capability, case, kernel):
            if name in runnable:
                return name
    return runnable[0] if runnable else "blocked"


def closed_form_pixels(device: torch.device, normalize: str, channels: tuple[int, int]) -> int:
    """Return the number of pixels from which ``auto`` selects the closed form for l2."""
    kind = device.type
    if kind != "cpu":
        kind = "cuda"
    elif torch.backends.cpu.get_cpu_capability() == "AVX512" and is_zen5():
        kind = "zen5"
    least, per_channel = CLOSED_FORM_FROM[kind][normalize]
    return max(least, per_channel * sum(channels))


@functools.cache
def is_zen5() -> bool:
    """Return whether the CPU is AMD's Zen 5 or newer: tiles use AVX-512 at twice the rate of Zen 4, and MKL does not.

    Elsewhere products in float32 take half of the time that they take in float64. False if the CPU is unknown.
    """
    cpu = cpu_info()
    family = cpu.get("cpu family", "")
    return cpu.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= ZEN5_FAMILY


def _auto_can_run(name: str, device: torch.device, relation: Relation, dtype: torch.dtype) -> bool:
    """Return whether a backend can run for ``auto``, which builds nothing."""
    module = backend_module(name)
    return (
        relation.distance in getattr(module, "DISTANCES", formulas.DISTANCES)
        and dtype in supported_dtypes(name, device)
        and unsupported_flag(name, relation) is None
        and (module.is_built(device) if hasattr(module, "is_built") else module.unavailable_reason(device) is None)
    )


cached_auto_backend = functools.lru_cache(maxsize=1024)(auto_backend)


def resolve_backend(
    backend: str,
    device: torch.device,
    relation: Relation,
    dtype: torch.dtype,
    pixels: int,
    channels: tuple[int, int],
    batch: int,
    need_grad: bool,
) -> str:
    """Return the backend that computes the loss of such features: the one that is named, or the choice of ``auto``.

    Raises:
        BackendUnavailable: the named backend cannot run on this device.
        ValueError: the named backend does not support this relation or dtype.
    """
    if backend != "auto":
        check_supported(backend, device, dtype, relation)
        return backend
    if device.type == "cpu":
        return cached_auto_backend(device, relation, dtype, pixels, channels)
    precision = formulas.matmul_precision() if dtype == torch.float32 else "highest"
    return cached_auto_backend(device, relation, dtype, pixels, channels, batch, precision, need_grad)


def partial_backends(device: torch.device) -> tuple[str, ...]:
    """Return the backends that compute parts of the relation matrices: sampled columns, and those of another rank.

    ``auto`` takes the first that is built.
    """
    return ("native", "blocked") if device.type == "cpu" else ("blocked",)


def check_samples_columns(backend: str, device: torch.device) -> None:
    """Raise a ValueError if the named backend does not estimate the loss from sampled columns."""
    if backend != "auto" and backend not in (names := partial_backends(device)):
        raise ValueError(
            f"columns, the number of sampled columns, works on {device.type} with backend='auto' or "
            f"{' or '.join(map(repr, names))}, received {backend!r}: change backend, or leave out columns"
        )


def partial_backend(backend: str, device: torch.device) -> str:
    """Return the one of ``partial_backends`` that computes: the named one, or the choice of ``auto``.

    Raises:
        BackendUnavailable: the named backend cannot run on this device.
    """
    if backend == "auto":
        names = partial_backends(device)
        return next(name for name in names if name == "blocked" or backend_module(name).is_built(device))
    if (reason := unavailable_reason(backend, device)) is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run on {device}: {reason}")
    return backend


def compute_loss(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    backend: str,
    need_grad: bool,
    columns: Tensor | None = None,
    reduction: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """Return the loss, and with ``need_grad`` the gradient (B, N, C_s) of each image's own loss.

    Args:
        student: raw features (B, N, C_s), any strides.
        teacher: raw features (B, N, C_t), same device and dtype.
        backend: "auto", or a name from BACKENDS other than "reference".
        columns: (B, S, m) from ``sampling.draw_columns``, for an estimate from these columns.
        reduction: "none": the loss of each image (B,); "mean" or "sum": that of the batch ().

    Raises:
        BackendUnavailable, ValueError: as ``resolve_backend``, or with columns as ``partial_backend``.
    """
    batch, pixels, channels = student.shape
    with formulas.without_autocast(student.device):
        if columns is not None:
            module = backend_module(partial_backend(backend, student.device))
            loss, gradient = module.sampled_loss_and_gradient(student, teacher, relation, need_grad, columns)
        else:
            sizes = pixels, (channels, teacher.shape[2]), batch
            name = resolve_backend(backend, student.device, relation, student.dtype, *sizes, need_grad)
            module = backend_module(name)
            if getattr(module, "REDUCES", False):
                return module.loss_and_gradient(student, teacher, relation, need_grad, reduction)
            loss, gradient = module.loss_and_gradient(student, teacher, relation, need_grad)
        return formulas.reduced(loss, reduction), gradient


@functools.lru_cache(maxsize=1024)  # what raises nothing; on a GPU, asking torch.cuda takes as long as a launch
def check_supported(name: str, device: torch.device, dtype: torch.dtype, relation: Relation) -> None:
    """Raise the errors of ``resolve_backend`` for a backend that was requested by name."""
    module = backend_module(name)
    if (reason := module.unavailable_reason(device)) is not None:
        raise BackendUnavailable(f"backend={name!r} cannot run on {device}: {reason}")
    if relation.distance not in getattr(module, "DISTANCES", formulas.DISTANCES):
        raise ValueError(
            f"backend={name!r} supports distance {' or '.join(map(repr, module.DISTANCES))}, received "
            f"{relation.distance!r}: use backend='auto'"
        )
    if (flag := unsupported_flag(name, relation)) is not None:
        raise ValueError(f"backend={name!r} does not support {flag}=True: use backend='auto', or {flag}=False")
    if dtype not in (dtypes := supported_dtypes(name, device)):
        where = "" if device.type == "cpu" else f" on {device.type}"
        raise ValueError(
            f"backend={name!r} supports features in {', '.join(str(dtype)[6:] for dtype in dtypes)}{where}, received "
            f"{str(dtype)[6:]}: use backend='auto', or convert the features"
        )
