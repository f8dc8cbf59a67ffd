"""The command ``python -m bench columns``, and its table in the documentation."""

from __future__ import annotations

import pytest
import torch
from bench_helpers import run
from helpers import ROOT

from bench import columns, measure, results
from bench.markers import between_markers
from srpkd import relation_loss


def test_rows_and_table_are_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {columns.NAME}: begin -->\n<!-- {columns.NAME}: end -->\n")
    out = tmp_path / "columns.csv"
    small = ("--sizes", 20, "--columns", 8, 32, "--channels", "4/6", "--draws", 12, "--repeats", 1)
    run("columns", *small, "--device", "cpu", "--out", out, "--page", page)
    rows = results.read(out)
    assert [(row["normalize"], row["columns"]) for row in rows] == [
        ("cosine", "8"), ("cosine", "32"), ("row", "8"), ("row", "32"),
    ]  # fmt: skip
    assert all(float(row["times_faster"]) > 0 for row in rows)
    few, many = rows[:2]
    for name in ("loss", "weights", "features"):  # the spread falls with the root of m
        assert 1.2 < float(few[f"{name}_spread"]) / float(many[f"{name}_spread"]) < 4
    assert between_markers(page, columns.NAME) == columns.table(rows)
    assert "4/6 channels" in page.read_text("utf-8")


def test_without_a_page_the_table_is_printed(tmp_path, capsys):
    small = ("--sizes", 4, "--columns", 3, "--channels", "2/2", "--draws", 1, "--repeats", 1, "--device", "cpu")
    run("columns", *small, "--normalize", "row", "--out", tmp_path / "columns.csv")
    assert "| 16 | row | 3 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected the markers"):
        run("columns", *small, "--out", tmp_path / "new.csv", "--page", tmp_path / "columns.csv")
    assert not (tmp_path / "new.csv").exists(), "the page is checked before anything is measured"


@pytest.mark.parametrize("column", ["device", "channels", "draws"])
def test_what_the_note_names_is_kept_apart(column):
    rows = results.read(columns.RESULTS)
    text = columns.table(rows + [row | {column: "another", "times_faster": "123"} for row in rows])
    parts = text.split("| N |")[1:]
    assert ["another" in part for part in parts] == ["123.0" in part for part in parts] == [False, True]


def test_speeds_are_those_of_estimates(monkeypatch):
    """Exact losses take six seconds here, estimates two."""
    clock = [10.0]

    def loss(student, teacher, *, columns, generator, **options):
        clock[0] += 6.0 if columns is None else 2.0
        assert (generator is None) == (columns is None), "results must be reproducible"
        return relation_loss(student, teacher, columns=columns, generator=generator, **options)

    monkeypatch.setattr(columns, "relation_loss", loss)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    (row,) = columns.measure(4, (2, 3), "row", [5], draws=2, repeats=1, device="cpu")
    assert row["times_faster"] == 3.0 and row["pixels"] == 16 and row["channels"] == "2/3"


def test_spread_is_the_relative_deviation():
    exact = {"loss": torch.tensor(2.0), "features": torch.tensor([3.0, 4.0]), "weights": torch.tensor([5.0])}
    moved = exact | {"loss": torch.tensor(2.2), "features": torch.tensor([3.0, 5.0])}
    expected = {"loss": 0.1 / 2**0.5, "features": 0.2 / 2**0.5, "weights": 0}
    assert columns.spread([exact, moved], exact) == pytest.approx(expected)


def test_the_page_contains_the_recorded_rows():
    rows = results.read(columns.RESULTS)
    assert {row["pixels"] for row in rows} == {"4096", "65536"}
    page = between_markers(ROOT / "docs" / "sampled-columns.md", columns.NAME)
    assert page == columns.table(rows), "run python -m bench columns --page docs/sampled-columns.md"
