"""The variants of the wgmma tiles: their patches fit the sources, and all of them finish."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from bench_helpers import parse
from helpers import ROOT

from bench import ablation, machine_code, results
from bench.ablation import variants
from bench.ablation.variants import VARIANTS, Patch
from srpkd import relation_loss
from srpkd.checking.cases import Case
from srpkd.kernels import build

# wgmmas with 128 columns and with 64: of the Gram matrices (four loops over groups of channels and the last group, of
# four each), and of U
GRAM, ROWS, COLUMNS = 20, 8, 16
PRODUCTS = {
    "halves in a loop": (GRAM, ROWS // 2 + COLUMNS),
    "half tiles": (0, GRAM + ROWS // 2 + COLUMNS),
    "no U of rows": (GRAM, COLUMNS),
    "Gram products alone": (GRAM, ROWS),  # those of the rows are jumped over
}
EMULATION = ROOT / "tests" / "csrc" / "cuda_emulation"


@pytest.mark.parametrize("name", VARIANTS)
def test_patches_fit_the_sources(name, tmp_path):
    shutil.copytree(build.CSRC / "cuda", tmp_path, dirs_exist_ok=True)
    patches = VARIANTS[name].patches
    variants.apply(patches, tmp_path)
    changed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("sm90/*") if differs(path, tmp_path)}
    assert changed == {patch.path for patch in patches}
    assert bool(patches) == (name != "as is")


def differs(path: Path, copy: Path) -> bool:
    return path.read_text(encoding="utf-8") != (build.CSRC / "cuda" / path.relative_to(copy)).read_text("utf-8")


def test_a_patch_that_does_not_fit_is_an_error(tmp_path):
    (tmp_path / "file.h").write_text("one one")
    for old, count in (("one", 2), ("two", 0)):
        with pytest.raises(ValueError, match=f"occurs {count} times in csrc/cuda/file.h"):
            variants.apply((Patch("file.h", old, ""),), tmp_path)


def test_file_names_are_distinct():
    assert len({variants.slug(name) for name in VARIANTS}) == len(VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.core(0)
def test_variants_finish_in_the_emulation(name, tmp_path, monkeypatch):
    """A variant whose warps wait for what never comes would block a GPU. "as is" has the right loss."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # conftest.py sets it
    variation = emulated(name, tmp_path)
    assert (variation.memory == 255).all()  # not what an earlier variant has left
    described = variation.description
    assert (described.grid, described.tiles) == (3, 4 * 5 // 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ablation, "stream", lambda: 0)
    monkeypatch.setattr(ablation.measure, "gpu_seconds", lambda call, device: 2e-6)
    monkeypatch.setattr(variation, "hertz", lambda stream: 1.5e9)
    found = ablation.measured(variation, check=name == "as is")
    assert found == pytest.approx({"us": 2, "clocks_per_tile": 3000 * 3 / 10, "ghz": 1.5})
    if VARIANTS[name].equal and name != "as is":
        (tmp_path / "as_is").mkdir()
        product = emulated("as is", tmp_path / "as_is")
        product.memory.zero_()
        product.launch()
        expected = product.results()
        assert ablation.compared(variation, expected) == "equal"
        expected[-1] ^= 1
        assert ablation.compared(variation, expected) == "DIFFER" and ablation.compared(variation, None) == ""
    if name == "as is":
        student, teacher = (tensor.double() for tensor in variation.inputs[:2])
        expected = relation_loss(student, teacher, normalize="row", distance="l1", layout="nlc", backend="blocked")
        assert variation.loss() == pytest.approx(float(expected), rel=1e-5)
        variation.inputs[1].neg_()
        variation.inputs[1][:, 0] *= 2
        with pytest.raises(ValueError, match='the loss of "as is" is'):
            ablation.measured(SameLoss(variation), check=True)
        ablation.inputs_of.cache_clear()


def emulated(name: str, folder: Path) -> ablation.Variation:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-DSRPKD_EMULATION"]
    library = folder / "library.so"
    ablation.compile_library([compiler, *options, f"-I{EMULATION}"], VARIANTS[name].patches, folder, library)
    return ablation.Variation(library, Case(400, (64, 256), 1, "bfloat16", threads=1), multiprocessors=3)


class SameResults:
    def __init__(self, library: Path, case: Case) -> None:
        self.case = case

    def results(self) -> torch.Tensor:
        return torch.zeros(4)


class SameLoss:
    """A kernel that does nothing: the workspace has the loss of the call before."""

    def __init__(self, variation: ablation.Variation) -> None:
        self.memory = torch.empty(0)
        self.inputs, self.loss, self.launch = variation.inputs, variation.loss, lambda stream: None


def test_a_run(tmp_path, monkeypatch, capsys):
    """Each variant is compared with "as is" of the same case, and recorded at once."""
    times = iter([400.0, 390.0, 40.0, 41.5])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(ablation, "compiled", lambda folder, names: dict.fromkeys(names, tmp_path))
    monkeypatch.setattr(ablation, "Variation", SameResults)
    monkeypatch.setattr(ablation.machine, "device_name", lambda device: "GPU")
    checked = []

    def measured(variation: SameResults, check: bool) -> dict[str, float]:
        checked.append((variation.case.batch, check))
        return {"us": next(times), "clocks_per_tile": 10000.0, "ghz": 1.8}

    monkeypatch.setattr(ablation, "measured", measured)
    out = tmp_path / "ablation.csv"
    ablation.run(parse(ablation, "--variants", "as is", "no turns", "--out", str(out)))
    rows = results.read(out)
    assert [(row["variant"], row["batch"], float(row["us_to_as_is"]), row["results"]) for row in rows] == [
        ("as is", "16", 0, "equal"), ("no turns", "16", -10, "equal"),
        ("as is", "1", 0, "equal"), ("no turns", "1", 1.5, "equal"),
    ]  # fmt: skip
    assert checked == [(16, True), (16, False), (1, True), (1, False)]
    assert capsys.readouterr().out.count(ablation.HEADER) == 2


@pytest.mark.slow
@pytest.mark.core(0)
def test_variants_compile(tmp_path, monkeypatch, capsys):
    """Libraries have the intended products, those of PRODUCTS. They are compiled once, and again if a patch changes."""
    if not all(map(machine_code.tool, ("nvcc", "nvdisasm"))):
        pytest.skip("nvcc or nvdisasm is not installed")
    ablation.run(parse(ablation, "--build", str(tmp_path), "--variants", *PRODUCTS))
    built = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.so")}
    assert len(built) == len(PRODUCTS) and capsys.readouterr().out.split() == [
        str(library) for library in ablation.compiled(tmp_path, list(PRODUCTS)).values()
    ]
    for name, library in ablation.compiled(tmp_path, list(PRODUCTS)).items():
        [kernel] = machine_code.disassemble(library, [{"relation_tiles"}])
        count = Counter(one.opcode for one in kernel)
        found = count["HGMMA.64x128x16.F32.BF16"], count["HGMMA.64x64x16.F32.BF16"]
        assert found == PRODUCTS[name], name

    changed = VARIANTS["no U of rows"]._replace(patches=())
    monkeypatch.setitem(ablation.VARIANTS, "no U of rows", changed)
    [library] = ablation.compiled(tmp_path, ["no U of rows"]).values()
    assert library not in built and all(path.stat().st_mtime_ns == time for path, time in built.items())


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a GPU of compute capability"):
        ablation.run(parse(ablation))
    monkeypatch.setattr(ablation.build, "cuda_home", lambda: None)
    with pytest.raises(ValueError, match="is not built, and no CUDA toolkit is found"):
        ablation.run(parse(ablation, "--build", str(tmp_path)))


def test_rows_as_text():
    row = {"variant": "no turns", "us": 406.13, "us_to_as_is": 3.28, "clocks_per_tile": 11607.4, "ghz": 1.823}
    line = ablation.as_text(row | {"results": "equal"})
    assert line.startswith("no turns                 406.1         +3.3       11,607  1.82    equal  the consumers")
    assert ablation.HEADER.index("meaning") == line.index("the consumers")


@pytest.mark.gpu
def test_variants_on_a_gpu(tmp_path, capsys):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the tiles use wgmma")
    if build.cuda_home() is None:
        pytest.skip("nvcc is not installed")
    chosen = ["as is", "no turns"]
    out = tmp_path / "ablation.csv"
    ablation.run(parse(ablation, "--batch", "1", "--pixels", "1024", "--out", str(out), "--variants", *chosen))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[-2:]] == chosen
    assert len(out.read_text("utf-8").splitlines()) == 3
