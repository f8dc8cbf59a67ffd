"""Profile of every kernel in one call of the relation loss on a GPU, by NVIDIA Nsight Compute.

    python -m bench profile --out DIR                                  native-sm90, 16 images of 4,096 pixels
    python -m bench profile --providers closed_form --normalize row --distance l2 --out DIR

For each kernel: duration, registers, requests of spilled registers, occupancy, throughput of DRAM, L2 and the
multiprocessors in percent of their peak, and what its warps waited for in percent of the samples, in ncu's terms
("gmma": for a product by wgmma). Then for the longest kernel, and in DIR for all: the share of the samples by source
line. A line that calls a function includes the function, whose lines follow, indented. Lines with less than 2 % are
left out, and those with nearly everything of the line that calls them.

Nsight Compute runs each kernel many times, at the clocks that the GPU chooses and with a cold cache. DIR receives its
report (*.ncu-rep.gz, for ncu-ui), its pages "details" and "source", and the tables.
"""

from __future__ import annotations

import argparse
import gzip
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from srpkd.checking.cases import Case, settings
from srpkd.checking.kernels import CannotRun
from srpkd.files import expand_user
from srpkd.kernels import build, native
from srpkd.reporting.table import format_table

from . import cases, machine_code, ncu
from .breakdown import short_name
from .machine_code import Frame, Instruction
from .ncu import Kernel, Row
from .providers import PROVIDERS, add_option, prepare_call

DEFAULT = ("native-sm90",)
LEAST_SHARE, NEARLY_ALL = 0.02, 0.95  # of the samples: of lines that are shown, of lines that are left out
LINES = 45  # that are shown
CAUSES = 3  # of stalls
COLUMNS = [
    {"key": "kernel"},
    {"key": "us", "format": ",.1f"},
    {"key": "cycles", "format": ",.0f"},
    {"key": "registers", "format": ".0f"},
    {"key": "spills", "format": ",.0f"},
    {"key": "occupancy", "label": "occupancy %", "format": ".0f"},
    {"key": "dram", "label": "DRAM %", "format": ".0f"},
    {"key": "l2", "label": "L2 %", "format": ".0f"},
    {"key": "compute", "label": "compute %", "format": ".0f"},
    {"key": "stalls", "label": "samples: waiting for"},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    parser.set_defaults(pixels=[4096], batch=[16], dtype=["bfloat16"])
    add_option(parser, DEFAULT, " ".join(DEFAULT))
    parser.add_argument("--out", type=expand_user, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # runs inside ncu


def run(options: argparse.Namespace) -> None:
    """Profile each case with each provider, and print the tables.

    Raises:
        ValueError: The device is not a GPU.
        OSError: Nsight Compute is not installed, or fails for every case.
    """
    if cases.device_of(options) == "cpu":
        raise ValueError("the profile measures kernels on a GPU, and torch sees none")
    selected = [(case, name) for case in cases.selected(options) for name in options.providers]
    if options.worker:
        profiled_call(*selected[0])
        return
    tool = ncu.find()
    options.out.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    for case, name in selected:
        print(f"{name}: {case.describe()}", flush=True)
        try:
            print(profile(tool, case, name, options.out), flush=True)
        except OSError as error:
            errors.append(str(error))
            print(f"  {error}", flush=True)
    if len(errors) == len(selected):
        raise OSError("Nsight Compute has profiled nothing")


def profiled_call(case: Case, name: str) -> None:
    """Make one call that Nsight Compute measures, after others that it does not."""
    provider = PROVIDERS[name]
    if (reason := provider.unavailable_reason(case)) is not None:
        sys.exit(f"{name}: {reason}")
    with settings(case):
        call = prepare_call(name, case)
        try:
            for _ in range(3):
                call()
        except CannotRun as error:
            sys.exit(f"{name}: {error}")
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(tool: str, case: Case, name: str, out: Path) -> str:
    """Profile a call, and return the tables to print.

    Raises:
        OSError: Nsight Compute fails.
    """
    to = out / re.sub(r"[^\w.]+", "-", f"{name} {case.describe().partition(',')[0]}")
    report = Path(f"{to}.ncu-rep")
    # the pages do not need the sources, which the report would contain once for every kernel
    collect = [tool, "--set", "full", "--import-source", "no", "--clock-control", "none", "--profile-from-start", "off"]
    command = [sys.executable, "-m", "bench", "profile", "--worker", "--out", str(out), *arguments_of(case, name)]
    ncu.output([*collect, "--force-overwrite", "--export", str(report), *command])
    if not report.exists():
        raise OSError(f"{tool} has written no report: no kernel was launched")
    Path(f"{report}.gz").write_bytes(gzip.compress(report.read_bytes(), compresslevel=3))
    imported = [tool, "--import", str(report), "--page"]
    with ThreadPoolExecutor() as pool:
        details, source = pool.map(ncu.output, ([*imported, "details"], [*imported, "source", "--csv"]))
    report.unlink()
    Path(f"{to}.details.txt").write_text(details, encoding="utf-8")
    Path(f"{to}.source.csv.gz").write_bytes(gzip.compress(source.encode(), compresslevel=3))
    kernels = ncu.kernels_of(details, source)
    try:
        instructions = machine_code.disassemble(Path(native.extension().__file__ or ""), map(ncu.words_of, kernels))
        note = ""
    except (OSError, RuntimeError) as error:
        instructions, note = [], f"no source lines: {error}"
    Path(f"{to}.txt").write_text("\n".join(report_of(kernels, instructions, everything=True)) + "\n", encoding="utf-8")
    return "\n".join(report_of(kernels, instructions)) + f"\n{note}"


def arguments_of(case: Case, name: str) -> list[str]:
    """Return the options that select one case and one provider."""
    values = case.columns() | {"device": case.device, "providers": name}
    return [word for option, value in values.items() for word in (f"--{option}", str(value))]


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """The samples of a source line, by cause, and those of the lines of the functions that it calls."""

    stalls: Counter[str] = field(default_factory=Counter)
    executed: int = 0  # instructions of warps
    children: dict[Frame, Node] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return self.stalls.total()

    def add(self, row: Row) -> None:
        self.stalls += row.stalls
        self.executed += row.executed


def report_of(
    kernels: Sequence[Kernel], instructions: Sequence[Sequence[Instruction]], everything: bool = False
) -> Iterator[str]:
    """Yield the table of the kernels, and the source lines of the longest kernel or of all."""
    by_opcodes = {tuple(one.opcode for one in function): function for function in instructions}
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        total: Counter[str] = sum((row.stalls for row in kernel.rows), Counter())
        rows.append({"kernel": short_name(kernel.name), "stalls": causes(total, total.total())} | kernel.metrics)
    rows.append({"kernel": "all", "us": sum(kernel.metrics.get("us", 0.0) for kernel in kernels)})
    yield format_table({"columns": COLUMNS, "rows": rows})
    longest = max(kernels, key=lambda kernel: kernel.metrics.get("us", 0.0))
    for kernel in kernels if everything else [longest]:
        # the extension has other instantiations of the same template: the instructions tell which one this is
        function = by_opcodes.get(tuple(row.opcode for row in kernel.rows))
        if function is not None:
            root = tree(kernel.rows, function)
            lines = [
                f"{short_name(kernel.name)}: {root.samples:,} samples of {len(function):,} instructions",
                "samples       executed  source line",
                *lines_of(root, root.samples),
            ]
            shown = lines if everything else lines[:LINES]
            yield "\n".join(["", *shown, *([f"and {len(lines) - LINES} more"] if len(shown) < len(lines) else [])])
        elif instructions and not everything:
            yield f"\nno source lines of {short_name(kernel.name)}: the extension has no kernel of these instructions"


def causes(stalls: Counter[str], total: int) -> str:
    """Return the most frequent causes of stalls, in percent of all samples. "selected" is not one: the warp issued."""
    found = [(name, count) for name, count in stalls.most_common() if name != "selected"]
    return ", ".join(f"{name} {100 * count / max(total, 1):.0f}" for name, count in found[:CAUSES])


def tree(rows: Sequence[Row], function: Sequence[Instruction]) -> Node:
    """Return the samples of a kernel by line and called line."""
    root = Node()
    for row, instruction in zip(rows, function, strict=True):
        node = root
        node.add(row)
        for frame in instruction.frames:
            node = node.children.setdefault(Frame(relative(frame.file), frame.line), Node())
            node.add(row)
    return root


def lines_of(node: Node, total: int, depth: int = 0, above: int = 0) -> Iterator[str]:
    """Yield the lines of the called functions that have enough samples, the most frequent first."""
    above = above or node.samples
    for frame, child in sorted(node.children.items(), key=lambda item: (-item[1].samples, item[0])):
        if child.samples < LEAST_SHARE * total:
            break
        shown = child.samples < NEARLY_ALL * above
        if shown:
            share = f"{100 * child.samples / total:5.1f} %  {child.executed:13,}  "
            where = f"{Path(frame.file).name}:{frame.line}"
            yield f"{share}{'  ' * depth}{where}  {text_of(frame)}  ({causes(child.stalls, child.samples)})"
        yield from lines_of(child, total, depth=depth + shown, above=child.samples if shown else above)


@cache
def relative(file: str) -> str:
    """Return the path of a source below csrc/, wherever it was compiled, or the whole path if it is elsewhere."""
    _, found, below = f"/{file}".rpartition("/csrc/")
    return posixpath.normpath(below) if found else file


@cache
def source_lines(file: Path) -> Sequence[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ()


def text_of(frame: Frame) -> str:
    """Return the text of a source line."""
    lines = source_lines(build.CSRC / frame.file)
    return lines[frame.line - 1].strip()[:70] if frame.line <= len(lines) else ""
