"""Time and peak memory of functions.

On a shared machine, the time of a function varies by tens of percent from minute to minute, for all functions alike.
Therefore all providers of a case take turns: each round gives ratios of times that were measured side by side, and the
benchmarks report the median ratio.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from srpkd.checking.processes import exit_with_parent
from srpkd.devices import synchronize

SAMPLE_SECONDS = 5e-3  # minimum duration of a sample on the CPU, far above the cost of reading the clock
ROUNDS = (3, 50)  # minimum and maximum
GRAPH_REPLAYS = 20
HOST_SAMPLES, HOST_CALLS = 9, 5


def seconds_of(function: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Return the seconds of one call by the host's clock, including the work queued on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(
    functions: Mapping[str, Callable[[], object]], estimates: Mapping[str, float], device: str, budget: float
) -> dict[str, list[float]]:
    """Time all functions in rounds; each round starts with the next function.

    Args:
        functions: functions by name, warmed up.
        estimates: approximate seconds of a call.
        budget: seconds for all rounds; the number of rounds stays within ROUNDS.

    Returns:
        Seconds of a call, by name and round.
    """
    if not functions:
        return {}
    names = list(functions)
    repeats = {name: math.ceil(SAMPLE_SECONDS / estimates[name]) for name in names}
    cost = sum(estimates[name] * repeats[name] for name in names)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / cost)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    sample = _gpu_sampler(device) if device != "cpu" else lambda function, n: seconds_of(function, device, n)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(sample(functions[name], repeats[name]))
    return samples


def _gpu_sampler(device: str) -> Callable[[Callable[[], object], int], float]:
    """Return a function that times one call between two events, with a cold L2 cache.

    The host launches the call while the GPU overwrites the cache, so the host's time counts only if it is longer.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def sample(function: Callable[[], object], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return sample


def gpu_seconds(call: Callable[[], object], device: str) -> float | None:
    """Return the seconds that a call takes on a GPU alone: the median over replays of a CUDA graph, with a warm cache.

    None on the CPU, or if the call cannot be captured, for example because it synchronises.
    """
    if device == "cpu":
        return None
    current, stream, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            call()  # warm: captures on another stream need memory of their own
        current.wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except Exception:  # torch, CUDA and the compilers raise different ones
        torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own stream current if the capture fails
        synchronize(device)
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(GRAPH_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1000)
    return statistics.median(samples)


def host_seconds(call: Callable[[], object], device: str) -> float | None:
    """Return the seconds that the host needs to enqueue a call, the median of several; None on the CPU.

    The calls of one sample stay far below the length of the launch queue, where the host would wait for the GPU.
    """
    if device == "cpu":
        return None
    samples = []
    for _ in range(HOST_SAMPLES):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        samples.append((time.perf_counter() - start) / HOST_CALLS)
    synchronize(device)
    return statistics.median(samples)


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the speed relative to the baseline: the median over rounds of paired ratios.

    If the numbers of rounds differ, because a slow function is timed once, it is the ratio of the medians.
    """
    if len(samples) != len(baseline):
        return statistics.median(baseline) / statistics.median(samples)
    return statistics.median(base / own for own, base in zip(samples, baseline))


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentiles, in seconds, as columns."""
    return dict(zip(("median_s", "p20_s", "p80_s"), np.quantile(samples, [0.5, 0.2, 0.8]).tolist()))


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_on_gpu(call: Callable[[], object], device: str) -> int:
    """Return the peak memory of a warm call in addition to its inputs, including its results, by the allocator."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(prepare: Callable[[], Callable[[], object]], threads: int, warm: bool = True) -> int | None:
    """Return the peak memory on the CPU as ``peak_on_gpu`` does, or None on systems other than Linux.

    It is the resident memory of a separate process, which is forked from a server that has no threads: threads do not
    survive a fork.

    Args:
        prepare: function that creates the inputs and returns the call to measure; it must be possible to pickle it.
        threads: CPU threads.
        warm: make the call once before, to exclude what only the first call allocates.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_in_child, args=(sender, prepare, threads, warm))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None  # the process was killed
    process.join()
    return result


def _peak_in_child(sender, prepare: Callable[[], Callable[[], object]], threads: int, warm: bool) -> None:
    exit_with_parent()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        # glibc: return freed arrays to the system, instead of keeping a reserve of unknown size
        m_trim_threshold, m_mmap_threshold = -1, -3
        library.mallopt(m_mmap_threshold, 2**16)
        library.mallopt(m_trim_threshold, 0)
    torch.set_num_threads(threads)
    call = prepare()
    if warm:
        call()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    except OSError:
        sender.send(None)
        return
    before = _status("VmRSS")
    result = call()
    sender.send(_status("VmHWM") - before)
    del result


def _status(key: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{os.getpid()}/status has no {key}")
