"""The requirements of the backends for NVIDIA GPUs on a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

CAPABILITY = (8, 0)  # bfloat16 and TF32 matrix instructions, asynchronous copies


def unavailable_reason(device: torch.device) -> str | None:
    """Return why kernels for NVIDIA GPUs cannot run on ``device`` and what to do, or None if they can."""
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs: move the features to one, or use backend='auto'"
    if torch.version.hip:
        return "it is written for NVIDIA GPUs, and this is an AMD GPU: use backend='auto'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: check the driver, or use backend='auto' on the CPU"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        needed, found = ("{}.{}".format(*version) for version in (CAPABILITY, capability))
        return f"it needs a GPU of compute capability {needed} or higher, this one has {found}: use backend='auto'"
    return None


class Gpu(NamedTuple):
    """The properties of a GPU by which ``auto`` chooses: measurements are recorded under name and capability.

    Attributes:
        capability: the compute capability, (major, minor).
        shared_of_block: bytes of shared memory that a thread block can have.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_of_block: int


def gpu_of(device: torch.device) -> Gpu:
    """Return the properties of a GPU."""
    found: Any = torch.cuda.get_device_properties(device)  # its type lacks the last attribute
    capability = found.major, found.minor
    return Gpu(found.name, capability, found.multi_processor_count, found.shared_memory_per_block_optin)
