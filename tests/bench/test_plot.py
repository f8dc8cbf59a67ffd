"""The command ``python -m bench plot``."""

from __future__ import annotations

from bench_helpers import run

from bench import plot
from bench.markers import between_markers
from bench.providers import PROVIDERS


def test_plot(recorded, capsys):
    run("plot", "--csv", recorded)
    (picture,) = recorded.parent.glob("*.png")
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(plot.STYLES) == set(PROVIDERS)


def test_images_of_a_page(recorded, tmp_path):
    page = tmp_path / "docs.md"
    page.write_text("before\n<!-- bench plot: begin -->\n<!-- bench plot: end -->\nafter\n")
    run("plot", "--csv", recorded, "--page", page)
    (picture,) = (tmp_path / "docs").glob("*.png")
    shown = between_markers(page, plot.NAME)
    assert shown.startswith("![row, l1, ") and shown.endswith(f"](docs/{picture.name})") and "\n" not in shown
