"""The command ``python -m bench plot``."""

from __future__ import annotations

import pytest
from bench_helpers import run

from bench import plot, results
from bench.markers import between_markers
from bench.providers import PROVIDERS


def test_plot(recorded, capsys):
    run("plot", "--csv", recorded)
    (picture,) = recorded.parent.glob("*.png")
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(plot.STYLES) == set(PROVIDERS)


def test_lines_are_those_of_the_rows(recorded):
    """In ms and MB; hollow markers at the memory that would be needed."""
    rows = results.read(recorded)
    for row in rows:
        if row["provider"] == "chunked":  # which ran out of memory
            row["needed_bytes"] = str(1000 * int(row["pixels"]))
    (found,) = plot.recorded_plots(rows[::-1], [])
    time, memory = (
        {line.get_label(): list(zip(*line.get_data())) for line in axes.lines} for axes in found.draw(found).axes
    )
    sizes = (1024, 2048, 4096)
    assert time.keys() == {"eager", "compile", "native", "roofline"}
    for name, seconds in (("eager", 4e-8), ("compile", 2e-8), ("native", 5e-9)):
        assert time[name] == [(size, pytest.approx(1e3 * seconds * size**2, rel=1e-5)) for size in sizes]
    roofline = {int(row["pixels"]): float(row["roofline_matmul_s"]) for row in rows}
    assert time["roofline"] == [(size, pytest.approx(1e3 * roofline[size])) for size in sizes]
    assert memory.pop("native") == [(size, pytest.approx(1e-3 * size)) for size in sizes]
    assert memory.pop("eager") == [(size, pytest.approx(24e-6 * size**2)) for size in sizes]
    assert list(memory.values()) == [[(size, pytest.approx(1e-3 * size)) for size in sizes]]


def test_images_of_a_page(recorded, tmp_path):
    page = tmp_path / "docs.md"
    page.write_text("before\n<!-- bench plot: begin -->\n<!-- bench plot: end -->\nafter\n")
    run("plot", "--csv", recorded, "--page", page)
    (picture,) = (tmp_path / "docs").glob("*.png")
    shown = between_markers(page, plot.NAME)
    assert shown.startswith("![row, l1, ") and shown.endswith(f"](docs/{picture.name})") and "\n" not in shown
