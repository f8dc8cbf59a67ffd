"""The command ``python -m bench plot``."""

from __future__ import annotations

from bench_helpers import run

from bench import plot
from bench.providers import PROVIDERS


def test_plot(recorded, capsys):
    run("plot", "--csv", recorded)
    (picture,) = recorded.parent.glob("*.png")
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(plot.STYLES) == set(PROVIDERS)
