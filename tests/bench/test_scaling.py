"""The command ``python -m bench scaling``."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import results, scaling


def test_exponents(recorded, capsys):
    found = {(fit.row["provider"], fit.measure): fit.exponent for fit in scaling.fits(results.read(recorded))}
    expected = {("eager", "time"): 2, ("native", "time"): 2, ("eager", "memory"): 2, ("native", "memory"): 1}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    run("scaling", "--csv", recorded)
    assert "N^2.00   over N = 1024, 2048, 4096" in capsys.readouterr().out
