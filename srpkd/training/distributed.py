"""Several processes, each with its part of every batch: torch.distributed, as torchrun starts it.

In a process that was not started by torchrun everything here is as if there were one of them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# the first process evaluates and writes while the others wait for it
TIMEOUT = timedelta(hours=3)
# torch 2.14 has another name for it
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did: NCCL between GPUs, gloo between CPUs.

    No network that was wrapped here may be kept afterwards: it would keep gloo's threads, and a thread that lets go of
    a tensor while Python ends takes the process down with SIGABRT.
    """
    if launched_world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # networks in cycles, of hooks for example


def launched_world_size() -> int:
    """How many processes torchrun started, also before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; the first, 0, alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share every batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(text: str) -> None:
    """Print in the first process alone."""
    if rank() == 0:
        print(text, flush=True)


def broadcast_object(value: Any) -> Any:
    """The first process's value, in all of them."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every process's value, in all of them."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_and(condition: Tensor) -> Tensor:
    """Whether a condition, a tensor (), holds in every process; nothing waits for the GPU."""
    if world_size() == 1:
        return condition
    number = condition.to(torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return number.bool()


def wrap(network: nn.Module, compiled: bool = False) -> nn.Module:
    """The network as training calls it: compiled, if that is wanted, and its gradients averaged over the processes.

    Hooks may be registered on the network itself until it runs for the first time.
    """
    if next(network.parameters()).is_meta:
        return network
    if compiled:
        network = torch.compile(network)
    if world_size() > 1:
        # a discriminator runs twice before its backward: buffers overwritten in between would break its gradient
        network = DistributedDataParallel(network, **{SYNC_BUFFERS: False})
    return network
