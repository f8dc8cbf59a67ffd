"""Nsight Compute (ncu): its command line, and the pages "details" and "source" that it prints of a report."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import machine_code

# name and unit, as ncu scales it -> column and factor
METRICS = {
    ("Duration", "ns"): ("us", 1e-3),
    ("Duration", "us"): ("us", 1.0),
    ("Duration", "ms"): ("us", 1e3),
    ("Elapsed Cycles", "cycle"): ("cycles", 1.0),
    ("Registers Per Thread", "register/thread"): ("registers", 1.0),
    ("Local Memory Spilling Requests", ""): ("spills", 1.0),
    ("Achieved Occupancy", "%"): ("occupancy", 1.0),
    ("DRAM Throughput", "%"): ("dram", 1.0),
    ("L2 Cache Throughput", "%"): ("l2", 1.0),
    ("Compute (SM) Throughput", "%"): ("compute", 1.0),
}
ALL_SAMPLES = "Warp Stall Sampling (All Samples)"
LAUNCH = re.compile(r"  (\S.*) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), Context ")


def find() -> str:
    """Return the path of Nsight Compute's command line.

    Raises:
        OSError: It is not installed.
    """
    roots = ("/usr/local", "/opt/nvidia/nsight-compute")
    found = [str(path) for root in roots for pattern in ("cuda*/bin/ncu", "*/ncu") for path in Path(root).glob(pattern)]
    if (path := shutil.which("ncu") or max(found, default=None)) is None:
        raise OSError(
            f"Nsight Compute is not installed: no ncu in PATH or in {' or '.join(roots)}. Install the package "
            "nsight-compute of the CUDA toolkit, or use `python -m bench breakdown`, which needs none"
        )
    return path


def output(command: Sequence[str]) -> str:
    """Run Nsight Compute and return what it prints.

    Raises:
        OSError: It fails, for example since users may not read the GPU's counters.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " ".join((done.stdout[-600:] + done.stderr[-600:]).split())
        raise OSError(f"{Path(command[0]).name}: exit status {done.returncode}: {last}")
    return done.stdout


class Row(NamedTuple):
    """An instruction of the page "source"."""

    opcode: str
    executed: int
    stalls: Counter[str]


class Kernel(NamedTuple):
    """A launch: its full name, its metrics by column, and its instructions."""

    name: str
    metrics: dict[str, float]
    rows: list[Row]


def kernels_of(details: str, source: str) -> list[Kernel]:
    """Return the kernels of the pages "details" and "source", in their order.

    Raises:
        OSError: The pages are of different kernels, or in an unknown format.
    """
    metrics, printed = list(metrics_of(details)), list(rows_of(source))
    rows: list[tuple[str, list[Row]]] = []
    surplus = len(printed) - len(metrics)
    for entry in printed:
        if surplus > 0 and rows and entry == rows[-1]:  # ncu 2025 prints some kernels twice
            surplus -= 1
        else:
            rows.append(entry)
    if not rows or len(metrics) != len(rows):
        raise OSError(f"ncu has printed details of {len(metrics)} kernels, and the instructions of {len(rows)}")
    return [Kernel(name, found, own) for found, (name, own) in zip(metrics, rows)]


def metrics_of(details: str) -> Iterator[dict[str, float]]:
    """Yield the metrics of each kernel in the page "details"."""
    found: dict[str, float] | None = None
    for line in details.splitlines():
        if LAUNCH.match(line):
            if found is not None:
                yield found
            found = {}
        elif found is not None:
            name, *unit, value = re.split(r"\s{2,}", line.strip()) if "  " in line.strip() else ("", "")
            metric = METRICS.get((name, "".join(unit)))
            if metric and re.fullmatch(r"[\d,.]+", value):  # not "n/a"
                found.setdefault(metric[0], float(value.replace(",", "")) * metric[1])
    if found is not None:
        yield found


def rows_of(source: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name and the instructions of each kernel in the page "source"."""
    name = ""
    rows: list[Row] = []
    header: list[str] = []
    for cells in csv.reader(io.StringIO(source)):
        if cells[:1] == ["Kernel Name"]:
            if name:
                yield name, rows
            name, rows = cells[1], []
        elif cells[:2] == ["Address", "Source"]:
            header = cells
            stalls = [i for i, label in enumerate(header) if re.fullmatch(r"stall_\w+", label)]
            executed, every = (header.index(label) for label in ("Instructions Executed", ALL_SAMPLES))
        elif name and len(cells) == len(header):
            samples = Counter({header[i].removeprefix("stall_"): int(cells[i]) for i in stalls if cells[i] != "0"})
            if other := int(cells[every]) - samples.total():
                samples["gmma"] = other  # without a column of its own: all are at HGMMA
            rows.append(Row(machine_code.opcode(cells[1]), int(cells[executed]), samples))
    if name:
        yield name, rows


def words_of(kernel: Kernel) -> set[str]:
    """Return the identifiers in a kernel's name, which its mangled name contains too."""
    name = kernel.name.partition("(anonymous")[0].removeprefix("void ").rpartition("(")[0]
    return set(re.findall(r"[A-Za-z_]\w+", name)) - {"bool", "int"}
