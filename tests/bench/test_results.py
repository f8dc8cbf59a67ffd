"""Results as CSV files."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest
from bench_helpers import run

from bench import results
from bench.__main__ import COMMANDS


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
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.csv"] and b"\r" not in path.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "line 3: expected 2 cells: fix or remove the line"),
        ("a,b\n1,2,3\n", "line 2: expected 2 cells"),
        ("b,c\n1,2\n", "the columns a are missing"),
        ("", "the columns a are missing"),
        ("a,b\n1,\udcff\n", r"rows\.csv cannot be read as CSV: 'utf-8' codec"),
        pytest.param(f"a,b\n1,{'2' * 200_000}\n", r"rows\.csv cannot be read as CSV: field larger", id="a long cell"),
    ],
)
def test_a_file_that_is_not_complete_is_not_changed(text, message, tmp_path):
    content = text.encode(errors="surrogateescape")
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        results.upsert(tmp_path / "rows.csv", [{"a": 1, "b": 2}], ["a"])
    assert (tmp_path / "rows.csv").read_bytes() == content


OTHER = {  # command -> a file of another command
    "relation": "accuracy", "accuracy": "relation", "train": "columns", "columns": "train", "recipes": "relation",
}  # fmt: skip


@pytest.mark.parametrize("command", OTHER)
def test_the_file_is_checked_before_anything_is_measured(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(command, "--out", results.FOLDER / f"{OTHER[command]}.csv")
    assert "argument --out: " in (message := capsys.readouterr().err) and "are missing" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_may_begin_with_the_home_folder(command, tmp_path, monkeypatch):
    """A shell leaves ~ in --out=~/a.csv. If only the writer expanded it, each write would lose the earlier rows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    import_module(f"bench.{command}").add_arguments(parser := argparse.ArgumentParser())
    for action in parser._actions:
        if action.metavar in ("CSV", "DIR", "FILE", "OUT", "RUN") or action.dest == "runs_dir":
            assert action.type("~/a.csv") == tmp_path / "a.csv", action.dest
