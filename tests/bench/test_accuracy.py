"""The command ``python -m bench accuracy``, and its plot."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import results


@pytest.mark.core(0)
def test_errors_are_measured_and_drawn(tmp_path):
    run("accuracy", "--pixels", 24, "--channels", 4, "--device", "cpu", "--out", tmp_path / "accuracy.csv")
    rows = results.read(tmp_path / "accuracy.csv")
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {"eager", "blocked"} <= {row["provider"] for row in rows}
    run("plot", "--csv", tmp_path / "relation.csv")
    (picture,) = tmp_path.glob("accuracy-row-l1-24-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
