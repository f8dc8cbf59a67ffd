"""Operators, launches and host time of training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .measure import seconds_of

LARGEST = 12  # operators in a list
WARMUP = 5  # steps, beyond the capture of a CUDA graph
# operators that compute nothing: views, and memory that is allocated and not filled
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """Counts the operators that compute something, in forward and backward passes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace != "profiler" and name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class StepProfile:
    """Counts of one training step.

    Attributes:
        operators: name -> number of calls; empty for networks that torch.compile wraps.
        launches: kernels on the GPU, 0 on the CPU.
        gpu_seconds: their total time.
        host_seconds: until the step returns to the host, which on a GPU is before the GPU is done.
        seconds: of the whole step.
    """

    operators: Counter[str]
    launches: int
    gpu_seconds: float
    host_seconds: float
    seconds: float


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Profile a step, after a warm-up."""
    for _ in range(WARMUP if device.type == "cuda" else 1):
        step()
    whole, host = (min(times) for times in zip(*(_times(step, device) for _ in range(3))))
    with OperatorCount() as operators:
        step()
    launches, busy = 0, 0.0
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize(device)
        kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        launches, busy = len(kernels), sum(event.device_time for event in kernels) / 1e6
    return StepProfile(operators.counts, launches, busy, host, whole)


def _times(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step, and those of the host alone."""
    host = 0.0

    def call() -> None:
        nonlocal host
        host = seconds_of(step, "cpu")

    return seconds_of(call, str(device)), host


def report(steps: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Return the profiles of several steps as text."""
    lines = []
    for name, step in steps.items():
        found = profile_step(step, device)
        total = found.operators.total()
        gpu = f", GPU {1e3 * found.gpu_seconds:.1f} ms in {found.launches:,} launches" if found.launches else ""
        lines.append(
            f"{name}: {total:,} operators, {1e3 * found.seconds:.1f} ms, host {1e3 * found.host_seconds:.1f} ms{gpu}"
        )
        lines += [f"    {count:6,} {operator}" for operator, count in found.operators.most_common(LARGEST)]
    return "\n".join(lines)
