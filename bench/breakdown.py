"""Time of every kernel in a call of the relation loss on a GPU, and of the host.

    python -m bench breakdown                               loss and gradient of 1 and 16 images of 4,096 pixels
    python -m bench breakdown --pixels 16384 --providers triton

Each line is a kernel: its launches in a call, and the median microseconds of a launch by the profiler, times the
launches. "GPU" is the replay of a CUDA graph of the call, with a warm cache; "host" is the time to enqueue a call. The
first line of a case says how much of the host's time PyTorch needs for any loss. For kernels of the C++ extension both
times follow with SRPKD_CUDA_OVERLAP=1 and with SRPKD_CUDA_TOGETHER=0, and whether the results have the same bits. The
first call of a process compiles Triton's kernels unless they are in its cache: to measure that, set TRITON_CACHE_DIR to
an empty folder.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from srpkd.checking.cases import Case, features, settings
from srpkd.checking.kernels import (
    CUDA_KERNELS,
    OVERLAP_VARIABLE,
    TOGETHER_VARIABLE,
    CannotRun,
    environment,
    evaluate,
    poisoned_memory,
)

from . import cases, measure
from .providers import PROVIDERS, add_option, prepare_call

CALLS = 10
DEFAULT = ("native-sm90", "native-sm80", "triton")
LONGEST_NAME = 60
OF_EXTENSION = ("native", "closed_form", *CUDA_KERNELS)  # the providers with kernels of the C++ extension
OTHER_LAUNCHES = {OVERLAP_VARIABLE: "1", TOGETHER_VARIABLE: "0"}  # each other than by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    parser.set_defaults(pixels=[4096], batch=[1, 16], dtype=["bfloat16"])
    add_option(parser, DEFAULT, " ".join(DEFAULT))


def run(options: argparse.Namespace) -> None:
    """Print the breakdown of each case by each provider.

    Raises:
        ValueError: The device is not a GPU.
    """
    if (device := cases.device_of(options)) == "cpu":
        raise ValueError("the breakdown measures kernels on a GPU, and torch sees none")
    for case in cases.selected(options):
        print(f"{case.describe()}\n  {host_baseline(case, device)}")
        for name in options.providers:
            try:
                found = lines(name, case, device)
            except Exception as error:  # everything that a kernel can raise; the others are still measured
                found = [f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
            print("\n".join(f"  {line}" for line in found), flush=True)


def lines(name: str, case: Case, device: str) -> list[str]:
    """Return the breakdown of a provider's call as lines."""
    provider = PROVIDERS[name]
    if (reason := provider.unavailable_reason(case)) is not None:
        return [f"{name}: {reason}"]
    with settings(case):
        call = prepare_call(name, case)
        try:
            first = measure.seconds_of(call, device)
            for _ in range(2):
                expected = call()
        except CannotRun as error:
            return [f"{name}: {error}"]
        shown, found = times_of(call, device), []
        for variable, value in OTHER_LAUNCHES.items() if name in OF_EXTENSION else ():
            with environment(variable, value):
                with poisoned_memory():
                    results = call()
                times = times_of(call, device)
            same = "the same bits" if equal(results, expected) else "OTHER RESULTS"
            found.append(f"  with {variable}={value}: {times}, {same}")
        kernels = kernel_times(call)  # last: the profiler may slow down later launches
    launches = sum(count for count, _ in kernels.values())
    found = [f"{name}: {shown}, {launches:g} launches, first call {first:.1f} s", *found]
    for kernel, (count, microseconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        found.append(f"  {microseconds:9,.1f} us  {count:g} x {kernel}")
    return found


def host_baseline(case: Case, device: str) -> str:
    """Return what the host needs for the simplest loss, the sum of the student's features, and for one launch."""
    with settings(case):
        student, teacher = features(case)
        of_sum = measure.host_seconds(lambda: evaluate(lambda x, _: x.sum(), student, teacher, case), device)
    of_launch = measure.host_seconds(lambda: torch.cuda._sleep(1), device)
    assert of_sum is not None and of_launch is not None  # as on every GPU
    return f"PyTorch: host {1e6 * of_sum:,.1f} us for a sum and its gradient, {1e6 * of_launch:,.1f} us for a launch"


def times_of(call: Callable[[], object], device: str) -> str:
    """Return the times of a call on the GPU alone and on the host, as text."""
    times = {"GPU": measure.gpu_seconds(call, device), "host": measure.host_seconds(call, device)}
    return ", ".join(f"{label} {1e6 * value:,.1f} us" for label, value in times.items() if value is not None)


def equal(results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> bool:
    """Return whether two results of a call have the same bits."""
    pairs = list(zip(results, expected, strict=True))
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def kernel_times(call: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Return the launches and the microseconds of each kernel in a call, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            times.setdefault(short_name(event.name), []).append(event.device_time)
    return {
        name: (len(samples) / CALLS, statistics.median(samples) * len(samples) / CALLS)
        for name, samples in times.items()
    }


def short_name(name: str) -> str:
    """Return a kernel's name without namespaces, template arguments and parameters.

    The kernels ``run<Kernel>`` and ``run_together<Kernel, ...>`` of csrc/cuda/algebra/launch.h have the names of their
    arguments.
    """
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if match := re.match(r"[\w:]*\brun(?:_together)?<(.*)>\(", plain):
        plain = match[1]
    while plain != (plain := re.sub("<[^<>]*>", "", plain)):  # template arguments, the innermost first
        pass
    kernels = plain.partition("(")[0].split(",")
    return " + ".join(kernel.strip().rpartition("::")[2] for kernel in kernels)[:LONGEST_NAME] or name[:LONGEST_NAME]
