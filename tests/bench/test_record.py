"""The command ``python -m bench record``."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from bench_helpers import as_read, relation_rows, run
from helpers import ROOT

from bench import record, relation, results
from bench.record import kind_of, verified_kinds
from srpkd.kernels import measured
from srpkd.kernels.measured import Case, Recorded, Time

CASE = Case("bfloat16", "highest", "row", "l1", True, 4096, 64, 256, 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with results of a GPU, and redirect what the command writes."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(relation, "RESULTS", tmp_path / "results" / "relation.csv")
    monkeypatch.setattr(record, "TABLE", tmp_path / "measured_cases.py")
    monkeypatch.setattr(record, "HEADER", tmp_path / "verified_rows.h")
    results.upsert(tmp_path / "out" / "relation.csv", relation_rows("cuda", dtype="bfloat16"), relation.KEY)
    return tmp_path


def test_a_folder_is_merged_and_the_table_is_written(folder, capsys):
    results.upsert(relation.RESULTS, relation_rows(), relation.KEY)
    count = len(results.read(relation.RESULTS))
    run("record", folder / "out")
    assert len(results.read(relation.RESULTS)) == 2 * count
    assert f"{count} rows from" in capsys.readouterr().out
    run("record", folder / "out")  # the same rows again: no new ones
    assert len(results.read(relation.RESULTS)) == 2 * count

    names: dict = {}
    exec((folder / "measured_cases.py").read_text("utf-8"), names)
    assert names["DEVICES"] == (("some cuda", (9, 0)),)
    cases = {Case(*case): times for _, case, times in names["CASES"]}
    assert {case.pixels for case in cases} == {1024, 2048, 4096}
    assert {tuple(times) for times in cases.values()} == {("native",)}  # no peers, and nothing of a CPU
    assert cases[CASE._replace(batch=1)]["native"] == (83886.1, measured.KERNEL_VERSIONS["native"])


def test_wrong_results_are_not_in_the_table(folder):
    rows = [row | {"status": "wrong"} for row in relation_rows("cuda")]
    results.upsert(relation.RESULTS, rows, relation.KEY)
    assert "native" not in record.table(results.read(relation.RESULTS))


PROGRAM = """
#include "verified.h"
using namespace srpkd;
using namespace srpkd::cuda;
constexpr bool verified(Precision precision, int bytes, bool need_grad = true, int student = 64, int teacher = 256) {
  return sm90_verified(precision, bytes, Normalize::row, Distance::l1, need_grad, student, teacher);
}
int main() {
  static_assert(verified(Precision::bf16, 2) == EXPECTED && verified(Precision::tf32x3, 4) == EXPECTED);
  static_assert(verified(Precision::bf16, 2, true, 1, 193) == EXPECTED);
  static_assert(!verified(Precision::bf16, 4) && !verified(Precision::fp16, 2) && !verified(Precision::tf32, 4));
  static_assert(!verified(Precision::bf16, 2, false) && !verified(Precision::bf16, 2, true, 65, 256));
  static_assert(!sm90_verified(Precision::bf16, 2, Normalize::cosine, Distance::l1, true, 64, 256));
}
"""


@pytest.mark.parametrize("recorded", [True, False])
def test_native_has_the_kinds_that_its_sm90_kernel_has_passed(folder, recorded):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    rows = relation_rows("cuda", dtype="bfloat16") + relation_rows("cuda")
    fast = [
        row
        | {
            "provider": "native-sm90",
            "median_s": row["median_s"] / 2,
            "kernel_version": measured.kernel_version("native-sm90", row["dtype"]),
        }
        for row in rows
        if row["provider"] == "native"
    ]
    results.upsert(relation.RESULTS, rows + fast * recorded, relation.KEY)
    run("record")
    (folder / "program.cpp").write_text(PROGRAM)
    shutil.copy(ROOT / "csrc" / "cuda" / "verified.h", folder)  # it includes the rows beside it
    flags = [f"-DEXPECTED={str(recorded).lower()}", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only"]
    folders = ["-I", str(folder), "-I", str(ROOT / "csrc" / "cuda")]
    done = subprocess.run([compiler, *flags, *folders, folder / "program.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statuses", "seconds"),
    [
        (("ok", "ok"), 1e-3),
        (("ok", "wrong"), 1e-3),
        (("wrong", "ok"), 2e-3),  # only kinds that passed with the sm90 kernel take it
        (("wrong", "wrong"), 9e-3),
    ],
)
def test_rows_of_native_are_those_of_its_present_kernel(statuses, seconds):
    rows = as_read(relation_rows() + relation_rows("cuda", dtype="bfloat16"))
    others = [row for row in rows if row["device_type"] == "cpu" or row["provider"] != "native"]
    native = [row | {"median_s": "9e-3"} for row in rows if row not in others]
    for name, status, median in (("native-sm90", statuses[0], "1e-3"), ("native-sm80", statuses[1], "2e-3")):
        version = str(measured.kernel_version(name, "bfloat16"))
        own = {"provider": name, "status": status, "median_s": median, "kernel_version": version}
        others += [row | own for row in native]
    found = record.with_present_native(others + native)
    assert len(found) == len(others + native) and all(row in found for row in others)
    changed = [row for row in found if row not in others]
    assert {(row["provider"], row["pixels"]) for row in changed} == {("native", row["pixels"]) for row in native}
    assert {float(row["median_s"]) for row in changed} == {seconds}


def test_earlier_kernels_are_named_until_their_new_results_are_recorded(folder, capsys):
    new = results.read(folder / "out" / "relation.csv")
    earlier = [row | {"kernel_version": int(row["kernel_version"]) - 1} for row in new if row["kernel_version"]]
    results.upsert(relation.RESULTS, earlier, relation.KEY)
    run("record")
    assert "earlier version of the kernel: native\n" in capsys.readouterr().out
    run("record", folder / "out")
    assert "earlier version" not in capsys.readouterr().out


def test_a_folder_without_results_is_an_error(folder):
    with pytest.raises(SystemExit, match=r"expected one of the files relation\.csv, train\.csv, accuracy\.csv"):
        run("record", folder / "nothing")


# --- the sm_90 kernel of native ---------------------------------------------------------------------------------------


def test_an_h100_has_verified_the_sm90_kernel():
    verified = verified_kinds(measured.RECORDED)
    cases = [entry.case for entry in measured.RECORDED if kind_of(entry.case) in verified]
    assert {(case.dtype, case.normalize, case.distance) for case in cases} >= {
        ("bfloat16", "row", "l1"), ("bfloat16", "cosine", "l1"), ("float16", "row", "l1"),
    }  # fmt: skip
    assert "float32" not in {case.dtype for case in cases}, "the recorded rows are those of an earlier kernel"


def entries(case=CASE, version=0, **times):
    """Return one recorded case; ``version`` is relative to the present kernels."""
    names = {name.replace("_", "-"): time for name, time in times.items()}
    versions = {name: (measured.kernel_version(name, case.dtype) or 0) + version for name in names}
    return [Recorded(0, case, {name: Time(time, versions[name]) for name, time in names.items()})]


def test_the_sm90_kernel_is_taken_where_it_was_right_and_faster():
    verified = verified_kinds(entries(native_sm80=2.0, native_sm90=1.0))
    assert verified == verified_kinds(entries(native=0.9, native_sm80=2.0, native_sm90=1.0)), "the same kernel"
    assert verified == [kind_of(CASE)]
    assert verified == [kind_of(CASE._replace(pixels=100, batch=1, student=33, teacher=250))]  # as many panels
    for other in (
        {"student": 65}, {"teacher": 192}, {"dtype": "float16"}, {"dtype": "float32"}, {"normalize": "cosine"},
        {"distance": "huber"}, {"need_grad": False},
    ):  # fmt: skip
        assert kind_of(CASE._replace(**other)) not in verified, other
    single = CASE._replace(dtype="float32", precision="high")
    assert verified_kinds(entries(single, native_sm90=1.0)) == [kind_of(single)]
    assert kind_of(single) != kind_of(single._replace(precision="highest"))


def test_the_sm90_kernel_is_not_taken_by_other_records():
    assert not verified_kinds(entries(native=1.0, triton=1.0))
    assert not verified_kinds(entries(native_sm80=1.0, native_sm90=2.0)), "it was slower"
    assert not verified_kinds(entries(version=-1, native_sm80=2.0, native_sm90=1.0)), "an earlier version"
    single = CASE._replace(dtype="float32", precision="high")
    assert not verified_kinds(entries(single, version=-1, native_sm90=1.0)), "the version of other dtypes"
