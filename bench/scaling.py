"""How recorded times and memory grow: exponents of pixels and of images, fitted in logarithms.

    python -m bench scaling

A time of about N^2 has exponent 2; the memory of anything but eager PyTorch and the reference has to be linear, 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import relation, results
from .results import Row

MEASURES = {"time": "median_s", "memory": "peak_extra_bytes"}
AXES = {"pixels": "N", "batch": "B"}
# below, what does not depend on the axis is most of it: starting threads, launching kernels, blocks of a fixed size
LEAST = {"pixels": 1024, "batch": 1}


class Fit(NamedTuple):
    """value ~ axis ** exponent of one provider, all else fixed."""

    measure: str
    axis: str
    exponent: float
    points: list[int]
    row: Row  # one of those fitted: what is fixed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=relation.RESULTS, help="%(default)s")


def run(options: argparse.Namespace) -> None:
    """Print every exponent that three recorded points or more allow."""
    found = fits(results.read(options.csv, relation.KEY))
    if not found:
        raise ValueError(f"{options.csv} records no three sizes of anything: run python -m bench relation first")
    groups: dict[str, list[Fit]] = {}
    for fit in found:
        fixed = (f"{name} {fit.row[name]}" for name in relation.KEY[1:] if name != fit.axis)
        groups.setdefault(", ".join(fixed), []).append(fit)
    for fixed, group in groups.items():
        print(f"\n{fixed}")
        for fit in group:
            axis = AXES[fit.axis]
            sizes = ", ".join(map(str, fit.points))
            print(f"  {fit.row['provider']:<12} {fit.measure:<6} ~ {axis}^{fit.exponent:.2f}   over {axis} = {sizes}")


def fits(rows: Sequence[Row]) -> list[Fit]:
    """The exponents of time and memory against N and against B, wherever three points are recorded."""
    found = []
    for measure, column in MEASURES.items():
        for axis in AXES:
            groups: dict[tuple[str, ...], list[Row]] = {}
            for row in rows:
                if (results.number(row, column) or 0) > 0 and int(row[axis]) >= LEAST[axis]:
                    groups.setdefault(tuple(row[name] for name in relation.KEY if name != axis), []).append(row)
            for group in groups.values():
                points = sorted((int(row[axis]), results.number(row, column)) for row in group)
                if len(points) >= 3:
                    logarithms = [[math.log(value) for value in point] for point in points]
                    exponent = np.polyfit(*zip(*logarithms), 1)[0]
                    found.append(Fit(measure, axis, float(exponent), [size for size, _ in points], group[0]))
    return found
