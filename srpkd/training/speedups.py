"""Options that make training faster on the device of a run, and those that would make it slower."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import first_line
from ..kernels.cpu_info import cpu_info

# compute capabilities of GPUs: since when they have tensor cores, and Triton supports them, and since when bfloat16
TENSOR_CORES, BFLOAT16 = (7, 0), (8, 0)
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, x86 and ARM


def cpu_has_bfloat16() -> bool | None:
    """Return whether the CPU has instructions for products of bfloat16 numbers, or None if that is unknown."""
    cpu = cpu_info()
    flags = cpu.get("flags", cpu.get("Features"))
    return None if flags is None else not BFLOAT16_FLAGS.isdisjoint(flags.split())


def has_gpu_compiler() -> bool:
    """Return whether torch.compile can compile for GPUs: it needs Triton, and Triton needs a C compiler."""
    from ..kernels import triton  # here, since it takes time to import

    return triton.triton is not None and triton.has_c_compiler()


def compiler_problem(device: torch.device) -> str:
    """Return why torch.compile cannot compile for a device, in words, or "" if it can. Compiles a small function."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # of many types
        return first_line(error)
    return ""


def fast_options(device: torch.device) -> dict[str, Any]:
    """Return what the option `fast` sets: the fastest of the combinations that ``python -m bench train`` records."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < TENSOR_CORES:
            return {}
        return {"precision": "bf16" if capability >= BFLOAT16 else "fp16", "compile": has_gpu_compiler()}
    if device.type == "cpu" and cpu_has_bfloat16():
        return {"precision": "bf16"}
    return {}


def slow_precision_reason(device: torch.device, precision: str) -> str:
    """Return why a precision makes training slower on a device, in words, or ""."""
    if device.type == "cpu" and precision == "bf16" and cpu_has_bfloat16() is False:
        return "this CPU has no bfloat16 instructions, without which bf16 is many times slower than fp32"
    if device.type == "cuda" and precision == "bf16" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < BFLOAT16:
            remedy = "; --precision fp16 uses its tensor cores" if capability >= TENSOR_CORES else ""
            found = "{}.{}".format(*capability)
            return f"this GPU, of compute capability {found}, has no bfloat16 instructions and emulates them{remedy}"
    return ""
