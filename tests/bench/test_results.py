"""Results as CSV files."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import results


def test_rows_are_upserted_by_key(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    assert results.read(path) == []
    results.upsert(path, [{"a": 1, "b": None}, {"a": 2, "b": 0.12345678}], ["a"])
    results.upsert(path, [{"a": 1, "b": "x, y", "c": True}, {"a": 3, "b": 0}], ["a"])
    assert results.read(path) == [
        {"a": "1", "b": "x, y", "c": "True"}, {"a": "2", "b": "0.123457", "c": ""}, {"a": "3", "b": "0", "c": ""},
    ]  # fmt: skip
    assert [results.number(row, "b") for row in results.read(path)[1:]] == [0.123457, 0.0]
    assert results.number({"a": ""}, "a") is None
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("command", ["plot", "scaling", "table"])
def test_missing_results(command, tmp_path):
    with pytest.raises(SystemExit, match="python -m bench relation"):
        run(command, "--csv", tmp_path / "none.csv")
