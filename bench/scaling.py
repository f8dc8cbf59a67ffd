"""Exponents of the recorded times and memory in the number of pixels and the batch size, by log-log regression.

    python -m bench scaling

Time that grows as N^2 has exponent 2. Memory must have an exponent of at most 1, except for what stores N x N arrays:
eager PyTorch, torch.compile and the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import relation, results
from .results import Row

MEASURES = {"time": "median_s", "memory": "peak_extra_bytes"}
AXES = {"pixels": "N", "batch": "B"}
# below these sizes, constant costs dominate: starting threads, launching kernels, blocks of a fixed size
MINIMUM = {"pixels": 1024, "batch": 1}


class Fit(NamedTuple):
    """A fit value ~ axis ** exponent for one provider, all other columns fixed."""

    measure: str
    axis: str
    exponent: float
    points: list[int]
    row: Row  # one of the fitted rows, for the fixed columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results.add_csv(parser, relation.RESULTS, relation.COLUMNS)


def run(options: argparse.Namespace) -> None:
    """Print the exponents of all groups with at least three recorded points."""
    found = fits(results.read(options.csv))
    if not found:
        raise ValueError(f"{options.csv}: no case is recorded for three sizes: run python -m bench relation first")
    groups: dict[str, list[Fit]] = {}
    for fit in found:
        fixed = (f"{name} {fit.row[name]}" for name in relation.KEY[1:] if name != fit.axis)
        groups.setdefault(", ".join(fixed), []).append(fit)
    for label, group in groups.items():
        print(f"\n{label}")
        for fit in group:
            axis = AXES[fit.axis]
            sizes = ", ".join(map(str, fit.points))
            print(f"  {fit.row['provider']:<12} {fit.measure:<6} ~ {axis}^{fit.exponent:.2f}   over {axis} = {sizes}")


def fits(rows: Sequence[Row]) -> list[Fit]:
    """Fit time and memory against N and B, for all groups with at least three recorded points."""
    found = []
    for measure, column in MEASURES.items():
        for axis in AXES:
            usable = [row for row in rows if results.number(row, column) and int(row[axis]) >= MINIMUM[axis]]
            fixed = [name for name in relation.KEY if name != axis]
            for group in results.group_by(usable, fixed).values():
                points = sorted((int(row[axis]), float(row[column])) for row in group)
                if len(points) >= 3:
                    sizes, values = zip(*points)
                    exponent = np.polyfit(np.log(sizes), np.log(values), 1)[0]
                    found.append(Fit(measure, axis, float(exponent), list(sizes), group[0]))
    return found
