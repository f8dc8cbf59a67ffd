"""Mutation spot checks: each of these faults, put into a kernel, must make a test fail.

    python tests/mutations.py             all backends, about ten minutes on two cores: make mutations
    python tests/mutations.py native      one backend, or several

Works on a copy of the tree in a temporary folder, which is what the tests import there, and never on the tree itself.
First the tests of a backend must pass without a fault; then, one fault at a time, at least one must fail by an
assertion of its own: an import, a fixture or a compiler that fails is reported as "broken", for then no test has
noticed anything. ``native`` is compiled anew for every fault, without its GPU part. Exit status 1 if a fault survives
or is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "kernels", "srpkd", "tests")


class Fault(NamedTuple):
    what: str
    path: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str = ""  # pytest's arguments, where those of the backend are more than it takes


@dataclass
class Backend:
    tests: str  # pytest's arguments: the tests that must notice
    faults: list[Fault]
    environment: dict[str, str] = field(default_factory=dict)
    compiled: bool = False


ALGEBRA, BLOCKED, CLOSED_FORM = "kernels/formulas.py", "kernels/blocked.py", "kernels/closed_form.py"
DISTRIBUTED, TRITON, TRITON_ALGEBRA = (
    "kernels/distributed.py",
    "kernels/triton/tiles.py",
    "kernels/triton/scales_and_gradient.py",
)
EPILOGUE, CPU_TILES, INDEX = "csrc/cpu/epilogue_body.h", "csrc/cpu/relation_tiles.cpp", "csrc/common/index.h"
CUDA_TILES, CUDA_EPILOGUE = "csrc/cuda/relation_tiles.cuh", "csrc/cuda/epilogue.cuh"
CUDA_CONFIG = "csrc/cuda/config.h"

BACKENDS = {
    "blocked": Backend(
        "tests/kernels/test_backends.py -k blocked",
        [
            Fault(
                "sign(0) is not 0",
                ALGEBRA,
                "return difference.sign()",
                "return 2 * (difference >= 0).to(difference) - 1",
            ),
            Fault("Huber's line starts at the wrong height", ALGEBRA, "delta * (size - 0.5 * delta)", "delta * size"),
            Fault(
                "norm of exactly eps is alive",
                ALGEBRA,
                "torch.where(norm <= relation.eps",
                "torch.where(norm < relation.eps",
            ),
            Fault(
                "row: correction M_w q dropped",
                ALGEBRA,
                "            result.mT.baddbmm_(weighted_moment, features.mT, alpha=-scale)\n",
                "",
            ),
            Fault(
                "cosine: correction dropped",
                ALGEBRA,
                "result.sub_((tiles.h * scales.student.square()).unsqueeze(-1) * features).mul_(scale)",
                "result.mul_(scale)",
            ),
            Fault(
                "cosine: the diagonal is no tie",
                BLOCKED,
                "difference.diagonal(dim1=1, dim2=2).mul_(0)",
                "difference.diagonal(dim1=1, dim2=2)",
            ),
            Fault(
                "row: K is not symmetric",
                BLOCKED,
                "K.addcmul_(mirrored_slope, scales.student[:, None, strip])",
                "K.addcmul_(mirrored_slope, scales.student[:, block, None])",
            ),
            Fault(
                "the mirrored half of the loss counts once",
                BLOCKED,
                "2 * value[..., own:].sum((1, 2))",
                "value[..., own:].sum((1, 2))",
            ),
            Fault("the last strip is lost", BLOCKED, "range(0, pixels, rows)", "range(0, pixels - 1, rows)"),
            Fault(
                "h of the columns dropped",
                BLOCKED,
                "                h[:, rest] += relations[..., own:].sum(1)\n",
                "",
            ),
        ],
    ),
    "closed_form": Backend(
        "tests/kernels/test_backends.py tests/test_loss.py -k closed_form",
        [
            Fault("excess of the diagonal counts", CLOSED_FORM, "loss = loss - total(excess.square().sum(1))", "pass"),
            Fault("h keeps the diagonal", CLOSED_FORM, "h = 2 * (h - 2 * excess * diagonal_s)", "h = 2 * h"),
            Fault(
                "U keeps the diagonal",
                CLOSED_FORM,
                "U = U - (4 * excess * row_s).unsqueeze(-1) * student",
                "pass",
            ),
            Fault("dead rows of the teacher count", CLOSED_FORM, "total((alpha_t > 0).sum(1))", "total(ones.sum(1))"),
            Fault(
                "the teacher's weights in the mixed moment",
                CLOSED_FORM,
                "total(_moment(teacher, student, row_st))",
                "total(_moment(teacher, student, row_t))",
            ),
            Fault(
                "U lacks the mirrored part",
                CLOSED_FORM,
                "U = 2 * (forward + by_row_s - by_row_st)",
                "U = 4 * forward",
            ),
            Fault(
                "sums in the dtype of the features",
                CLOSED_FORM,
                "SCALE_DTYPE = torch.float64\n",
                "SCALE_DTYPE = torch.float32\n",
            ),
        ],
    ),
    "native": Backend(
        "tests/kernels/test_native.py tests/kernels/test_backends.py -k native",
        [
            Fault("sign(0) is not 0", EPILOGUE, " & (d != Vector{}));", ");"),
            Fault("the tie lies beside the diagonal", EPILOGUE, "if (j == i / LANES) d[", "if (j == i / LANES + 1) d["),
            Fault("h of the columns dropped", EPILOGUE, "if constexpr (mirrored) h_column[j] += q * b;", ""),
            Fault("row: K is not symmetric", EPILOGUE, "p * row_s + q * column_s[j];", "p * row_s + q * row_s;"),
            Fault("the mirrored half of the loss counts once", EPILOGUE, "(!row && mirrored ? 2 : 1)", "1"),
            Fault(
                "missing transpose",
                CPU_TILES,
                "accumulate(image, j, K.t(), s_i, space.h[1]);",
                "accumulate(image, j, i.size == j.size ? K : K.t(), s_i, space.h[1]);",
            ),
            Fault(
                "the padding of a tile is not cleared",
                CPU_TILES,
                "columns < stride && i < rows",
                "columns < stride && i < rows - 1",
            ),
            Fault(
                "the last block lacks a pixel", INDEX, "left = pixels - begin;", "left = pixels - begin - (begin > 0);"
            ),
        ],
        compiled=True,
    ),
    "triton": Backend(
        "tests/kernels/triton/test_interpreter.py",
        [
            Fault("sign(0) is not 0", TRITON, "return tl.where(difference == 0, 0.0, one)", "return one"),
            Fault(
                "the mask's filling is not 0",
                TRITON_ALGEBRA,
                "offs_c * stride_c, mask=mask, other=0.0)",
                "offs_c * stride_c, mask=mask, other=1.0)",
            ),
            Fault(
                "the tile on the diagonal counts twice",
                TRITON,
                "(start_n >= start_m + BLOCK_M)",
                "(start_n >= start_m)",
            ),
            Fault("row: K is not symmetric", TRITON, "DISTANCE) * alpha_sn", "DISTANCE) * alpha_sm"),
            Fault("cosine: h lacks its 2", TRITON, "            h *= 2\n", ""),
            Fault(
                "the tie lies beside the diagonal",
                TRITON,
                "offs_m[:, None] == offs_n[None, :]",
                "offs_m[:, None] == offs_n[None, :] + 1",
            ),
            Fault(
                "columns end a pixel early",
                TRITON,
                "first + split_columns, pixels)",
                "first + split_columns, pixels - 1)",
            ),
            Fault("missing transpose", TRITON_ALGEBRA, "tl.trans(tile), start_j", "tile, start_j"),
            Fault(
                "row: correction M_w q dropped",
                TRITON_ALGEBRA,
                "        correction += by_weighted\n",
                "        correction += 0\n",
            ),
        ],
        environment={"TRITON_INTERPRET": "1"},
    ),
    "cuda": Backend(
        "tests/csrc/test_cuda_emulation.py",
        [
            Fault("sign(0) is not 0", CUDA_EPILOGUE, "(d > 0 ? 1.f : 0.f) - (d < 0 ? 1.f : 0.f)", "d < 0 ? -1.f : 1.f"),
            Fault(
                "lines are not masked",
                CUDA_TILES,
                "const int left = i < lines ? valid : 0;",
                "const int left = i <= lines ? valid : 0;",
            ),
            Fault(
                "the tie lies beside the diagonal",
                CUDA_TILES,
                "== warp.column(n, i % 2)) sum",
                "== warp.column(n, i / 2)) sum",
            ),
            Fault(
                "one channel too many is written",
                CUDA_TILES,
                "channel < p.features[1].channels)",
                "channel <= p.features[1].channels)",
            ),
            Fault("pairs of blocks are missed", CUDA_CONFIG, "(blocks + 1) / 2 + (", "(blocks + 1) / 2 + 0 * ("),
            Fault(
                "a copy is not waited for", CUDA_TILES, "wait_for_copies<PREFETCH - 1>()", "wait_for_copies<PREFETCH>()"
            ),
            Fault(
                "missing barrier",
                CUDA_TILES,
                "sync_block();  // all parts have",
                "// all parts have",
            ),
            Fault(
                "missing transpose of the accumulator",
                CUDA_TILES,
                "a[1] = as_bits(k[2]), a[2] = as_bits(k[1])",
                "a[1] = as_bits(k[1]), a[2] = as_bits(k[2])",
            ),
            Fault(
                "row: K is not symmetric",
                CUDA_EPILOGUE,
                "(e, p.delta) * beta_s : grad",
                "(e, p.delta) * alpha_s : grad",
            ),
        ],
    ),
    "distributed": Backend(
        "tests/kernels/test_distributed.py",
        [
            Fault(
                "other ranks' pixels tie too",
                DISTRIBUTED,
                '"cosine" and columns is rows:',
                '"cosine" and rows.student.shape == columns.student.shape:',
            ),
            Fault(
                "the tie of a lower strip lies elsewhere",
                DISTRIBUTED,
                "difference.diagonal(start, 1, 2)",
                "difference.diagonal(0, 1, 2)",
            ),
            Fault("the gradient is not that of all ranks' losses", DISTRIBUTED, "ctx.ranks * grad_loss", "grad_loss"),
            Fault(
                "cosine: h lacks its 2",
                DISTRIBUTED,
                "weight = 1 if relation.normalize",
                "weight = 1 if True or relation.normalize",
            ),
            Fault(
                "row: K is not symmetric",
                DISTRIBUTED,
                "relation) * columns.alpha_s.unsqueeze(1)",
                "relation) * alpha_s.unsqueeze(2)",
            ),
            Fault("the loss is that of one rank's rows", DISTRIBUTED, "sum_over_ranks(loss, group)", "loss"),
            Fault("scales of one rank's pixels", DISTRIBUTED, "relation, dtype, total, pixels)", "relation, dtype)"),
            Fault(
                "M_w of one rank's pixels",
                DISTRIBUTED,
                "scales, relation, total, pixels)",
                "scales, relation, algebra.itself, pixels)",
            ),
        ],
    ),
}


def copy_of(folder: Path) -> None:
    """Copy the tree; the links srpkd/kernels and srpkd/csrc are relative."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(folder), **environment}
    settings["PYTHONDONTWRITEBYTECODE"] = "1"  # a fault of equal length within the same second would go unseen
    return subprocess.run(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def compile_native(folder: Path, flags: str = "-O1", **environment: str) -> str | None:
    """Build the CPU extension where the copy finds it first; or what went wrong."""
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    environment |= {"SRPKD_BUILD_CUDA": "0", "SRPKD_CXX_FLAGS": flags}
    done = run([sys.executable, "-P", str(folder / "kernels" / "build.py"), str(objects)], folder, environment)
    if done.returncode:
        return done.stdout
    shutil.copy(objects / "_native.so", folder / "kernels" / "_native.so")
    return None


def judge(folder: Path, backend: Backend, tests: str = "") -> tuple[str, str]:
    """What the tests say of the copy as it is, "passed", "failed" or "broken", and the first failure."""
    if backend.compiled and (output := compile_native(folder)) is not None:
        return "broken", f"the compiler: {output[-2000:]}"
    modules = "formulas, blocked, closed_form, distributed, native, triton"
    where = f"import srpkd.kernels, sys; from srpkd.kernels import {modules}; print(srpkd.kernels.__file__)"
    imported = run([sys.executable, "-c", where], folder, backend.environment)
    if imported.stdout.strip().splitlines()[-1:] != [str(folder / "srpkd" / "kernels" / "__init__.py")]:
        return "broken", f"not what is imported: {imported.stdout[-2000:]}"
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    arguments = (tests or backend.tests).split(" -k ")
    command = [sys.executable, "-m", "pytest", *options, *arguments[0].split()]
    done = run(command + (["-k", arguments[1]] if arguments[1:] else []), folder, backend.environment)
    if done.returncode not in (0, 1) or not report.exists():
        return "broken", f"pytest: {done.stdout[-2000:]}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    if any(case.find("error") is not None for case in cases):
        return "broken", f"an error outside the tests: {done.stdout[-2000:]}"
    failed = [case for case in cases if case.find("failure") is not None]
    if not failed:
        return ("passed", f"{len(cases)} tests") if len(cases) > 5 else ("broken", f"only {len(cases)} tests")
    message = failed[0].find("failure").get("message", "")
    if message.startswith(("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError")):
        return "broken", message
    return "failed", failed[0].get("name")


def check(name: str, backend: Backend) -> list[tuple[str, ...]]:
    """(backend, fault, verdict, the test that noticed) of each fault, and of none."""
    rows = []

    def note(what: str, verdict: str, detail: str, start: float) -> None:
        rows.append((name, what, verdict, detail))
        brief = detail if verdict in ("killed", "passed") else detail.strip()
        print(f"{name:12} {what:46} {verdict:9} {time.monotonic() - start:4.0f} s  {brief}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        start = time.monotonic()
        verdict, detail = judge(folder, backend)
        note("(no fault)", verdict, detail, start)
        for fault in backend.faults if verdict == "passed" else []:
            start, path = time.monotonic(), folder / fault.path
            text = path.read_text()
            if (count := text.count(fault.old)) != 1:
                note(fault.what, "broken", f"{count} times in {fault.path}: {fault.old!r}", start)
                continue
            path.write_text(text.replace(fault.old, fault.new))
            verdict, detail = judge(folder, backend, fault.tests)
            note(fault.what, {"failed": "killed", "passed": "SURVIVED"}.get(verdict, verdict), detail, start)
            path.write_text(text)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", help=f"of {', '.join(BACKENDS)}; all by default")
    chosen = parser.parse_args().backends or list(BACKENDS)
    if unknown := [name for name in chosen if name not in BACKENDS]:
        parser.error(f"no such backend: {', '.join(unknown)}; there are {', '.join(BACKENDS)}")
    rows = [row for name in chosen for row in check(name, BACKENDS[name])]
    bad = [row for row in rows if row[2] not in ("killed", "passed")]
    print(f"\n{sum(row[2] == 'killed' for row in rows)} faults killed, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
