"""Time and memory of the recipes in docs/recipes: the public code of each method against srpkd's loss.

    python -m bench recipes                          measure all
    python -m bench recipes --only nst --budget 10   measure one, for longer
    python -m bench recipes --tables                 write the tables of the pages from the recorded results
    python -m bench recipes --pictures               run the code of the pages, and draw their pictures

A call computes the loss and the gradient of the student's features, in float32. The two take turns; the speed is the
median of ratios of times that were measured side by side. Each is timed only if it agrees with float64.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cases, machine, measure, relation, results
from bench.markers import put_between_markers
from srpkd.checking import gate
from srpkd.checking.cases import Case
from srpkd.checking.kernels import poisoned_memory
from srpkd.devices import is_out_of_memory

from . import pages, tables
from .catalogue import CASES, RECIPES, RecipeCase, as_tokens, value_and_gradient

RESULTS = results.FOLDER / "recipes.csv"
KEY = ("recipe", "shapes", "provider", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", choices=RECIPES, nargs="+", default=list(RECIPES), metavar="RECIPE", help="default: all"
    )
    cases.add_budget(parser, 4.0, "time per case")
    cases.add_device(parser)
    results.add_csv(parser, RESULTS, KEY, "--out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--tables", action="store_true", help="measure nothing, write the tables of the pages")
    instead.add_argument("--pictures", action="store_true", help="measure nothing, draw the pictures of the pages")


def run(options: argparse.Namespace) -> None:
    """Measure the recipes, or write the tables of their pages, or draw their pictures."""
    if options.pictures:
        from .pictures import draw  # here: the code of the pages needs timm and diffusers

        for name in options.only:
            print(draw(name))
        return
    if options.tables:
        for name, text in tables.texts(results.read(options.out)).items():
            put_between_markers(pages.path(name), tables.NAME, text)
        print(pages.FOLDER)
        return
    device = cases.device_of(options)
    for case in CASES:
        if case.recipe in options.only:
            print(f"{case.recipe}: {case.words}", flush=True)
            rows = measure_case(case, device, options.budget)
            results.upsert(options.out, rows, KEY)
            for row in rows:
                print("  " + relation.describe(row, "usual"), flush=True)
    print(options.out)


def measure_case(case: RecipeCase, device: str, budget: float) -> list[dict[str, Any]]:
    """Measure the public code and srpkd's loss, and return a row for each.

    Args:
        budget: seconds for the rounds of both.
    """
    student, teacher = case.features(device)
    value, gradient = case.expected()
    assert gradient is not None
    expected = gate.Result(value.to(device), gradient.to(device))
    identity: dict[str, Any] = {"recipe": case.recipe, "shapes": case.key, "device": machine.device_name(device)}
    identity |= {"threads": torch.get_num_threads(), "device_type": device}
    rows: dict[str, dict[str, Any]] = {}
    calls, seconds = {}, {}
    for name, loss in case.losses().items():
        call = partial(value_and_gradient, loss, student, teacher)
        rows[name] = {**identity, "provider": name, **check(case, name, call, expected)}
        if rows[name]["status"] == "ok":
            calls[name], seconds[name] = call, rows[name].pop("seconds")
    fast = {name: call for name, call in calls.items() if seconds[name] < relation.SLOW}
    samples = measure.interleaved(fast, seconds, device, budget)
    samples |= {name: [seconds[name]] for name in calls if name not in fast}
    for name, row in rows.items():
        own, usual = samples.get(name, []), samples.get("usual")
        row |= {"rounds": len(own) or None, **(measure.quantiles(own) if own else {})}
        row["times_faster_than_usual"] = measure.ratio(own, usual) if own and usual else None
        if name in calls and device == "cpu":
            prepare = partial(prepare_call, case, name)
            row["peak_extra_bytes"] = measure.peak_on_cpu(prepare, torch.get_num_threads(), warm=name in fast)
        elif name in calls:
            row["peak_extra_bytes"] = measure.peak_on_gpu(calls[name], device)
        row |= machine.versions()
    return list(rows.values())


def check(case: RecipeCase, name: str, call: partial[tuple[Tensor, Tensor]], expected: gate.Result) -> dict[str, Any]:
    """Run a provider once, if it fits into memory, and compare it with float64; return the columns of its status."""
    device = call.args[1].device.type
    needed, free = case.needed_bytes(name), machine.free_bytes(device)
    columns: dict[str, Any] = {"needed_bytes": needed or None}
    if needed > free:
        reason = f"needs at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return columns | {"status": "out of memory", "reason": reason}
    try:
        with poisoned_memory():
            value, gradient = call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return columns | {"status": "out of memory", "reason": " ".join(str(error).split())[:200]}
    found = gate.relative_errors(gate.Result(value, as_tokens(gradient)), expected)
    columns |= {"loss_error": found.loss, "gradient_error": found.gradient, "pixel_error": found.pixel}
    if (failure := gate.failure_reason(found, Case(device=device))) is not None:
        return columns | {"status": "wrong", "reason": failure}
    del value, gradient
    seconds = measure.seconds_of(call, device)
    return columns | {"status": "ok", "reason": "" if seconds < relation.SLOW else "timed once", "seconds": seconds}


def prepare_call(case: RecipeCase, name: str) -> partial[tuple[Tensor, Tensor]]:
    """Return a call of a provider on the CPU, for ``measure.peak_on_cpu``."""
    return partial(value_and_gradient, case.losses()[name], *case.features())
