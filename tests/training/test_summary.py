"""The cells and notes of a run's table."""

import math
import statistics

import pytest
from small import SMALL

from srpkd.training import summary
from srpkd.training.datasets import DataSummary
from srpkd.training.options import TrainConfig, variant_config
from srpkd.training.plan import Plan


def test_notes_compare_variants_seed_by_seed(pix2pix):
    notes = pix2pix.report["table"]["notes"]
    assert [note.partition(", mIoU")[0] for note in notes] == ["alone minus output", "output + SRP minus output"]
    gains = [
        pix2pix.logged(f"alone seed {seed}", "mIoU")[0] - pix2pix.logged(f"output seed {seed}", "mIoU")[0]
        for seed in (0, 1)
    ]
    assert f"{statistics.mean(gains):+.2f} on average; by seed {gains[0]:+.2f}, {gains[1]:+.2f}" in notes[0]


@pytest.mark.core(0)
def test_unpaired_students_are_compared_by_psnr_to_the_teacher(cycle_gan):
    [note] = cycle_gan.report["table"]["notes"]
    assert note.startswith("b minus a, PSNR to teacher dB A to B: ")


@pytest.mark.parametrize(
    ("output", "srp", "expected"),
    [
        ([1.0, 2.0], [4.0, 3.0], "+2.00 on average; by seed +3.00, +1.00"),
        ([None, 2.0], [4.0, 3.0], "+1.00 on average; by seed +1.00"),  # the test images came later
        ([1.0, None], [None, 3.0], None),
        ([math.inf, math.inf], [1.0, math.inf], "+nan on average; by seed -inf, +nan"),
        ([1.0, 2.0], [4.0], None),
    ],
)
def test_scores_that_notes_compare(output, srp, expected):
    weights = {"output": {"lambda_kd": 1, "lambda_srp": 0}, "SRP": {"lambda_kd": 1, "lambda_srp": 1}}
    config = TrainConfig(**SMALL, model="pix2pix", teacher="t", variants=weights).resolved()
    rows = {
        name: [{} if score is None else {"psnr": score, "teacher_psnr": 0.0} for score in scores]
        for name, scores in (("output", output), ("SRP", srp))
    }
    notes = summary.table_notes(config, {name: variant_config(config, name) for name in weights}, rows)
    assert notes == ([f"SRP minus output, PSNR dB: {expected}"] if expected else [])


def make_plan(run_dir, **progress):
    config = TrainConfig(**SMALL).resolved()
    return Plan(config, None, dict.fromkeys("ab", config), {}, run_dir, DataSummary("", [], []), **progress)


def test_rows_have_the_order_of_the_variants_in_an_extended_run_too(run_dir):
    rows = {name: [{"parameters": 1.0}] for name in ("b", "a", "teacher")}
    summary.publish(make_plan(run_dir, rows=rows), {}, None)
    assert [row["name"] for row in run_dir.report["table"]["rows"]] == ["teacher", "a", "b"]


def test_pictures_of_earlier_networks_are_removed(run_dir):
    run_dir.report["samples"] = [{"caption": "test image 0", "images": []}]
    summary.publish(make_plan(run_dir), {}, None)
    assert run_dir.report["samples"] == [] and "test image 0" not in (run_dir.folder / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([3.0], 3.0),
        ([1.0, 3.0], {"mean": 2.0, "std": 2**0.5, "n": 2}),
        ([float("inf"), 1.0], {"mean": float("inf"), "std": float("nan"), "n": 2}),
        ([float("nan"), 1.0], {"mean": float("nan"), "std": float("nan"), "n": 2}),
    ],
)
def test_a_cell_is_a_value_or_mean_and_standard_deviation(values, expected):
    rows = [{"psnr": value} for value in values] + [{"parameters": 7}, {"parameters": 7}]
    assert summary.table_cell("psnr", rows) == pytest.approx(expected, nan_ok=True)
    assert summary.table_cell("parameters", rows) == 7
