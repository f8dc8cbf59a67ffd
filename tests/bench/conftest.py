"""What all tests of the benchmarks use: one thread, and invented results of the relation benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_helpers import relation_rows

from bench import relation, results


@pytest.fixture(autouse=True)
def small_arrays(one_thread) -> None:
    """Use one thread in all of these tests: their arrays are small."""


@pytest.fixture
def recorded(tmp_path) -> Path:
    path = tmp_path / "relation.csv"
    results.upsert(path, relation_rows(), relation.KEY)
    return path
