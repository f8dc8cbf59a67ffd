"""Data-parallel training in the processes that torchrun starts; each one gets its part of every batch.

Without torchrun, all functions behave as with a world size of 1.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import first_line

T = TypeVar("T")
_failures: dist.Store | None = None  # shared by all ranks: which one failed first, and how many failed
# rank 0 evaluates and writes while the other ranks wait for it
TIMEOUT = timedelta(hours=3)
NOTICE_SECONDS = 3.0  # that the processes have to notice the failure of one
# torch 2.14 renamed broadcast_buffers to forward_sync_buffers
BUFFER_SYNC_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context in which the processes of torchrun form the default process group: NCCL for GPUs, gloo for CPUs.

    Keep no network that ``wrap`` returned after the context ends: it keeps gloo's threads alive, and a thread that
    frees a tensor during interpreter shutdown aborts the process (SIGABRT).

    Args:
        device: the device of this process.

    Raises:
        ValueError: the processes cannot connect.
    """
    if device.type == "cuda" and device.index is not None:
        # also for one process: pinned memory, for example, would take memory of the first GPU
        torch.cuda.set_device(device)
    if launched_world_size() == 1:
        yield
        return
    # optimizers import it at their first call: with the group, which some of its functions have as a default argument,
    # it would keep gloo's threads alive too
    import_module("torch._dynamo")

    global _failures
    # gloo also for GPUs: objects and signals are exchanged by the hosts, which then need not wait for their GPUs
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, own_rank, processes = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=own_rank, world_size=processes)
    except (ValueError, RuntimeError) as error:
        reason = f"the {launched_world_size()} processes of WORLD_SIZE cannot connect ({first_line(error)})"
        if not dist.is_torchelastic_launched():  # clusters may set WORLD_SIZE without the variables next to it
            reason += ": start them with torchrun, or unset WORLD_SIZE to train in one process"
        raise ValueError(reason) from error
    _failures = dist.PrefixStore("srpkd", store)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # frees networks in reference cycles, such as those of hooks
        with suppress(RuntimeError):  # the store ended with the process that held it
            _let_first_failure_end_first(own_rank, processes)
        _failures = None


def launched_world_size() -> int:
    """Return the number of processes that torchrun started; valid before the process group exists.

    Raises:
        ValueError: the environment variable WORLD_SIZE is not a number of processes.
    """
    setting = os.environ.get("WORLD_SIZE", "1")
    if not setting.isdecimal() or int(setting) == 0:
        raise ValueError(
            f"the environment variable WORLD_SIZE is {setting!r}: expected the number of processes, which torchrun "
            "sets; unset it to train in one process"
        )
    return int(setting)


def rank() -> int:
    """Return the rank of this process; only rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that share every batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(text: str) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_buffers(network: nn.Module) -> None:
    """Replace the buffers of a network, such as running statistics of batch norms, by those of rank 0."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, in order of rank, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(function: Callable[[], T]) -> T:
    """Return ``function()``, or raise the error of a rank on every rank: the others would wait for that rank.

    Args:
        function: calls no collective. Errors that are expected of it are ValueError, OSError and ImportError.
    """
    try:
        value = function()
    except (ValueError, OSError, ImportError) as error:
        all_gather_object(str(error) or type(error).__name__)
        raise
    for number, message in enumerate(all_gather_object("")):
        if message:
            raise ValueError(f"rank {number}: {message}")
    return value


def max_over_ranks(number: int) -> int:
    """Return the largest of the ranks' numbers, on every rank. Waits for the hosts of the ranks, not for their GPUs."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def is_first_failure(message: str) -> bool:
    """Record why this rank ends the run, and return whether no rank did so before: only the first shows its message.

    The other ranks then fail too, because they lose their connection to this one. torchrun repeats the message at the
    end of its output.
    """
    if _failures is None:
        return True
    try:
        first = int(_failures.compare_set("first", "", str(rank()))) == rank()
        _failures.add("count", 1)
    except RuntimeError:  # the store ended with the process that held it
        return True
    if first and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": content}, file)
    return first


def _let_first_failure_end_first(own_rank: int, processes: int) -> None:
    """Wait for the end of the process that failed first, if one did: torchrun reports the one that ends first.

    torchrun then ends this process. Without it, the store is held by rank 0, which waits for the others to read it.
    """
    assert _failures is not None
    deadline = time.monotonic() + NOTICE_SECONDS
    while _failures.add("count", 0) and time.monotonic() < deadline:
        is_first = int(_failures.get("first")) == own_rank
        if is_first if dist.is_torchelastic_launched() else own_rank or _failures.add("count", 0) == processes:
            return
        time.sleep(0.05)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error of this rank means that another rank has ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def all_reduce_and(condition: Tensor) -> Tensor:
    """Return whether a boolean scalar tensor is true on every rank, as a tensor: no host synchronisation."""
    if world_size() == 1:
        return condition
    number = condition.to(torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return number.bool()


def wrap(network: nn.Module, compiled: bool = False, *, dynamic: bool | None = False) -> nn.Module:
    """Return the network as training calls it: optionally compiled, and with gradients averaged over all ranks.

    Register hooks on the original network, before its first forward pass. A network on "meta" is returned unchanged.

    Args:
        dynamic: as for torch.compile; by default every shape of images is compiled by itself.
    """
    if next(network.parameters()).is_meta:
        return network
    wrapped = cast(nn.Module, torch.compile(network, dynamic=dynamic)) if compiled else network
    if world_size() > 1:
        # a discriminator runs twice before its backward pass: a buffer sync in between would break its gradient
        options: dict[str, Any] = {BUFFER_SYNC_OPTION: False}
        wrapped = DistributedDataParallel(wrapped, **options)
    return wrapped
