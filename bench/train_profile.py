"""Operators, launches and host time of training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
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


def _times(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step, and those of the host alone."""
    host = 0.0

    def call() -> None:
        nonlocal host
        host = seconds_of(step, "cpu")

    return seconds_of(call, str(device)), host


def report(steps: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Profile steps, after a warm-up, and return the counts and times of one call of each as text.

    The time of the host ends when the step returns, which on a GPU is before the GPU is done. The operators of networks
    that torch.compile wraps are not counted.
    """
    lines = []
    for name, step in steps.items():
        for _ in range(WARMUP if device.type == "cuda" else 1):
            step()
        seconds, host = (min(times) for times in zip(*(_times(step, device) for _ in range(3))))
        with OperatorCount() as operators:
            step()
        gpu = ""
        if device.type == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                step()
                torch.cuda.synchronize(device)
            kernels = [event.device_time for event in profiled.events() if event.device_type == DeviceType.CUDA]
            gpu = f", GPU {sum(kernels) / 1e3:.1f} ms in {len(kernels):,} launches"
        total = operators.counts.total()
        lines.append(f"{name}: {total:,} operators, {1e3 * seconds:.1f} ms, host {1e3 * host:.1f} ms{gpu}")
        lines += [f"    {count:6,} {operator}" for operator, count in operators.counts.most_common(LARGEST)]
    return "\n".join(lines)
