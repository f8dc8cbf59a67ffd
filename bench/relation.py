"""Time and memory of the relation loss, by every backend and by what one would use instead.

    python -m bench relation                               a few sizes, for a CPU: under two minutes
    python -m bench relation --sweep full                  everything
    python -m bench relation --pixels 16384 --dtype bfloat16 --providers eager native

All providers of a case run in one process and take turns, so what is reported of two providers on a shared machine is
the median of ratios of times that were taken side by side. Before that each has to pass a gate: its loss and its
gradient are compared with float64, and a provider that is off gets the reason in place of a number. So does one that
would need more memory than there is; it is not even tried.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import cases, gate, machine, measure, results
from .cases import Case, features, settings
from .providers import PROVIDERS, CannotRun, evaluate

RESULTS = results.FOLDER / "relation.csv"
KEY = (
    "provider", "mode", "pixels", "channels", "batch", "dtype", "precision", "normalize", "distance",
    "device", "threads",
)  # fmt: skip
BASELINES = ("eager", "compile")
SLOW = 10.0  # seconds: a call that takes longer is timed once


@dataclass
class Trial:
    """One provider on one case: a function to time, or why there is none."""

    status: str  # "ok", or "skipped", "out of memory", "failed", "wrong"
    reason: str = ""
    call: Callable[[], object] | None = None
    seconds: float = 0.0  # of one call, once it was warm
    found: gate.Errors | None = None
    samples: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", default=list(PROVIDERS), help="all by default")
    parser.add_argument(
        "--budget", type=float, default=6.0, metavar="SECONDS", help="for a case's rounds (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no further case after so many")
    parser.add_argument("--missing", action="store_true", help="only cases of which nothing is recorded yet")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV", help="%(default)s")


def run(options: argparse.Namespace) -> None:
    """Measure the chosen cases one after the other; each one's rows are written when it is done."""
    began = time.monotonic()
    todo = cases.chosen(options)
    if options.missing:
        recorded = {tuple(row.get(name, "") for name in KEY[1:]) for row in results.read(options.out)}
        todo = [case for case in todo if _identity(case) not in recorded]
    print("Seconds on a shared machine are noisy; what compares is the ratios, of times taken side by side.")
    for number, case in enumerate(todo):
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"\nout of time: {len(todo) - number} of {len(todo)} cases are left, --missing goes on with them")
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
    """A row for every provider.

    Args:
        names: of providers.
        budget: seconds for the rounds of all of them.
        memory: whether to measure it too.
    """
    torch._dynamo.reset()  # a graph for every shape, and no limit of them is reached
    with settings(case):
        ceilings = machine.ceilings(case.device, case.torch_dtype, case.precision, case.threads)
        student, teacher = features(case)
        expected = gate.truth(student, teacher, case)
        trials = {name: attempt(name, case, student, teacher, expected) for name in names}
        timed = {name: trial for name, trial in trials.items() if trial.status == "ok" and trial.seconds < SLOW}
        samples = measure.interleaved(
            {name: trial.call for name, trial in timed.items()},
            {name: trial.seconds for name, trial in timed.items()},
            case.device,
            budget,
        )
        peaks: dict[str, int | None] = {}
        for name, trial in trials.items():
            if trial.status != "ok":
                continue
            trial.samples = samples.get(name) or [trial.seconds]
            if memory and case.device != "cpu":
                peaks[name] = measure.peak_on_gpu(trial.call, case.device)
            elif memory:
                peaks[name] = measure.peak_on_cpu(name, case, warm=trial.seconds < SLOW)
    return [as_row(name, case, trials, peaks.get(name), ceilings) for name in names]


def attempt(name: str, case: Case, student: torch.Tensor, teacher: torch.Tensor, expected: gate.Result) -> Trial:
    """Run a provider for the first time, if it can run, and put what it gives through the gate."""
    provider = PROVIDERS[name]
    if (reason := provider.unavailable_reason(case)) is not None:
        return Trial("skipped", reason)
    needed, free = provider.bytes_needed(case), machine.free_bytes(case.device)
    if needed > free:
        return Trial("out of memory", f"needs at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    try:
        loss = provider.make(case)
        began = time.perf_counter()
        found = gate.judge(loss, case, student, teacher, expected)
        seconds = time.perf_counter() - began
        if (reason := gate.why_wrong(found, case)) is not None:
            return Trial("wrong", reason, found=found)

        call = partial(evaluate, loss, student, teacher, case)
        if seconds < SLOW or provider.compiles:
            # the least of a few, where they cost nothing: a stray long one would leave time for few rounds
            seconds = min(measure.seconds_of(call, case.device) for _ in range(3 if seconds < 0.5 else 1))
        return Trial("ok", "" if seconds < SLOW else "timed once", call, seconds, found)
    except CannotRun as error:
        return Trial("skipped", str(error))
    except Exception as error:  # a peer's failure is a row of the results, not the end of them
        message = " ".join(str(error).split())[:200]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
            return Trial("out of memory", f"it ran out: {message}")
        return Trial("failed", f"{type(error).__name__}: {message}")


def as_row(
    name: str, case: Case, trials: dict[str, Trial], peak: int | None, ceilings: machine.Ceilings
) -> dict[str, Any]:
    """One row of the CSV; the module ``bench.results`` says how it is written."""
    trial = trials[name]
    row: dict[str, Any] = {"provider": name, "device": machine.device_name(case.device), **case.columns()}
    row["device_type"] = torch.device(case.device).type
    floors = case.operations / ceilings.matrix_rate, case.bytes_moved / ceilings.copy_rate
    times = measure.quantiles(trial.samples) if trial.samples else dict.fromkeys(("median_s", "p20_s", "p80_s"))
    row |= {"status": trial.status, "reason": trial.reason, "rounds": len(trial.samples) or None} | times
    for baseline in BASELINES:
        other = trials.get(baseline)
        both = other is not None and trial.samples and other.samples
        row[f"times_faster_than_{baseline}"] = measure.ratio(trial.samples, other.samples) if both else None
    return row | {
        "peak_extra_bytes": peak,
        "needed_bytes": PROVIDERS[name].bytes_needed(case) or None,
        "loss_error": trial.found and trial.found.loss,
        "gradient_error": trial.found and trial.found.gradient,
        "pixel_error": trial.found and trial.found.pixel,
        "matrix_flops": ceilings.matrix_rate,
        "copy_bytes_per_s": ceilings.copy_rate,
        "floor_matrix_s": floors[0],
        "floor_copy_s": floors[1],
        "percent_of_floor": 100 * max(floors) / times["median_s"] if trial.samples else None,
        **machine.versions(),
    }


def describe(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if row["status"] != "ok":
        return f"{row['provider']:<13} {row['status']}: {row['reason']}"
    faster = row["times_faster_than_eager"]
    peak = row["peak_extra_bytes"]
    return (
        f"{row['provider']:<13} {1000 * row['median_s']:10.3f} ms "
        f"({1000 * row['p20_s']:.3f} to {1000 * row['p80_s']:.3f}, {row['rounds']} rounds)"
        + ("" if faster is None else f"  {faster:6.2f} x eager's speed")
        + ("" if peak is None else f"  {peak / 1e6:9.1f} MB")
        + f"  {row['percent_of_floor']:5.1f} % of the floor"
    )
