"""The recorded results of this repository."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT

from bench import accuracy, cases, plot, providers, record, relation, results, scaling, table, train
from bench.markers import between_markers
from srpkd.kernels import BACKENDS, Relation, auto_backend, build, cuda_device, dispatch, measured, native

RECORDED = results.read(relation.RESULTS)
needs_results = pytest.mark.skipif(not RECORDED, reason=f"{relation.RESULTS.name} has no rows")


def test_readme_and_docs_contain_the_recorded_results():
    for file, text in table.texts(ROOT / "README.md", RECORDED, results.read(train.RESULTS)).items():
        assert between_markers(file, table.NAME) == text, "run python -m bench table --readme README.md"


def test_docs_show_the_recorded_plots():
    page = ROOT / "docs" / "benchmarks.md"
    plots = plot.for_docs(plot.recorded_plots(RECORDED, results.read(accuracy.RESULTS)))
    assert between_markers(page, plot.NAME) == plot.images(plots, page.stem), f"run {plot.NAME} --page {page}"
    assert {path.name for path in page.with_suffix("").iterdir()} == {one.file for one in plots}


def test_auto_has_the_recorded_results():
    """The table from which ``auto`` chooses on GPUs is that of the recorded rows."""
    assert record.TABLE.read_text() == record.table(RECORDED), "run python -m bench record"
    assert record.HEADER.read_text() == record.header(RECORDED), "run python -m bench record"
    correct = [row for row in RECORDED if row["status"] == "ok" and row["kernel_version"]]
    assert sum(len(entry.times) for entry in measured.RECORDED) == len(correct)


@needs_results
def test_auto_chooses_well_for_every_recorded_shape(monkeypatch):
    """``auto`` takes at most 1.3 times as long as the best recorded backend, on CPUs and on GPUs.

    Compared are speeds relative to eager where recorded, because absolute times are noisy. The reference does not
    count: ``auto`` avoids its N x N arrays. ``native`` counts with the kernel that the records make it take.
    """
    monkeypatch.setattr(native.extension(), "cuda_architectures", build.DEFAULT_ARCHITECTURES)
    groups: dict[tuple[str, ...], dict[str, results.Row]] = {}
    for row in record.with_present_native(RECORDED):
        if row["status"] == "ok" and row["provider"] in BACKENDS and row["provider"] != "reference":
            groups.setdefault(tuple(row[name] for name in relation.KEY[1:]), {})[row["provider"]] = row
    assert {rows["native"]["device_type"] for rows in groups.values() if "native" in rows} == {"cpu", "cuda"}
    slow = []
    for key, rows in groups.items():
        some = next(iter(rows.values()))
        instructions = "AVX2" if "AVX2" in some["device"] else "AVX512"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda instructions=instructions: instructions)
        for name in BACKENDS:
            module, absent = dispatch.backend_module(name), None if name in rows else "absent"
            monkeypatch.setattr(module, "unavailable_reason", lambda device, absent=absent: absent)
        monkeypatch.setattr(native, "is_built", lambda device, rows=rows: "native" in rows)
        if some["device_type"] == "cuda":
            capability = tuple(map(int, some["capability"].split(".")))
            gpu = cuda_device.Gpu(some["device"], capability, 132, 232_448)
            monkeypatch.setattr(cuda_device, "gpu_of", lambda device, gpu=gpu: gpu)
        choice = auto_backend(
            torch.device(some["device_type"]),
            Relation(some["normalize"], some["distance"]),
            getattr(torch, some["dtype"]),
            int(some["pixels"]),
            cases.parse_channels(some["channels"]),
            int(some["batch"]),
            some["precision"],
            some["mode"] == "forward+backward",
        )
        speed = {
            name: results.number(row, "times_faster_than_eager") or 1 / results.number(row, "median_s")
            for name, row in rows.items()
        }
        best = max(speed, key=speed.get)
        if choice not in rows or 1.3 * speed[choice] < speed[best]:
            slow.append(f"{choice} instead of {best}: {dict(zip(relation.KEY[1:], key))}")
    assert not slow, "\n".join(slow)


@needs_results
def test_recorded_memory_is_linear_in_pixels():
    ours = [
        fit
        for fit in scaling.fits(RECORDED)
        if (fit.measure, fit.axis) == ("memory", "pixels") and fit.row["provider"] in providers.OURS
    ]
    assert all(fit.exponent < 1.25 for fit in ours), [(fit.row["provider"], fit.exponent, fit.points) for fit in ours]
