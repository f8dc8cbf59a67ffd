"""The command ``python -m bench scaling``."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import relation, results, scaling


def test_exponents(recorded, capsys):
    found = {(fit.row["provider"], fit.measure): fit.exponent for fit in scaling.fits(results.read(recorded))}
    expected = {("eager", "time"): 2, ("native", "time"): 2, ("eager", "memory"): 2, ("native", "memory"): 1}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    run("scaling", "--csv", recorded)
    text = capsys.readouterr().out
    assert "\nmode forward+backward, channels 64/256, batch 1, dtype float32, " in text
    assert "N^2.00   over N = 1024, 2048, 4096" in text


def test_sizes_that_do_not_count(tmp_path, recorded):
    """Below 1,024 pixels constant costs dominate; fewer than three sizes give no exponent."""
    rows = results.read(recorded)
    small = [row | {"pixels": "256", "median_s": "1"} for row in rows if row["pixels"] == "1024" and row["median_s"]]
    assert scaling.fits(rows + small) == scaling.fits(rows) != []
    few = tmp_path / "few.csv"
    results.upsert(few, small + [row for row in rows if row["pixels"] != "4096"], relation.KEY)
    with pytest.raises(SystemExit, match="no case is recorded for three sizes: run python -m bench relation first"):
        run("scaling", "--csv", few)
