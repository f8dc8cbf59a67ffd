"""The command ``python -m bench accuracy``."""

from __future__ import annotations

from bench_helpers import run

from bench import results


def test_errors_and_plot_are_written(tmp_path):
    run("accuracy", "--pixels", 24, "--channels", 4, "--device", "cpu", "--out", tmp_path / "accuracy.csv")
    rows = results.read(tmp_path / "accuracy.csv")
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {"eager", "blocked"} <= {row["provider"] for row in rows}
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
