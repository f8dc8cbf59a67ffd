"""The profile by Nsight Compute, from pages that it printed on an H100 for commit 39fef92: see ncu_pages."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_helpers import parse

from bench import machine_code, ncu, profile
from bench.machine_code import Frame, Instruction
from srpkd.checking.cases import Case
from srpkd.kernels import unavailable_reason

PAGES = Path(__file__).parent / "ncu_pages"
FAKE = """#!{python}
import lzma, pathlib, sys
words, pages = sys.argv[1:], pathlib.Path({pages!r})
if "--export" in words:
    pathlib.Path(words[words.index("--export") + 1]).write_bytes(b"report")
    pathlib.Path(__file__).with_name("log").write_text(" ".join(words))
else:
    name = {{"details": "details.txt", "source": "source.csv"}}[words[words.index("--page") + 1]]
    print(lzma.open(pages / f"{{name}}.xz", "rt").read())
"""


def page(name: str) -> str:
    with lzma.open(PAGES / f"{name}.xz", "rt") as file:
        return file.read()


@pytest.fixture(scope="module")
def kernels() -> list[ncu.Kernel]:
    return ncu.kernels_of(page("details.txt"), page("source.csv"))


@pytest.fixture(scope="module")
def tiles() -> list[Instruction]:
    """The machine code of the tiles, by nvdisasm."""
    [function] = machine_code.functions(page("listing.txt")).values()
    return function


def test_pages_of_nsight_compute(kernels):
    """A kernel that ncu prints twice counts once. Metrics are in the units of the columns."""
    finish, tiles, fill = kernels
    assert finish.metrics == {
        "us": 40.22, "cycles": 80159, "registers": 62, "spills": 0, "occupancy": 16.72,
        "dram": 6.57, "l2": 47.48, "compute": 7.41,
    }  # fmt: skip
    assert tiles.metrics["us"] == 452.96 and fill.metrics["us"] == 2.21
    assert [len(kernel.rows) for kernel in kernels] == [1176, 6696, 104]
    assert sum((row.stalls for row in finish.rows), profile.Counter()).total() == 2659
    waiting = [(row.opcode, row.stalls["gmma"]) for row in tiles.rows if "gmma" in row.stalls]
    assert len(waiting) == 5 and sum(count for _, count in waiting) == 3421
    assert all(opcode.startswith("HGMMA.") for opcode, _ in waiting)
    assert ncu.words_of(tiles) == {"srpkd", "cuda", "sm90", "relation_tiles", "Config", "BFloat16"}


def test_equal_launches_and_other_units():
    """Two equal launches are two kernels, unless ncu has the details of one only."""
    details = """  fill (1, 1, 1)x(32, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration          ms             1.50
    Elapsed Cycles    cycle    2,100,000
    DRAM Throughput   %              n/a
"""
    source = f"Kernel Name,fill\nAddress,Source,Instructions Executed,{ncu.ALL_SAMPLES},stall_wait\n0,EXIT,32,3,2\n"
    expected = ncu.Kernel(
        "fill", {"us": 1500.0, "cycles": 2.1e6}, [ncu.Row("EXIT", 32, profile.Counter(wait=2, gmma=1))]
    )
    assert ncu.kernels_of(2 * details, 2 * source) == [expected] * 2
    assert ncu.kernels_of(details, 2 * source) == [expected]


def test_instructions_of_the_library_are_those_of_the_profile(kernels, tiles):
    assert [one.opcode for one in tiles] == [row.opcode for row in kernels[1].rows]


def test_samples_by_source_line(kernels, tiles):
    root = profile.tree(kernels[1].rows, tiles)
    assert root.samples == sum(row.stalls.total() for row in kernels[1].rows) == 48176
    file = "cuda/sm90/relation_tiles.cuh"
    block = root.children[Frame(file, 462)]
    roles = {line: block.children[Frame(file, line)].samples for line in (446, 448, 451, 454)}
    assert roles == {446: 2926, 448: 2995, 451: 27916, 454: 13848}  # loaders, consumers, columns
    elementwise = block.children[Frame(file, 451)].children[Frame(file, 219)]
    assert elementwise.stalls["no_inst"] == 2184 and elementwise.samples == 5081


def test_report(kernels, tiles):
    text = "\n".join(profile.report_of(kernels, [tiles, tiles[:5]]))
    lines = text.splitlines()
    assert lines[3].split()[:4] == ["relation_tiles", "453.0", "825,463", "128"]
    assert lines[3].endswith("long_sb 38, no_inst 14, wait 13")
    assert lines[5].split()[:2] == ["all", "495.4"]
    assert "relation_tiles: 48,176 samples of 6,696 instructions" in lines
    assert any(line.startswith(" 57.9 %    115,434,776  relation_tiles.cuh:451  ") for line in lines)
    assert len(lines) < 60
    # a kernel of another library has no lines, and neither has one that is not the longest
    assert not any("FinishMoments:" in line for line in lines)
    *_, last = profile.report_of(kernels, [tiles[:-1]])
    assert last == "\nno source lines of relation_tiles: the extension has no kernel of these instructions"


def test_lines_with_everything_of_their_caller_are_left_out():
    def node(samples: int, children: dict[Frame, profile.Node] | None = None) -> profile.Node:
        return profile.Node(profile.Counter(wait=samples), samples, children or {})

    inner = node(99, {Frame("a.h", 3): node(60), Frame("a.h", 4): node(1)})
    root = node(200, {Frame("a.h", 1): node(100, {Frame("a.h", 2): inner}), Frame("a.h", 9): node(100)})
    assert [line.split()[:4] for line in profile.lines_of(root, 200)] == [
        ["50.0", "%", "100", "a.h:1"], ["30.0", "%", "60", "a.h:3"], ["50.0", "%", "100", "a.h:9"],
    ]  # fmt: skip


def test_different_pages_are_an_error():
    details = page("details.txt")
    with pytest.raises(OSError, match="details of 3 kernels, and the instructions of 0"):
        ncu.kernels_of(details, "==WARNING== nothing")
    with pytest.raises(OSError, match="details of 0 kernels, and the instructions of 3"):
        ncu.kernels_of("", page("source.csv"))


def test_a_run_of_nsight_compute(tmp_path, monkeypatch, capsys):
    """With a program in place of ncu that prints the recorded pages."""
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, pages=str(PAGES)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(profile.cases, "device_of", lambda options: "cuda")
    monkeypatch.setattr(profile.native, "extension", lambda: (_ for _ in ()).throw(RuntimeError("not built")))
    out = tmp_path / "out"
    profile.run(parse(profile, "--out", str(out), "--normalize", "cosine"))
    printed = capsys.readouterr().out
    assert "native-sm90: N=4096 C=64/256 B=16 bfloat16 cosine l1" in printed and "no source lines: not built" in printed
    stem = "native-sm90-N-4096-C-64-256-B-16-bfloat16-cosine-l1-forward-backward"
    assert {path.name for path in out.iterdir()} == {
        f"{stem}{end}" for end in (".details.txt", ".source.csv.gz", ".ncu-rep.gz", ".txt")
    }
    assert gzip.decompress((out / f"{stem}.ncu-rep.gz").read_bytes()) == b"report"
    words = (program.parent / "log").read_text("utf-8").split()
    assert words[:2] == ["--set", "full"] and "--profile-from-start" in words
    # the program that ncu starts makes the same call
    inner = parse(profile, *words[words.index("profile") + 1 :])
    assert inner.worker and inner.providers == ["native-sm90"] and inner.device == "cuda"
    assert [case.describe() for case in profile.cases.selected(inner)] == [
        case.describe() for case in profile.cases.selected(parse(profile, "--out", "x", "--normalize", "cosine"))
    ]

    program.write_text("#!/bin/sh\necho ==ERROR== ERR_NVGPUCTRPERM; exit 1\n")
    with pytest.raises(OSError, match="has profiled nothing"):
        profile.run(parse(profile, "--out", str(out)))
    assert "ncu: exit status 1: ==ERROR== ERR_NVGPUCTRPERM" in capsys.readouterr().out


def test_without_nsight_compute_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ncu.Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(OSError, match="Nsight Compute is not installed: no ncu in PATH"):
        ncu.find()


@pytest.mark.slow
def test_disassembly_of_a_binary(tmp_path):
    """The lines of inlined functions, from the caller to the called."""
    if not (nvcc := machine_code.tool("nvcc")) or not machine_code.tool("nvdisasm"):
        pytest.skip("nvcc or nvdisasm is not installed")
    source, binary = tmp_path / "kernels.cu", tmp_path / "kernels.o"
    source.write_text("""__device__ float root(float x) {
  return sqrtf(x);
}
__global__ void first(float* x) {
  x[1] = root(x[0]);
}
__global__ void second() {}
""")
    subprocess.run([nvcc, "-arch=sm_90", "-lineinfo", "-c", source, "-o", binary], check=True)
    [first], [second] = (machine_code.disassemble(binary, [{name}]) for name in ("first", "second"))
    chains = {tuple(frame.line for frame in one.frames) for one in first}
    assert (5, 2) in chains and {chain[0] for chain in chains} <= {4, 5, 6}
    assert "MUFU.RSQ" in {one.opcode for one in first} and second[0].frames[-1].line == 7
    assert machine_code.disassemble(binary, [{"third"}]) == []


@pytest.mark.gpu
def test_profile_of_a_call(tmp_path):
    if (reason := unavailable_reason("native", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    try:
        tool = ncu.find()
    except OSError as error:
        pytest.skip(str(error))
    try:
        text = profile.profile(tool, Case(256, (16, 32), 1, "bfloat16", device="cuda", threads=1), "native", tmp_path)
    except OSError as error:
        if "ERR_NVGPUCTRPERM" in str(error):
            pytest.skip("users may not read the counters of this GPU")
        raise
    assert "samples: waiting for" in text and "executed  source line" in text
