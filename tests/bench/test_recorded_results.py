"""The recorded results of this repository."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT

from bench import accuracy, cases, plot, providers, record, relation, results, scaling, table, train
from bench.markers import between_markers
from srpkd.checking.cases import Case
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


def speedups(provider: str, **case: str) -> list[float]:
    """Return how many times as fast as torch.compile a provider was in the rows of a case."""
    rows = [row for row in RECORDED if row["provider"] == provider and row["status"] == "ok"]
    rows = [row for row in rows if all(row[name] == value for name, value in case.items())]
    return [float(row["times_faster_than_compile"]) for row in rows if row["times_faster_than_compile"]]


ON_CPU = {
    "device": "AMD EPYC with AVX512, 2 cores",
    "threads": "2",
    "channels": "64/256",
    "batch": "1",
    "mode": "forward+backward",
}
ROW_L1 = {"normalize": "row", "distance": "l1"}
ON_GPU = {"device_type": "cuda", "distance": "l1"}


@needs_results
def test_recorded_rooflines_follow_from_the_other_columns():
    """A changed count of operations or bytes must be applied to all rows: the tables show rows of several commits."""
    for row in RECORDED:
        case = Case(
            pixels=int(row["pixels"]),
            channels=cases.parse_channels(row["channels"]),
            batch=int(row["batch"]),
            **{name: row[name] for name in ("dtype", "precision", "normalize", "distance", "mode")},
        )
        rooflines = (
            cases.operations(case) / float(row["matrix_flops"]),
            cases.bytes_moved(case) / float(row["copy_bytes_per_s"]),
        )
        recorded = [float(row[name]) for name in ("roofline_matmul_s", "roofline_copy_s")]
        assert recorded == pytest.approx(rooflines, rel=1e-4), row
        if row["median_s"]:
            percent = 100 * max(rooflines) / float(row["median_s"])
            assert float(row["percent_of_roofline"]) == pytest.approx(percent, rel=1e-4), row


@needs_results
def test_the_summary_of_the_benchmarks_contains_the_recorded_ratios():
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text("utf-8").split())

    def one(pixels: str, dtype: str = "float32", **options: str) -> str:
        case = ON_CPU | ROW_L1 | {"pixels": pixels, "dtype": dtype} | options
        (ratio,) = speedups(case.pop("provider", "native"), **case)
        return f"{ratio:.1f}"

    avx2 = {"device": "AMD EPYC with AVX2, 2 cores"}
    assert one("1024", mode="forward", **avx2) == "1.0"
    default = avx2 | {"provider": "closed_form", "normalize": "cosine", "distance": "l2"}

    of_batch = {"batch": "16", "normalize": "cosine", "distance": "l2"}

    tiny = speedups("native", device_type="cpu", pixels="16", channels="8/8")
    native = speedups("native-sm90", **ON_GPU, dtype="bfloat16", batch="16")
    native += speedups("native-sm90", **ON_GPU, dtype="bfloat16", pixels="16384")
    triton = speedups("triton", **ON_GPU, dtype="bfloat16")
    (closed_form,) = speedups("closed_form", device_type="cuda", batch="16", dtype="bfloat16")
    for claim in (
        f"{one('16384')} times as fast as torch.compile at 128 x 128 pixels, {one('4096')} times at 64 x 64, "
        f"{one('1024')} times at 32 x 32 and {one('256')} times at 16 x 16 (row, l1)",
        f"{min(tiny):.1f} to {max(tiny):.1f} times at 4 x 4 with 8 channels",
        "For 16 images, the default relation (cosine, l2) is "
        f"{one('4096', **of_batch, provider='closed_form')} times as fast as torch.compile at 64 x 64 pixels, "
        f"{one('1024', **of_batch)} times at 32 x 32 and {one('256', **of_batch)} times at 16 x 16",
        f"{one('256', 'bfloat16')} times as fast as torch.compile at 16 x 16, {one('1024', 'bfloat16')} times at "
        f"32 x 32 and {one('4096', 'bfloat16')} times at 64 x 64",
        f"{one('256', **avx2)} times as fast as torch.compile at 16 x 16, {one('1024', **avx2)} times at 32 x 32, "
        f"{one('4096', **avx2)} times at 64 x 64 and {one('16384', **avx2)} times at 128 x 128 (float32, row, l1)",
        f"`closed_form` is {one('4096', **default)} times as fast at 64 x 64 (cosine, l2)",
        f"{min(native):.1f} to {max(native):.1f} times as fast as torch.compile for 16 images of 64 x 64",
        f"which needs no C++ compiler, is {min(triton):.1f} to {max(triton):.1f} times as fast",
        f"`closed_form` is the fastest: {closed_form:.1f} times as fast as torch.compile",
    ):
        assert claim in text
    assert {round(ratio, 1) for ratio in speedups("triton", **ON_GPU, dtype="float32", batch="16")} == {1.2}
    assert "`triton` is the fastest for 16 images: 1.2 times as fast as torch.compile" in text


def test_docs_state_from_which_size_auto_takes_the_closed_form():
    page = (ROOT / "docs" / "backends.md").read_text("utf-8")
    for device, kind in (("AMD Zen 5 and newer, with AVX-512", "zen5"), ("other CPUs", "cpu"), ("GPU", "cuda")):
        rule = dispatch.CLOSED_FORM_FROM[kind]
        assert rule["cosine"] == rule["none"]
        cells = [
            f"{per_channel} (C_s + C_t)" + (f", at least {least:,}" if least else "")
            for least, per_channel in (rule["cosine"], rule["row"])
        ]
        assert f"| {device} | {' | '.join(cells)} |" in page


def test_auto_has_the_recorded_results():
    """The table from which ``auto`` chooses on GPUs is that of the recorded rows."""
    assert record.TABLE.read_text("utf-8") == record.table(RECORDED), "run python -m bench record"
    assert record.HEADER.read_text("utf-8") == record.header(RECORDED), "run python -m bench record"
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
        monkeypatch.setattr(dispatch, "is_zen5", lambda: True)  # of the rows with AVX-512
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
