"""The pages of docs/recipes: their Python code, and the tables and pictures that are written into them.

The first Python block of a page defines ``loss_fn(student_features, teacher_features)``. Later blocks define
``teacher``, ``student``, ``images`` and ``features(network, images)``, and train the student. The benchmark, the tests
and the pictures run the code of the pages, so that it is written only once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "recipes"
Loss = Callable[[Tensor, Tensor], Tensor]


def path(name: str) -> Path:
    """Return the path of a page."""
    return FOLDER / f"{name}.md"


def blocks(name: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", path(name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_blocks(name: str) -> Iterator[dict[str, Any]]:
    """Run the Python blocks of a page in order; yield the names that are defined after each."""
    names: dict[str, Any] = {"__name__": "recipe"}
    for block in blocks(name):
        exec(compile(block, f"{name}.md", "exec"), names)
        yield names


@cache
def loss_of(name: str) -> Loss:
    """Return ``loss_fn`` of a page."""
    return next(run_blocks(name))["loss_fn"]
