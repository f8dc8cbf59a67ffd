"""The recorded results of this repository."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT

from bench import cases, providers, relation, results, scaling, table, train
from srpkd.kernels import BACKENDS, Relation, auto_backend, dispatch, native

RECORDED = results.read(relation.RESULTS)
needs_results = pytest.mark.skipif(not RECORDED, reason=f"{relation.RESULTS.name} has no rows")


def test_readme_contains_the_recorded_results():
    shown = table.block(ROOT / "README.md")
    assert shown == table.tables(RECORDED, results.read(train.RESULTS)), "run python -m bench table --readme README.md"


@needs_results
def test_auto_chooses_well_for_every_recorded_shape(monkeypatch):
    """``auto`` takes at most 1.3 times as long as the best recorded backend.

    Compared are speeds relative to eager where recorded, because absolute times are noisy. The reference does not
    count: ``auto`` avoids its N x N arrays.
    """
    groups: dict[tuple[str, ...], dict[str, results.Row]] = {}
    for row in RECORDED:
        if row["status"] == "ok" and row["provider"] in BACKENDS and row["provider"] != "reference":
            groups.setdefault(tuple(row[name] for name in relation.KEY[1:]), {})[row["provider"]] = row
    slow = []
    for key, rows in groups.items():
        monkeypatch.setattr(
            dispatch, "unavailable_reason", lambda name, device, rows=rows: None if name in rows else "absent"
        )
        monkeypatch.setattr(native, "is_built", lambda device, rows=rows: "native" in rows)
        some = next(iter(rows.values()))
        choice = auto_backend(
            torch.device(some["device_type"]),
            Relation(some["normalize"], some["distance"]),
            getattr(torch, some["dtype"]),
            int(some["pixels"]),
            cases._channels(some["channels"]),
        )
        speed = {
            name: results.number(row, "times_faster_than_eager") or 1 / results.number(row, "median_s")
            for name, row in rows.items()
        }
        best = max(speed, key=speed.get)
        if choice in rows and 1.3 * speed[choice] < speed[best]:
            slow.append(f"{choice} instead of {best}: {dict(zip(relation.KEY[1:], key))}")
    assert not slow, "\n".join(slow)


@needs_results
def test_recorded_memory_is_linear_in_pixels():
    ours = [
        fit
        for fit in scaling.fits(RECORDED)
        if (fit.measure, fit.axis) == ("memory", "pixels") and fit.row["provider"] in providers.OURS
    ]
    assert all(fit.exponent < 1.25 for fit in ours), [(fit.row["provider"], fit.exponent, fit.points) for fit in ours]
