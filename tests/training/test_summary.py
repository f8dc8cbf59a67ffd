"""The cells and notes of a run's table."""

import statistics

import pytest

from srpkd.training import summary


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
