"""Mutation tests: each of these faults in a kernel must make a test fail.

    python tests/mutations.py             all backends, about 20 minutes on two cores: make mutations
    python tests/mutations.py native      one or more backends

The tests run in a copy of the tree in a temporary folder; the tree itself does not change. First the tests of a backend
must pass without a fault. Then, with one fault at a time, the assertion of at least one test must fail. If an import, a
fixture or the compilation fails, the fault is reported as "broken", because no test has detected it. The extension of
``native`` is compiled again for every fault, without CUDA. The exit status is 1 if a fault survives or is broken.
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
    name: str
    path: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str = ""  # arguments of pytest, if not those of the backend


@dataclass
class Backend:
    tests: str  # arguments of pytest: the tests that must detect the faults
    faults: list[Fault]
    environment: dict[str, str] = field(default_factory=dict)
    compiled: bool = False


FORMULAS, STRIPS, BLOCKED = "kernels/formulas.py", "kernels/strips.py", "kernels/blocked.py"
CLOSED_FORM, DISTRIBUTED = "kernels/closed_form.py", "kernels/distributed.py"
TRITON_PRIMITIVES, TRITON_SCALES = "kernels/triton/primitives.py", "kernels/triton/scales.py"
TRITON_TILES, TRITON_GRADIENT = "kernels/triton/tiles.py", "kernels/triton/gradient.py"
EPILOGUE, CPU_TILES, INDEX = "csrc/cpu/epilogue_body.h", "csrc/cpu/relation_tiles.cpp", "csrc/common/index.h"
CPU_LOSS, CPU_MATRICES, AUTOGRAD = "csrc/cpu/loss.cpp", "csrc/cpu/relation_matrices.cpp", "csrc/autograd.cpp"
CUDA_TILES, CUDA_EPILOGUE = "csrc/cuda/sm80/relation_tiles.cuh", "csrc/cuda/sm80/epilogue.cuh"
CUDA_CONFIG = "csrc/cuda/sm80/config.h"
CUDA_MOMENTS, CUDA_NORMS = "csrc/cuda/algebra/moments.cuh", "csrc/cuda/algebra/norms.cuh"
CUDA_GRADIENT, CUDA_PANELS = "csrc/cuda/algebra/gradient.cuh", "csrc/cuda/algebra/panels.cuh"
HOPPER_TILES, HOPPER_EPILOGUE = "csrc/cuda/sm90/relation_tiles.cuh", "csrc/cuda/sm90/epilogue.cuh"
HOPPER_LOADERS = "csrc/cuda/sm90/loaders.cuh"
HOPPER_PREPARE, HOPPER_WORK = "csrc/cuda/sm90/prepare.cuh", "csrc/cuda/sm90/work.h"
HOPPER_SCHEDULES = "tests/csrc/test_sm90_tiles.py -k schedule or races"

BACKENDS = {
    "blocked": Backend(
        "tests/kernels/test_backends.py -k blocked",
        [
            Fault(
                "sign(0) is not 0",
                FORMULAS,
                "return difference.sign()",
                "return 2 * (difference >= 0).to(difference) - 1",
            ),
            Fault("huber: wrong offset of the linear part", FORMULAS, "delta * (size - 0.5 * delta)", "delta * size"),
            Fault(
                "a norm of exactly eps counts as nonzero",
                FORMULAS,
                "torch.where(norm <= relation.eps",
                "torch.where(norm < relation.eps",
            ),
            Fault(
                "row: correction M_w q dropped",
                FORMULAS,
                "            result.mT.baddbmm_(weighted_moment, features.mT, alpha=-scale)\n",
                "",
            ),
            Fault(
                "cosine: correction dropped",
                FORMULAS,
                "result.sub_((h * alpha.square()).unsqueeze(-1) * features).mul_(scale)",
                "result.mul_(scale)",
            ),
            Fault(
                "cosine: the diagonal is not a tie",
                STRIPS,
                "difference.diagonal(diagonal, 1, 2).mul_(0)",
                "difference.diagonal(diagonal, 1, 2)",
            ),
            Fault(
                "row: K is not symmetric",
                STRIPS,
                "addcmul_(mirrored_slope, alpha_columns.unsqueeze(1))",
                "addcmul_(mirrored_slope, alpha_rows.unsqueeze(2))",
            ),
            Fault(
                "the mirrored half of the loss counts once",
                BLOCKED,
                "2 * value[..., own:].sum((1, 2))",
                "value[..., own:].sum((1, 2))",
            ),
            Fault("the last strip is skipped", BLOCKED, "range(0, pixels, rows)", "range(0, pixels - 1, rows)"),
            Fault(
                "h of the columns dropped",
                BLOCKED,
                "            h[:, rest] += terms.mirrored_h[..., own:].sum(1)\n",
                "",
            ),
        ],
    ),
    "closed_form": Backend(
        "tests/kernels/test_backends.py tests/test_loss.py -k closed_form",
        [
            Fault("the loss includes the diagonal", CLOSED_FORM, "loss = loss - total(excess.square().sum(1))", "pass"),
            Fault("h includes the diagonal", CLOSED_FORM, "h = 2 * (h - 2 * excess * diagonal_s)", "h = 2 * h"),
            Fault(
                "U includes the diagonal",
                CLOSED_FORM,
                "U = U - (4 * excess * row_s).unsqueeze(-1) * student",
                "pass",
            ),
            Fault("zero rows of the teacher count", CLOSED_FORM, "total((alpha_t > 0).sum(1))", "total(ones.sum(1))"),
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
            Fault(
                "the tie is beside the diagonal", EPILOGUE, "if (j == tie / LANES) d[", "if (j == tie / LANES + 1) d["
            ),
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
            Fault("the tie of a block is that of the first", EPILOGUE, "tie = tile.diagonal + i;", "tie = i;"),
            Fault(
                "norm terms are not symmetric",
                EPILOGUE,
                "gram[j] * column_s[j] * (h_column[j] * column_s[j])",
                "gram[j] * row_s * weight",
            ),
            Fault(
                "rows are not completed by symmetry",
                CPU_MATRICES,
                "for (int64_t left = end; left < pixels",
                "for (int64_t left = end + LINE; left < pixels",
            ),
            Fault(
                "cosine: wrong sign of the correction",
                CPU_MATRICES,
                "+ rows.begin + i] -= tile.h_row",
                "+ rows.begin + i] += tile.h_row",
            ),
            Fault(
                "row: correction dropped",
                CPU_MATRICES,
                "if (relation_.normalize == Normalize::row) kernels_.subtract_norm_terms(tile, space_.h);",
                "",
            ),
            Fault("a norm of exactly eps counts as nonzero", CPU_MATRICES, "norm <= static_cast", "norm < static_cast"),
            Fault(
                "blocks of rows are skipped",
                CPU_MATRICES,
                "i % 2 ? blocks - 1 - i / 2 : i / 2",
                "i % 2 ? blocks - 2 - i / 2 : i / 2",
            ),
            Fault(
                "tiles: row: correction M_w q dropped",
                CPU_LOSS,
                "  sum.baddbmm_(at::bmm(weighted.mT(), features) / size.square(), features.mT(), 1, -1);\n",
                "",
            ),
            Fault("tiles: the mean of the features is lost", CPU_LOSS, "square.add_(", "square.clone().add_("),
            Fault(
                "the gradient of a mean is that of a sum",
                CPU_LOSS,
                "if (reduction == Reduction::mean) gradient_scale",
                "if (false) gradient_scale",
            ),
            Fault(
                "a mean is a sum",
                CPU_LOSS,
                "reduction == Reduction::mean ? total",
                "reduction == Reduction::none ? total",
            ),
            Fault(
                "the upstream gradient is ignored",
                "csrc/bindings.cpp",
                "grad_loss.view({-1, 1, 1}) : grad_loss)",
                "grad_loss.view({-1, 1, 1}) : at::empty({}, grad_loss.options()).fill_(1))",
                "tests/kernels/test_op.py -k native",
            ),
            Fault(
                "the batch's gradient is that of one image",
                AUTOGRAD,
                "gradient.view_symint({-1, pixels, gradient.sym_size(2)}).transpose(1, 2)",
                "gradient.transpose(1, 2)",
                "tests/kernels/test_distributed.py -k large_image",
            ),
            Fault(
                "a gradient is computed without need",
                AUTOGRAD,
                "loss_and_gradient(student, teacher, options, false));\n}\n\n// Where",
                "loss_and_gradient(student, teacher, options, true));\n}\n\n// Where",
                "tests/kernels/test_op.py -k native",
            ),
            Fault("the last pixel is skipped", INDEX, "left = pixels - begin;", "left = pixels - begin - (begin > 0);"),
        ],
        compiled=True,
    ),
    "triton": Backend(
        "tests/kernels/triton/test_interpreter.py",
        [
            Fault("sign(0) is not 0", TRITON_TILES, "return tl.where(difference == 0, 0.0, one)", "return one"),
            Fault(
                "masked elements are not 0",
                TRITON_PRIMITIVES,
                "offs_c * stride_c, mask=mask, other=0.0)",
                "offs_c * stride_c, mask=mask, other=1.0)",
            ),
            Fault(
                "the diagonal block counts twice",
                TRITON_TILES,
                "(start_n >= start_m + BLOCK_M)",
                "(start_n >= start_m)",
            ),
            Fault("row: K is not symmetric", TRITON_TILES, "DISTANCE) * alpha_sn", "DISTANCE) * alpha_sm"),
            Fault("cosine: h lacks the factor 2", TRITON_TILES, "            h *= 2\n", ""),
            Fault(
                "the tie is beside the diagonal",
                TRITON_TILES,
                "offs_m[:, None] == offs_n[None, :]",
                "offs_m[:, None] == offs_n[None, :] + 1",
            ),
            Fault(
                "the last column is skipped",
                TRITON_TILES,
                "first + split_columns, pixels)",
                "first + split_columns, pixels - 1)",
            ),
            Fault("missing transpose", TRITON_SCALES, "tl.trans(tile), start_j", "tile, start_j"),
            Fault(
                "row: correction M_w q dropped",
                TRITON_GRADIENT,
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
                "rows are not masked",
                CUDA_TILES,
                "const int left = i < lines ? valid : 0;",
                "const int left = i <= lines ? valid : 0;",
            ),
            Fault(
                "the tie is beside the diagonal",
                CUDA_TILES,
                "== warp.column(n, i % 2)) sum",
                "== warp.column(n, i / 2)) sum",
            ),
            Fault(
                "writes one channel too many",
                CUDA_TILES,
                "channel < p.features[1].channels)",
                "channel <= p.features[1].channels)",
            ),
            Fault("some pairs of blocks are skipped", CUDA_CONFIG, "(blocks + 1) / 2 + (", "(blocks + 1) / 2 + 0 * ("),
            Fault(
                "does not wait for a copy", CUDA_TILES, "wait_for_copies<PREFETCH - 1>()", "wait_for_copies<PREFETCH>()"
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
    "cuda_algebra": Backend(
        "tests/csrc/test_cuda_loss.py -k (every_relation and highest and nlc) or pixels_without or plans or "
        "deterministic or reductions",
        [
            Fault(
                "masks one pixel or channel too many",
                CUDA_PANELS,
                "minimum(PIXELS_ADJACENT ? pixels.end - at : from.channels - c, UNIT)",
                "minimum((PIXELS_ADJACENT ? pixels.end - at : from.channels - c) - 1, UNIT)",
            ),
            Fault(
                "pixels outside the image are shifted",
                CUDA_MOMENTS,
                "Part::pixel_at(pixels, pixel) < pixels.end ? x",
                "Part::pixel_at(pixels, pixel) <= pixels.end ? x",
            ),
            Fault(
                "moments: missing barrier",
                CUDA_MOMENTS,
                "      sync_block();  // the panels are free\n      const Pixels pixels{pixel, end};",
                "      const Pixels pixels{pixel, end};",
            ),
            Fault(
                "moments: the last range is dropped",
                CUDA_MOMENTS,
                "split < splits; ++split",
                "split < splits - 1; ++split",
            ),
            Fault("moments: no shift to the mean", CUDA_MOMENTS, "return any;", "return false;"),
            Fault(
                "moments: the shift is not undone",
                CUDA_MOMENTS,
                "count * vector(OFFSETS_AT, 0, row) * vector(OFFSETS_AT, 1, column + i)",
                "0 * vector(OFFSETS_AT, 0, row) * vector(OFFSETS_AT, 1, column + i)",
            ),
            Fault(
                "weighted moment: the first block sums",
                CUDA_MOMENTS,
                "== p.ranges.splits - 1 ? 1 : 0",
                "== 0 ? 1 : 0",
            ),
            Fault(
                "weighted moment: counted before all threads have written",
                CUDA_MOMENTS,
                "    fence_device();\n    sync_block();\n",
                "    fence_device();\n",
            ),
            Fault("norms: the mean's term is dropped", CUDA_NORMS, "sum(false) + dot * dot", "sum(false)"),
            Fault(
                "norms: blocks beside the diagonal count once", CUDA_NORMS, "total[m][j][i] *= 2", "total[m][j][i] *= 1"
            ),
            Fault(
                "norms: missing barrier",
                CUDA_NORMS,
                "sync_block();  // the panels have arrived",
                "// the panels have arrived",
            ),
            Fault("cosine: correction dropped", CUDA_GRADIENT, "r + e : r) * 4) * q[e]", "r + e : r) * 4) * 0"),
            Fault("row: correction M q dropped", CUDA_GRADIENT, "add_product_with(MOMENT_AT);", ""),
            Fault("row: correction M_w q dropped", CUDA_GRADIENT, "add_product_with(WEIGHTED_AT);", ""),
            Fault(
                "the last part of the loss is dropped",
                CUDA_GRADIENT,
                "i < count; i += THREADS",
                "i < count - 1; i += THREADS",
            ),
            Fault("mean is sum", "csrc/cuda/loss_plan.h", "a.reduction == Reduction::mean", "false"),
        ],
    ),
    "hopper": Backend(
        "tests/csrc/test_sm90_tiles.py -k every_relation or exactly_zero or schedule or races",
        [
            Fault(
                "missing proxy fence between K and its products",
                HOPPER_TILES,
                "            fence_async_proxy();\n          }\n          sync_warp();",
                "          }\n          sync_warp();",
            ),
            Fault(
                "the turn to add is handed over too early",
                HOPPER_TILES,
                "          wait_for_bulk<0>();\n          fence_async_proxy_global();\n          fence_gpu();",
                "          fence_gpu();",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "additions in any order",
                HOPPER_TILES,
                "            wait_until_at_least(p.additions + at, before);\n",
                "",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "a slot of the ring is released before its products ended",
                HOPPER_TILES,
                "      wait_for_products<1>();\n      release(at - 1",
                "      release(at - 1",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "missing barrier of the warp before K is announced",
                HOPPER_TILES,
                "          sync_warp();\n          arrive_warp(base + C::K_FULL);",
                "          arrive_warp(base + C::K_FULL);",
            ),
            Fault(
                "K is overwritten while it is read",
                HOPPER_TILES,
                "if (half == 1 && lane == 0) arrive(base + C::K_EMPTY);",
                "if (half == 0 && lane == 0) arrive(base + C::K_EMPTY);",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "the bytes of the scales are not expected",
                HOPPER_LOADERS,
                "arrive_expecting(barrier, C::TERMS * CHUNK + SCALES);",
                "arrive_expecting(barrier, C::TERMS * CHUNK);",
            ),
            Fault(
                "missing proxy fence after the features were copied",
                HOPPER_PREPARE,
                "    sync_grid();\n    fence_async_proxy_global();\n",
                "    sync_grid();\n",
            ),
            Fault(
                "an addition waits for a later one",
                HOPPER_WORK,
                "return step < other.step || ",
                "return step > other.step || ",
                HOPPER_SCHEDULES,
            ),
            Fault(
                "sign(0) is not 0",
                HOPPER_EPILOGUE,
                "if (any_of_warp(smallest == 0))",
                "if (any_of_warp(smallest == 1))",
            ),
        ],
    ),
    "distributed": Backend(
        "tests/kernels/test_distributed.py",
        [
            Fault(
                "ties between pixels of different ranks",
                DISTRIBUTED,
                "diagonal=start if columns is rows",
                "diagonal=start if rows.student.shape == columns.student.shape",
            ),
            Fault(
                "wrong ties in strips after the first",
                DISTRIBUTED,
                "diagonal=start if",
                "diagonal=0 if",
            ),
            Fault("the gradient is that of one rank's loss", DISTRIBUTED, "ctx.ranks * grad_loss", "grad_loss"),
            Fault(
                "cosine: h lacks the factor 2",
                STRIPS,
                "h = strip.relations.mul_(K)",
                "h = strip.relations.mul_(slope)",
            ),
            Fault(
                "row: K is not symmetric",
                STRIPS,
                "addcmul_(mirrored_slope, alpha_columns.unsqueeze(1))",
                "addcmul_(mirrored_slope, alpha_rows.unsqueeze(2))",
            ),
            Fault("the loss covers one rank's rows", DISTRIBUTED, "sum_over_ranks(loss, group)", "loss"),
            Fault("scales cover one rank's pixels", DISTRIBUTED, "relation, dtype, total, pixels)", "relation, dtype)"),
            Fault(
                "M_w covers one rank's pixels",
                DISTRIBUTED,
                "scales, relation, total, pixels)",
                "scales, relation, formulas.identity, pixels)",
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


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, with its packages first in sys.path."""
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(folder), **environment}
    settings["PYTHONDONTWRITEBYTECODE"] = "1"  # caches hide a fault of equal length in the same second
    return subprocess.run(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def compile_native(folder: Path, flags: str = "-O1", **environment: str) -> str | None:
    """Build the extension of the copy without CUDA. Return the output if the build fails, or None."""
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    environment |= {"SRPKD_BUILD_CUDA": "0", "SRPKD_CXX_FLAGS": flags}
    program = "import pathlib, sys; from srpkd.kernels import build; build.build_in(pathlib.Path(sys.argv[1]))"
    done = run([sys.executable, "-c", program, str(objects)], folder, environment)
    if done.returncode:
        return done.stdout
    shutil.copy(objects / "_native.so", folder / "kernels" / "_native.so")
    return None


def run_tests(folder: Path, backend: Backend, tests: str = "") -> tuple[str, str]:
    """Run the tests in the copy. Return "passed", "failed" or "broken", and the first failure."""
    if backend.compiled and (output := compile_native(folder)) is not None:
        return "broken", f"compiler: {output[-2000:]}"
    modules = "blocked, closed_form, distributed, formulas, native, strips, triton"
    program = f"import srpkd.kernels, sys; from srpkd.kernels import {modules}; print(srpkd.kernels.__file__)"
    imported = run([sys.executable, "-c", program], folder, backend.environment)
    if imported.stdout.strip().splitlines()[-1:] != [str(folder / "srpkd" / "kernels" / "__init__.py")]:
        return "broken", f"the copy is not imported: {imported.stdout[-2000:]}"
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
        return "broken", f"error outside the tests: {done.stdout[-2000:]}"
    failures = [
        (case.get("name", ""), failure.get("message", "")) for case in cases for failure in case.iter("failure")
    ]
    if not failures:
        return ("passed", f"{len(cases)} tests") if len(cases) > 5 else ("broken", f"only {len(cases)} tests")
    test, message = failures[0]
    if message.startswith(("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError")):
        return "broken", message
    return "failed", test


def check_backend(name: str, backend: Backend) -> list[str]:
    """Run the tests of a backend without a fault and with each fault; print and return the verdicts."""
    verdicts: list[str] = []

    def report(fault: str, verdict: str, detail: str, start: float) -> None:
        verdicts.append(verdict)
        print(f"{name:12} {fault:46} {verdict:9} {time.monotonic() - start:4.0f} s  {detail.strip()}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        start = time.monotonic()
        verdict, detail = run_tests(folder, backend)
        report("(no fault)", verdict, detail, start)
        for fault in backend.faults if verdict == "passed" else []:
            start, path = time.monotonic(), folder / fault.path
            text = path.read_text()
            if (count := text.count(fault.old)) != 1:
                report(fault.name, "broken", f"{count} times in {fault.path}: {fault.old!r}", start)
                continue
            path.write_text(text.replace(fault.old, fault.new))
            verdict, detail = run_tests(folder, backend, fault.tests)
            report(fault.name, {"failed": "killed", "passed": "SURVIVED"}.get(verdict, verdict), detail, start)
            path.write_text(text)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", help=f"{', '.join(BACKENDS)} (default: all)")
    chosen = parser.parse_args().backends or list(BACKENDS)
    if unknown := [name for name in chosen if name not in BACKENDS]:
        parser.error(f"unknown backend {', '.join(unknown)}: expected {', '.join(BACKENDS)}")
    verdicts = [verdict for name in chosen for verdict in check_backend(name, BACKENDS[name])]
    failed = sum(verdict not in ("killed", "passed") for verdict in verdicts)
    print(f"\n{verdicts.count('killed')} faults killed, {failed} not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
