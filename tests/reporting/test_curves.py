"""The curves of a run's metrics."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from example_run import Page, metrics_line

from srpkd.reporting import curves
from srpkd.reporting.curves import MetricsReader
from srpkd.reporting.page import write_report


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    lines = [metrics_line("teacher", step, D=1 / step) for step in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + lines[-1][:-9])
    page = Page(write_report(tmp_path))
    assert "last logged step: 9 of teacher" in page.text
    assert "Invalid lines" not in page.text


def test_omitted_values_become_remarks(tmp_path: Path) -> None:
    lines = [metrics_line("teacher", step, D=float("nan") if step in (3, 5) else 0.1) for step in range(1, 10)]
    lines[6:6] = ["\n", "no json\n", '"text"\n', '{"stage": "teacher"}\n', "\N{SNOWMAN}\udcff\n"]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    text = Page(write_report(tmp_path)).text
    assert "D of teacher is not finite at 2 of 9 points, first at step 3;" in text
    assert "Invalid lines in metrics.jsonl: 4." in text


def test_seeds_of_a_variant_share_a_colour_and_a_bold_mean() -> None:
    steps = np.arange(1.0, 101.0)
    stages = {f"srp seed {k}": np.stack([steps, 0 * steps + k]) for k in range(3)}
    stages["teacher"] = np.stack([steps, steps])
    axes = curves._curve("D", stages, {"srp": "#0072B2", "teacher": "#555555"}, sparse=False).axes[0]
    raw, bold = axes.lines[:4], axes.lines[4:]
    assert [line.get_color() for line in raw] == ["#0072B2"] * 3 + ["#555555"]
    assert [(line.get_label(), line.get_color()) for line in bold] == [("srp", "#0072B2"), ("teacher", "#555555")]
    np.testing.assert_allclose(bold[0].get_ydata(), 1.0)  # the mean of 0, 1 and 2
    assert max(line.get_alpha() for line in raw) < 0.5 and bold[0].get_linewidth() > raw[0].get_linewidth()


def test_axis_scales() -> None:
    steps = np.arange(1.0, 101.0)
    colours = {"teacher": "k", "srp": "b"}

    def scales(values: np.ndarray, sparse: bool = False, teacher: int = 1) -> tuple[str, str]:
        stages = {"teacher": np.stack([steps * teacher, values]), "srp": np.stack([steps, values])}
        axes = curves._curve("D", stages, colours, sparse).axes[0]
        return axes.get_xscale(), axes.get_yscale()

    assert scales(np.exp(-steps / 10)) == ("linear", "log")
    assert scales(np.exp(-steps / 10), sparse=True) == ("linear", "linear")
    assert scales(np.exp(-steps / 10) - 0.5) == ("linear", "linear")
    assert scales(1 + steps / 100) == ("linear", "linear")
    assert scales(1 + steps / 100, teacher=5) == ("log", "linear")


def test_ticks_of_short_runs_are_whole_steps() -> None:
    stages = {"srp": np.array([[1.0, 10.0, 20.0], [3.0, 2.0, 1.0]])}
    ticks = curves._curve("D", stages, {"srp": "b"}, sparse=True).axes[0].get_xticks()
    assert len(ticks) > 2 and (ticks == ticks.round()).all()


def test_smoothing_averages_bins() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(20_000.0)
    noisy = np.stack([steps, steps / 20_000 + rng.normal(size=steps.size)])
    at, values = curves._smooth(noisy[:, rng.permutation(steps.size)], share=0.05)
    assert len(at) <= 1001 and (np.diff(at) > 0).all()
    inner = slice(25, -25)  # the window is shorter at the ends
    assert abs(values - at / 20_000)[inner].max() < 0.2
    at, values = curves._smooth(np.array([[5.0], [2.0]]), share=0.05)
    assert (at, values) == ([5.0], [2.0])


def test_metrics_of_a_long_run_take_a_few_bytes_per_value(tmp_path: Path) -> None:
    """A run may log a million steps, and draws its curves while it trains."""
    names, steps = [f"loss_{number}" for number in range(10)], 4000
    lines = (metrics_line("srp", step, **dict.fromkeys(names, 1 / step)) for step in range(1, steps + 1))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    tracemalloc.start()
    try:
        metrics = MetricsReader(path).read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert metrics.series["loss_9"]["srp"].shape == (2, steps)
    assert peak < 60 * steps * len(names)  # a tuple of two floats takes 112


def test_a_growing_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run writes its page a thousand times; the last line may be incomplete each time."""
    path = tmp_path / "metrics.jsonl"
    reader, parsed, loads = MetricsReader(path), [], json.loads
    assert reader.read() == MetricsReader(path).read() and not reader.read().lines
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    lines = [metrics_line("srp", step, D=1 / step if step != 6 else float("inf")) for step in range(1, 9)]
    lines[3:3] = ["no json\n", "\n"]
    content = "".join(lines).encode() + "{\N{SNOWMAN}".encode()
    for end in range(len(content) + 1):
        with path.open("ab") as file:
            file.write(content[end - 1 : end] if end else b"")
        reader.read()
    counts = Counter(text.rstrip() for text in parsed)
    assert [counts[line.rstrip()] for line in lines if "srp" in line] == [1] * 8  # complete, also without its newline
    found, expected = reader.read(), MetricsReader(path).read()
    np.testing.assert_array_equal(found.series["D"]["srp"], expected.series["D"]["srp"])
    assert found._replace(series={}) == expected._replace(series={})
    assert found.lines == {"srp": 8} and found.last == ("srp", 8) and len(found.remarks) == 2


def test_curves_of_a_long_run_have_few_points() -> None:
    """Drawing takes the more time the more points there are."""
    points = np.stack([np.arange(50_000.0), np.random.default_rng(0).uniform(0.5, 1.5, 50_000)])
    raw, mean = curves._curve("G", {"srp": points}, {"srp": "b"}, sparse=False).axes[0].lines
    assert len(raw.get_xdata()) == curves.CURVE_POINTS and len(mean.get_xdata()) <= curves.CURVE_POINTS + 1
