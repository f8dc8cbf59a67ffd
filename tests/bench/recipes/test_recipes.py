"""The recipes: their losses against the public code of the methods, their benchmark, tables and pictures."""

from __future__ import annotations

import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_helpers import run
from helpers import error

from bench import measure, recipes, relation, results
from bench.markers import between_markers
from bench.recipes import catalogue, pages, tables
from bench.recipes.catalogue import CASES, RECIPES, RecipeCase, value_and_gradient

# features of student and teacher for the equivalence to the public code; and what that code adds to the norms, relative
SHAPES = {
    "gram-anchoring": ((2, 30, 6), (2, 30, 9), 0),
    "batch-similarity": ((7, 3, 4, 4), (7, 5, 2, 2), 0),
    "pairwise-segmentation": ((2, 6, 4, 5), (2, 9, 4, 5), 1e-8),
    "diffusion": ((2, 6, 4, 5), (2, 9, 4, 5), 0),
    "super-resolution": ((2, 6, 4, 5), (2, 9, 4, 5), 1e-7),
    "semantic-synthesis": ((2, 6, 4, 5), (2, 9, 4, 5), 0),
    "nst": ((2, 6, 4, 5), (2, 9, 4, 5), 0),
}
SMALL = RecipeCase("diffusion", "small maps", (2, 8, 4, 6), (2, 12, 4, 6), 2, 4)


def block(name: str) -> str:
    """Return the tables in a page."""
    return between_markers(pages.path(name), tables.NAME)


@pytest.mark.parametrize("name", RECIPES)
def test_loss_of_the_page_is_that_of_the_public_code(name):
    *shapes, added = SHAPES[name]
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    expected = value_and_gradient(RECIPES[name].published, student, teacher)
    actual = value_and_gradient(pages.loss_of(name), student, teacher)
    assert error(expected[1], torch.zeros_like(student), least=1) > 1e-6, "the gradient must not vanish"
    for ours, theirs in zip(actual, expected):
        assert error(ours, theirs) <= 1e-12 + 10 * added


def test_pooled_patches_of_the_pairwise_loss():
    """The public code pools before it compares; with scale 0.5, to patches of half the height and width."""
    student, teacher = torch.randn(2, 6, 6, 8, dtype=torch.float64), torch.randn(2, 9, 6, 8, dtype=torch.float64)
    pooled = (torch.nn.functional.max_pool2d(x, (3, 4), (3, 4), ceil_mode=True) for x in (student, teacher))
    expected = RECIPES["pairwise-segmentation"].published(*pooled)
    assert error(pages.loss_of("pairwise-segmentation")(student, teacher, patch=(3, 4)), expected) < 1e-7


@pytest.mark.parametrize("case", [SMALL, RecipeCase("gram-anchoring", "tokens", (4, 12, 5), (4, 12, 7), 2, 3)])
def test_copies_have_the_loss_and_gradient_of_their_features(case):
    student, teacher = (features.double() for features in case.features())
    assert (student.shape, teacher.shape) == (case.student, case.teacher)
    assert len(catalogue.as_tokens(student)[0].unique(dim=0)) == case.pixels // case.pixel_copies
    value, gradient = value_and_gradient(RECIPES[case.recipe].published, student, teacher)
    expected = case.expected()
    assert error(expected.loss, value) < 1e-12
    assert error(expected.gradient, catalogue.as_tokens(gradient)) < 1e-12


def test_all_cases_divide_into_copies_and_have_a_page():
    assert {case.recipe for case in CASES} == set(RECIPES)
    for case in CASES:
        assert case.student[0] % case.image_copies == case.pixels % case.pixel_copies == 0
        assert pages.path(case.recipe).exists()


@pytest.mark.parametrize("name", RECIPES)
def test_page_has_a_picture_and_a_place_for_its_table(name):
    assert isinstance(block(name), str)
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", pages.path(name).read_text("utf-8"))
    assert (pages.FOLDER / picture).exists(), f"run python -m bench recipes --pictures --only {name}"
    assert f"]({name}.md)" in pages.path(tables.INDEX).read_text("utf-8")


@pytest.mark.core(0)
def test_measures_both_and_records_errors():
    rows = {row["provider"]: row for row in recipes.measure_case(SMALL, "cpu", budget=0.01)}
    assert rows["usual"]["times_faster_than_usual"] == 1 and rows["srpkd"]["times_faster_than_usual"] > 0
    for row in rows.values():
        assert row["status"] == "ok" and row["median_s"] > 0 and 0 < row["gradient_error"] < 1e-4
        assert relation.describe(row, "usual").startswith(row["provider"])


def test_gate_rejects_a_wrong_loss(monkeypatch):
    monkeypatch.setattr(pages, "loss_of", lambda name: lambda student, teacher: 1.01 * student.square().mean())
    usual, ours = recipes.measure_case(SMALL, "cpu", budget=0.01)
    assert usual["status"] == "ok" and ours["status"] == "wrong"
    assert "against float64" in ours["reason"]


def test_too_large_for_the_usual_code(monkeypatch):
    monkeypatch.setattr(recipes.machine, "free_bytes", lambda device: 100)
    usual, ours = recipes.measure_case(SMALL, "cpu", budget=0.01)
    assert usual["status"] == "out of memory" and usual["needed_bytes"] == 4 * 3 * 2 * 24**2
    assert ours["status"] == "ok" and ours["times_faster_than_usual"] is None


def test_command_records_and_writes_the_tables(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(pages.FOLDER, tmp_path / "recipes")
    other = replace(SMALL, recipe="super-resolution")
    for module in (recipes, tables):
        monkeypatch.setattr(module, "CASES", [SMALL, other])
    monkeypatch.setattr(pages, "FOLDER", folder)
    out = tmp_path / "out.csv"
    arguments = ["--out", out, "--budget", 0.01, "--device", "cpu"]
    run("recipes", *arguments, "--only", "diffusion")
    assert {row["recipe"] for row in results.read(out)} == {"diffusion"}
    assert "small maps" in capsys.readouterr().out
    run("recipes", *arguments)
    assert len(results.read(out)) == 4
    assert "small maps" not in block("diffusion"), "only --tables changes the pages"
    run("recipes", *arguments, "--tables")
    assert "| small maps | 2x8x4x6 / 2x12x4x6 |" in block("diffusion")
    assert block("index").count("small maps") == 2


def test_pages_contain_the_recorded_results():
    recorded = results.read(recipes.RESULTS, recipes.KEY)
    for name, text in tables.texts(recorded).items():
        assert block(name) == text, "run python -m bench recipes --tables"
    if recorded:
        assert all(row["status"] in ("ok", "out of memory") for row in recorded)


@pytest.mark.slow
def test_draws_the_picture_of_a_page(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    page = pages.path("batch-similarity").read_text("utf-8").replace("range(150)", "range(2)")
    (tmp_path / "batch-similarity.md").write_text(page)
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    from bench.recipes.pictures import draw

    assert draw("batch-similarity").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_measures_on_a_gpu():
    for row in recipes.measure_case(SMALL, "cuda", budget=0.01):
        assert row["status"] == "ok" and row["peak_extra_bytes"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux")
@pytest.mark.parametrize("case", [case for case in CASES if case.pixels == 4096 or case.recipe == "nst"][:-1], ids=str)
@pytest.mark.core(2)
def test_usual_code_stores_what_the_catalogue_says(case):
    case = replace(case, student=(1, *case.student[1:]), teacher=(1, *case.teacher[1:]), image_copies=1)
    # warm: the code and the buffers that torch loads at a first call take 10 to 20 MB, which depends on the processor
    peak = measure.peak_on_cpu(functools.partial(recipes.prepare_call, case, "usual"), threads=1)
    # at most 1.5 times on this code: the arrays of a moment; Linux miscounts by megabytes on many cores
    assert 0.8 * case.needed_bytes("usual") <= peak <= 2.2 * case.needed_bytes("usual")
