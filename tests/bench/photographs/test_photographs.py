"""The study on photographs: its images, scores and report, and a run of the whole command at small size."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.photographs.images import (
    PHOTOGRAPHS,
    TASKS,
    TESTED,
    grid_crops,
    partition,
    random_crops,
    read_pairs,
    read_photographs,
    write_dataset,
)
from bench.photographs.plan import VARIANTS, Study, run_config
from bench.photographs.report import draw, draw_examples, render
from bench.photographs.scores import METRICS, score

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(autouse=True)
def packages():
    for name in ("skimage", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def test_docs_contain_the_recorded_report():
    recorded = json.loads((DOCS / "photographs.json").read_text("utf-8"))
    assert (DOCS / "photographs.md").read_text("utf-8") == render(recorded), (
        "write it again with bench.photographs.report.render"
    )


def test_photographs_are_in_colour():
    found = read_photographs()
    assert found.keys() == PHOTOGRAPHS.keys() and len(found) == 11
    for name, photograph in found.items():
        assert min(photograph.shape[1:]) == 256 and photograph.shape[0] == 3, name
        assert photograph.min() >= -1 and photograph.max() <= 1 and photograph.std() > 0.1, name
        assert (photograph - photograph.mean(0)).abs().mean() > 0.01, name


def test_partitions_are_disjoint_and_test_every_photograph_equally():
    counts: Counter[str] = Counter()
    for number in range(len(PHOTOGRAPHS)):
        trained, tested = partition(number)
        assert len(tested) == TESTED and {*trained, *tested} == PHOTOGRAPHS.keys() and not {*trained} & {*tested}
        counts.update(tested)
    assert set(counts.values()) == {TESTED}


def test_crops():
    photograph = torch.arange(3 * 40 * 56.0).view(3, 40, 56)
    crops = grid_crops({"a": photograph}, 16)
    assert len(crops) == 2 * 3
    assert crops[0].equal(photograph[:, 4:20, 4:20]) and crops[-1].equal(photograph[:, 20:36, 36:52])
    generator = torch.Generator().manual_seed(0)
    crops = random_crops({"a": photograph, "b": -photograph}, 5, 16, generator)
    assert [crop.sum() > 0 for crop in crops] == [True, False, True, False, True]
    assert len({crop[0, 0, 0].item() for crop in crops}) == 5


@pytest.mark.parametrize("task", TASKS)
def test_dataset_repeats_and_inputs_differ_from_targets(task, tmp_path):
    for folder in ("one", "two"):
        write_dataset(tmp_path / folder, task, 3, 4, 64)
    source, target = read_pairs(tmp_path / "one" / "train")
    assert source.shape == target.shape == (4, 3, 64, 64)
    again = read_pairs(tmp_path / "two" / "train")
    assert source.equal(again[0]) and target.equal(again[1])
    assert 0.1 < (source - target).abs().mean() < 1
    local_means = (torch.nn.functional.avg_pool2d(images, 16) for images in (source, target))
    assert torch.stack([*local_means]).diff(dim=0).abs().mean() < 0.1
    if task == "halftone":
        assert source.abs().eq(1).all() and 0.1 < source.gt(0).float().mean() < 0.9
    assert len(read_pairs(tmp_path / "one" / "test")[0]) >= 3 * 4 * 4
    before = (tmp_path / "one" / "train" / "0000.png").stat().st_mtime_ns
    write_dataset(tmp_path / "one", task, 3, 4, 64)
    assert (tmp_path / "one" / "train" / "0000.png").stat().st_mtime_ns == before


def test_scores_order_images_by_their_error():
    photograph = read_photographs(["cat"])["cat"][None, :, :96, :96]
    noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))
    same, near, far = (score((photograph + size * noise).clamp(-1, 1), photograph) for size in (0, 0.02, 0.2))
    assert same["ssim"] == pytest.approx(100, abs=1e-3) and same["vif"] == pytest.approx(100, abs=0.1)
    assert all(same[name] > near[name] > far[name] for name in METRICS)
    # the error is uniform noise of 0.02 * 127.5 levels before rounding
    assert near["psnr"] == pytest.approx(-20 * torch.tensor(0.02 / 2).log10().item(), abs=0.3)


def test_scores_are_those_of_8_bits():
    """SSIM of constant images follows from their levels; an image without contrast has little information."""
    ten, five = (torch.full((1, 3, 48, 48), 2 * level / 255 - 1) for level in (10, 5))
    constant = (0.01 * 255) ** 2
    expected = 100 * (2 * 10 * 5 + constant) / (10**2 + 5**2 + constant)
    assert score(ten, five)["ssim"] == pytest.approx(expected, rel=1e-3)
    noise = torch.randn(ten.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert score(noise / 2, noise)["vif"] < 100 < score(noise, noise / 2)["vif"]


def test_variants_are_those_that_the_study_selected():
    """The weights are those of docs/study.json, and differ only in the losses."""
    selected = {step["step"]: step["chosen"] for step in json.loads((DOCS / "study.json").read_text("utf-8"))["choice"]}
    configs = run_config(Study("runs", 96, 4, None), "restore", 0)
    assert VARIANTS["output"]["lambda_kd"] == selected["output distillation"]["lambda_kd"]
    assert VARIANTS["output + FitNet"]["lambda_feature"] == selected["feature matching"]["lambda_feature"]
    relation = selected["relation loss: layers"]
    assert {name: relation[name] for name in VARIANTS["output + SRP"]} == VARIANTS["output + SRP"]
    assert configs.variants.keys() == VARIANTS.keys()


def test_report_of_known_scores():
    def run(gain: float) -> dict:
        scores = {name: dict.fromkeys(METRICS, 10.0) for name in ("input", "teacher", *VARIANTS)}
        scores["output + SRP"] = dict.fromkeys(METRICS, 10 + gain)
        return {"tested": ["cat"], "scores": scores}

    result = {
        "command": "python -m bench photographs", "size": 96, "pairs": 400,
        "environment": {"torch": "2", "python": "3", "device": "cpu"},
        "tasks": {"restore": [run(1.0), run(1.1), run(0.9)]},
    }  # fmt: skip
    text = render(result)
    assert "| output + SRP | 11.00 ± 0.10 | 11.00 ± 0.10 | 11.00 ± 0.10 |" in text
    assert "    - PSNR dB +1.00 (+0.75 to +1.25), better on 3 of 3: **helped**" in text
    assert "**Result**: 6 of 12 confidence intervals of a difference exclude 0; about 1 would by chance." in text
    result["tasks"] = {"restore": [run(-1.0), run(-1.1), run(-0.9)]}
    assert "**Result**: 6 of 12 " in render(result), "an effect is also one that hurts"
    assert "**no difference shown**" in text and "8 photographs (400 crops of 96 x 96 pixels," in text
    assert draw(result).startswith(b"\x89PNG")


def test_examples_are_drawn_in_the_colours_of_the_images():
    red, blue = (torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8) for colour in ((1.0, -1, -1), (-1.0, -1, 1)))
    png = draw_examples({"restore": {"input": red, "target": blue}})
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).mean() > 0.2


@pytest.mark.slow
@pytest.mark.core(0)
def test_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.photographs.images.SHORT_SIDE", 64)
    arguments = ["photographs", "--partitions=1", "--size=48", "--pairs=4", "--epoch_steps=1", "--tasks", "restore"]
    main(arguments)
    out = capsys.readouterr().out
    assert "## Restore: from a blurred and noisy to a clean image" in out and "too few pairs to tell" in out
    assert out.endswith("report: runs/photographs/photographs.md\n")
    result = json.loads((tmp_path / "runs" / "photographs" / "photographs.json").read_text("utf-8"))
    [run] = result["tasks"]["restore"]
    assert run["tested"] == partition(0)[1] and run["scores"].keys() == {"input", "teacher", *VARIANTS}
    main([*arguments, "--report", "docs"])  # nothing is trained again
    assert "`python -m bench photographs --partitions=1 --size=48" in (tmp_path / "docs" / "photographs.md").read_text(
        "utf-8"
    )
    assert "--report" not in (tmp_path / "docs" / "photographs.md").read_text("utf-8")
    assert (tmp_path / "docs" / "photographs-examples.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "docs" / "photographs.json").read_text("utf-8"))["tasks"] == result["tasks"]
