"""Time and memory of the relation loss: srpkd's backends and their alternatives in PyTorch.

    python -m bench relation                               a few sizes, less than two minutes on a CPU
    python -m bench relation --sweep full                  all sizes and options
    python -m bench relation --pixels 16384 --dtype bfloat16 --providers eager native

All providers of a case run in one process and take turns; relative speeds are medians of ratios of times that were
measured side by side, which are reliable on a shared machine. A provider is timed only if its loss and its gradient
agree with float64 and if it fits into memory; otherwise its row contains the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from srpkd.checking import gate
from srpkd.checking.cases import Case, features, settings
from srpkd.checking.kernels import CannotRun, evaluate
from srpkd.devices import is_out_of_memory
from srpkd.kernels import measured

from . import cases, machine, measure, results
from .providers import DEFAULT, PROVIDERS, add_option, bytes_needed, prepare_call

RESULTS = results.FOLDER / "relation.csv"
KEY = (
    "provider", "mode", "pixels", "channels", "batch", "dtype", "precision", "normalize", "distance",
    "device", "threads",
)  # fmt: skip
COLUMNS = (*KEY, "device_type", "status", "median_s", "torch", "commit")  # of every row; others may be missing
BASELINES = ("eager", "compile")
SLOW = 10.0  # seconds; a longer call is timed once


@dataclass
class Trial:
    """A provider on a case.

    Attributes:
        status: "ok", or "skipped", "out of memory", "failed" or "wrong" for a provider that is not timed.
        reason: reason of the status.
        call: function to time; only used if the status is "ok".
        seconds: seconds of one warm call.
        found: relative errors, None if the provider gave no result.
        samples: seconds of a call by round.
        gpu, host: seconds of a call on the GPU alone, and of the host to enqueue it; None on the CPU.
        peak: bytes of one call in addition to its inputs; None if they are not measured.
    """

    status: str
    reason: str = ""
    call: Callable[[], object] = field(default=lambda: None)
    seconds: float = 0.0
    found: gate.Errors | None = None
    samples: list[float] = field(default_factory=list)
    gpu: float | None = None
    host: float | None = None
    peak: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    add_option(parser, DEFAULT, "all without the kernels that are selected by name")
    cases.add_budget(parser, 6.0, "time per case")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no case after this time")
    parser.add_argument("--missing", action="store_true", help="skip cases of which all providers are recorded")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    results.add_csv(parser, RESULTS, COLUMNS, "--out")


def run(options: argparse.Namespace) -> None:
    """Measure the selected cases, and write the rows of each case when it is complete."""
    start = time.monotonic()
    todo = cases.selected(options)
    if options.missing:
        recorded = {tuple(row[name] for name in KEY) for row in results.read(options.out)}
        todo = [case for case in todo if any((name, *_identity(case)) not in recorded for name in options.providers)]
    print("Times on a shared machine are noisy: compare the ratios, which are measured side by side.")
    for number, case in enumerate(todo):
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            print(f"\nout of time: {len(todo) - number} of {len(todo)} cases are left; resume with --missing")
            break
        print(f"\n[{number + 1}/{len(todo)}] {case.describe()}", flush=True)
        rows = measure_case(case, options.providers, options.budget, not options.no_memory)
        results.upsert(options.out, rows, KEY)
        for row in rows:
            print("  " + describe(row), flush=True)
    print(f"\n{options.out}")


def _identity(case: Case) -> tuple[str, ...]:
    columns = case.columns() | {"device": machine.device_name(case.device)}
    return tuple(str(columns[name]) for name in KEY[1:])


def measure_case(case: Case, names: list[str], budget: float, memory: bool) -> list[dict[str, Any]]:
    """Measure the providers `names` and return a row for each.

    Args:
        names: names of providers.
        budget: seconds for the rounds of all providers.
        memory: measure the peak memory too.
    """
    torch._dynamo.reset()  # the number of graphs per function is limited
    with settings(case):
        peak_rates = machine.peak_rates(case.device, case.torch_dtype, case.precision, case.threads)
        student, teacher = features(case)
        expected = gate.float64_result(student, teacher, case)
        trials = {name: prepare(name, case, student, teacher, expected) for name in names}
        right = {name: trial for name, trial in trials.items() if trial.status == "ok"}
        seconds = {name: trial.seconds for name, trial in right.items() if trial.seconds < SLOW}
        samples = measure.interleaved({name: right[name].call for name in seconds}, seconds, case.device, budget)
        for name, trial in right.items():
            trial.samples = samples.get(name) or [trial.seconds]
            trial.host = measure.host_seconds(trial.call, case.device)
            trial.gpu = measure.gpu_seconds(trial.call, case.device)
            if memory and case.device != "cpu":
                trial.peak = measure.peak_on_gpu(trial.call, case.device)
            elif memory:
                trial.peak = measure.peak_on_cpu(partial(prepare_call, name, case), case.threads, warm=name in seconds)
    return [as_row(name, case, trials, peak_rates) for name in names]


def prepare(name: str, case: Case, student: torch.Tensor, teacher: torch.Tensor, expected: gate.Result) -> Trial:
    """Run a provider for the first time, if it is available, and check its result."""
    provider = PROVIDERS[name]
    if (reason := provider.unavailable_reason(case)) is not None:
        return Trial("skipped", reason)
    needed, free = bytes_needed(name, case), machine.free_bytes(case.device)
    if needed > free:
        return Trial("out of memory", f"needs at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    try:
        loss = provider.make(case)
        start = time.perf_counter()
        found = gate.measure_errors(name, loss, case, student, teacher, expected)
        seconds = time.perf_counter() - start
        if (reason := gate.failure_reason(found, case)) is not None:
            return Trial("wrong", reason, found=found)

        call = partial(evaluate, loss, student, teacher, case)
        if seconds < SLOW or name == "compile":  # whose first call compiles
            # the minimum of a few fast calls: one slow outlier would reduce the number of rounds
            seconds = min(measure.seconds_of(call, case.device) for _ in range(3 if seconds < 0.5 else 1))
        return Trial("ok", "" if seconds < SLOW else "timed once", call, seconds, found)
    except CannotRun as error:
        return Trial("skipped", str(error))
    except Exception as error:  # the failure of a peer must not stop the benchmark
        message = " ".join(str(error).split())[:200]
        if is_out_of_memory(error):
            return Trial("out of memory", message)
        return Trial("failed", f"{type(error).__name__}: {message}")


def as_row(name: str, case: Case, trials: dict[str, Trial], peak_rates: machine.PeakRates) -> dict[str, Any]:
    """Return the row of a provider, as ``bench.results`` writes it."""
    trial = trials[name]
    row: dict[str, Any] = {"provider": name, "device": machine.device_name(case.device), **case.columns()}
    row |= {"device_type": torch.device(case.device).type, "capability": machine.capability(case.device)}
    row["kernel_version"] = measured.kernel_version(name, case.dtype) if case.device != "cpu" else None
    rooflines = cases.operations(case) / peak_rates.matrix_flops, cases.bytes_moved(case) / peak_rates.copy_bytes
    row |= {"status": trial.status, "reason": trial.reason, "rounds": len(trial.samples) or None}
    times = measure.quantiles(trial.samples) if trial.samples else {}
    row |= {column: times.get(column) for column in ("median_s", "p20_s", "p80_s")}
    row |= {"gpu_s": trial.gpu, "host_s": trial.host}
    for baseline in BASELINES:
        base = trials[baseline].samples if baseline in trials else []
        both = trial.samples and base
        row[f"times_faster_than_{baseline}"] = measure.ratio(trial.samples, base) if both else None
    return row | {
        "peak_extra_bytes": trial.peak,
        "needed_bytes": bytes_needed(name, case) or None,
        "loss_error": trial.found and trial.found.loss,
        "gradient_error": trial.found and trial.found.gradient,
        "pixel_error": trial.found and trial.found.pixel,
        "matrix_flops": peak_rates.matrix_flops,
        "copy_bytes_per_s": peak_rates.copy_bytes,
        "roofline_matmul_s": rooflines[0],
        "roofline_copy_s": rooflines[1],
        "percent_of_roofline": 100 * max(rooflines) / times["median_s"] if times else None,
        **machine.versions(),
    }


def describe(row: dict[str, Any], baseline: str = "eager") -> str:
    """Format a row for the terminal, with the speed relative to one of the providers."""
    if row["status"] != "ok":
        return f"{row['provider']:<13} {row['status']}: {row['reason']}"
    columns = (f"times_faster_than_{baseline}", "peak_extra_bytes", "percent_of_roofline")
    faster, peak, percent = map(row.get, columns)
    return (
        f"{row['provider']:<13} {1000 * row['median_s']:10.3f} ms "
        f"({1000 * row['p20_s']:.3f} to {1000 * row['p80_s']:.3f}, {row['rounds']} rounds)"
        + "".join(f"  {name} {1000 * row[f'{name}_s']:.3f} ms" for name in ("gpu", "host") if row.get(f"{name}_s"))
        + ("" if faster is None else f"  {faster:6.2f} x {baseline}'s speed")
        + ("" if peak is None else f"  {peak / 1e6:9.1f} MB")
        + ("" if percent is None else f"  {percent:5.1f} % of roofline")
    )
