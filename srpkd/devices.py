"""The devices that torch sees: their names, and how to wait for them."""

from __future__ import annotations

import platform

import torch


def gpu_count() -> int:
    """Return the number of GPUs of type "cuda" that torch can use. It also counts those whose driver is too old."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def visible_devices() -> list[torch.device]:
    """Return the CPU and every other device that torch can use."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(gpu_count())]
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        devices += [torch.device(other.type, index) for index in range(torch.accelerator.device_count())]
    return devices


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, the architecture of the CPU, or else the type of the device."""
    if device.type == "cpu":
        return platform.machine()
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name_of is None else name_of(device)


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of the CPU."""
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)


def synchronize(device: torch.device | str) -> None:
    """Wait for what runs on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of the CPU, does not suffice."""
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # not all have a class
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def may_copy_ahead(device: torch.device) -> bool:
    """Return whether the host need not wait for a copy to a device: a copy to an NVIDIA or AMD GPU.

    A copy to the CPU would be read before it is complete. A copy to Apple's GPU reads memory of the CPU that may be
    freed by then, and gives wrong values (pytorch/pytorch#189690).
    """
    return device.type == "cuda"
