"""Every kernel on forty small cases: against float64, and twice for equal bits. About a minute on a GPU.

    python -m bench.smoke OUT [--seconds 60]

Each kernel runs in its own processes, which are replaced if they crash or hang, so that a fault of one kernel does not
hide the results of the others. The results are written to OUT/smoke.jsonl as they arrive; with the same OUT, the
missing cases are run. The exit status is 1 if a result is wrong, differs between two runs, or is missing. A case that a
kernel declares as not covered is not an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpkd.kernels import DISTANCES, NORMALIZATIONS
from srpkd.kernels.formulas import Distance, Normalize
from srpkd.reporting.table import format_table

from . import gate
from .cases import PRECISIONS, Case, features, settings
from .providers import PROVIDERS, CannotRun, evaluate

PROGRAM = (sys.executable, "-m", "bench.smoke")
GPU_KERNELS = ("native-sm90", "native-sm80", "native", "closed_form", "triton")
CPU_KERNELS = ("native", "closed_form", "blocked")  # dry run
SHARDS = {"triton": 6}  # processes of a kernel; Triton compiles for most cases
FINAL = ("ok", "wrong", "bits differ", "not covered")  # results that a repetition would not change
SILENCE = 45.0  # seconds without a result after which a process counts as hung; the first includes importing torch
RESTARTS = 4  # of a kernel's process, after crashes and hangs
NOISE = 0.03
# With one channel, the rows of a matrix differ in their signs only: the gradient is an eightieth of U, and the rounding
# of K to bfloat16 makes an error of 0.07 of it, and 1.2 of one pixel's. Eager PyTorch's are 0.09 and 1.4.
ONE_CHANNEL = {"bfloat16": gate.Errors(1e-3, 0.15, 3.0)}


class Check(NamedTuple):
    """A case and its kind of features: "random", "zero norm", "tokens" (other strides) or "close" (to convergence)."""

    case: Case
    kind: str = "random"

    def describe(self) -> str:
        return self.case.describe().partition(",")[0] + ("" if self.kind == "random" else f", {self.kind}")


def checks(device: str) -> list[Check]:
    """Return the cases, the most telling first."""

    base = Case(200, (64, 256), 2, "bfloat16", device=device, threads=1)

    def case(normalize: Normalize = "row", distance: Distance = "l1", **options: Any) -> Case:
        return replace(base, normalize=normalize, distance=distance, **options)

    some: list[tuple[Normalize, Distance]] = [("row", "l1"), ("cosine", "l2"), ("none", "huber")]
    found = [Check(case(normalize, distance)) for distance in DISTANCES for normalize in NORMALIZATIONS]
    formats: list[dict[str, Any]] = [{"dtype": "float16"}]
    formats += [{"dtype": "float32", "precision": precision} for precision in PRECISIONS]
    for options in formats:
        found += [Check(case(*relation, **options)) for relation in some]
    found += [Check(case(pixels=pixels, batch=1)) for pixels in (1, 65, 128, 1025, 4096)]
    sizes = ((1, 1), (16, 64), (128, 256), (256, 1024), (300, 129))
    found += [Check(case(pixels=130, channels=channels)) for channels in sizes]
    found += [Check(case(*relation, mode="forward")) for relation in some]
    found += [Check(case(), "zero norm"), Check(case("cosine", "l2"), "zero norm"), Check(case(), "tokens")]
    found += [Check(case("cosine", "l2", channels=(64, 64)), "close")]
    found += [Check(case(*relation, pixels=256, batch=16)) for relation in some[:2]]
    return found if device == "cuda" else found[::7]


def inputs(check: Check) -> tuple[Tensor, Tensor]:
    """Return the features of student and teacher."""
    student, teacher = features(check.case)
    if check.kind == "zero norm":
        student[:, ::3], teacher[:, 1::4] = 0, 0
    if check.kind == "tokens":
        student, teacher = student.contiguous(), torch.cat((teacher, teacher), 2)[:, :, ::2].copy_(teacher)
    if check.kind == "close":
        student = (teacher.float() + NOISE * student.float()).to(teacher.dtype)
    return student, teacher


# --- the process of a kernel ----------------------------------------------------------------------------------------


def work(kernel: str, device: str, numbers: Iterable[int]) -> None:
    """Run cases by their numbers, and print a line of JSON before and after each."""
    everything = checks(device)
    for number in numbers:
        print(json.dumps({"case": number}), flush=True)
        start = time.perf_counter()
        result = outcome(kernel, everything[number])
        print(json.dumps({"case": number, "seconds": round(time.perf_counter() - start, 2)} | result), flush=True)
        if result["status"] == "crashed":
            sys.exit(1)  # after an error of CUDA, the process cannot use the GPU any more


def outcome(kernel: str, check: Check) -> dict[str, Any]:
    """Return the status of a kernel on a case, its errors and what is wrong."""
    case, provider = check.case, PROVIDERS[kernel]
    if (reason := provider.unavailable_reason(case)) is not None:
        return {"status": "not covered", "reason": reason}
    try:
        with settings(case):
            student, teacher = inputs(check)
            loss = provider.make(case)
            first, second = (evaluate(loss, student, teacher, case) for _ in range(2))
            found, reason = compare(first, check, student, teacher)
        status = "ok" if reason is None else "wrong"
        pairs = zip(first, second)
        if reason is None and not all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None):
            status, reason = "bits differ", "two runs give different bits"
        return {"status": status, "reason": reason or ""} | found._asdict()
    except CannotRun as error:
        return {"status": "not covered", "reason": str(error)}
    except Exception as error:  # everything that a kernel can raise is a result
        return {"status": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def compare(
    result: tuple[Tensor, Tensor | None], check: Check, student: Tensor, teacher: Tensor
) -> tuple[gate.Errors, str | None]:
    """Return the errors of a result against float64, and the reason why they are too large, if they are."""
    value, gradient = result
    if check.case.pixels == 1:  # the relation of a pixel to itself is constant: the exact gradient is 0
        finite = value.isfinite().all() and (gradient is None or gradient.isfinite().all())
        return gate.Errors(0.0), None if finite else "the loss or the gradient of a single pixel is not finite"
    if check.kind == "zero norm":  # where the definitions in bench.peers and PyTorch have gradients of 1/eps
        reference = PROVIDERS["reference"].make(check.case)
        expected = gate.Result(
            *evaluate(reference, student.double(), teacher.double(), replace(check.case, dtype="float64"))
        )
    else:
        expected = gate.float64_result(student, teacher, check.case)
    if gradient is not None:
        gradient = gradient.double() / check.case.loss_scale
    found = gate.relative_errors(gate.Result(value, gradient), expected)
    limits = ONE_CHANNEL if check.case.channels == (1, 1) else gate.KERNEL_LIMITS
    return found, gate.failure_reason(found, check.case, limits)


# --- the processes of all kernels -----------------------------------------------------------------------------------


class Runner:
    """Run the missing cases of all kernels in processes, and collect the results."""

    def __init__(self, out: Path, device: str, seconds: float) -> None:
        self.file, self.device, self.deadline = out / "smoke.jsonl", device, time.monotonic() + seconds
        self.lock = threading.Lock()
        self.results = recorded(self.file)

    def run(self, kernels: Sequence[str], count: int) -> None:
        """Run all kernels at once, each in as many processes as SHARDS says."""
        threads = []
        for kernel in kernels:
            missing = [n for n in range(count) if self.results.get((kernel, n), {}).get("status") not in FINAL]
            shards = min(SHARDS.get(kernel, 1), max(1, (os.cpu_count() or 1) // 2))
            parts = [missing[start::shards] for start in range(shards)]
            threads += [threading.Thread(target=self.run_shard, args=(kernel, part)) for part in parts if part]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run_shard(self, kernel: str, numbers: list[int]) -> None:
        """Run cases of one kernel; replace the process after a crash, until the time is over."""
        for _ in range(RESTARTS):
            if not numbers or time.monotonic() > self.deadline:
                return
            numbers = self.run_process(kernel, numbers)

    def run_process(self, kernel: str, numbers: list[int]) -> list[int]:
        """Run cases in one process, and return those that are left after it ended."""
        process = subprocess.Popen(
            [*PROGRAM, "--worker", kernel, "--device", self.device, "--cases", ",".join(map(str, numbers))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines: Queue[str | None] = Queue()
        errors: deque[str] = deque(maxlen=3)

        def read_output() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        readers = [
            threading.Thread(target=read_output),
            threading.Thread(target=lambda: errors.extend(process.stderr or ())),
        ]
        for reader in readers:
            reader.start()
        left, started = list(numbers), None
        status, reason = "crashed", ""
        while True:
            wait = min(SILENCE, self.deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(wait, 0.0))
            except Empty:
                status, reason = ("hung", f"no result for {SILENCE:g} s") if wait == SILENCE else ("no time", "")
                process.kill()
                break
            if line is None:
                break
            entry = json.loads(line)
            started = entry["case"]
            if "status" in entry:
                self.add(kernel, entry)
                left.remove(started)
                started = None
        process.wait()
        for reader in readers:
            reader.join()
        if status == "no time":
            return []
        if started is None and len(left) == len(numbers):  # it ended before its first case
            started = left[0]
        if started is not None:
            reason = reason or f"exit status {process.returncode}: {' '.join(' '.join(errors).split())[-300:]}"
            self.add(kernel, {"case": started, "status": status, "reason": reason})
            left.remove(started)
        return left

    def add(self, kernel: str, entry: dict[str, Any]) -> None:
        """Record a result."""
        with self.lock, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kernel": kernel} | entry) + "\n")
            self.results[kernel, entry["case"]] = entry


def recorded(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the recorded results by kernel and number of the case; later lines replace earlier ones."""
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(entry.pop("kernel"), entry["case"]): entry for entry in entries}


def summary(results: dict[tuple[str, int], dict[str, Any]], kernels: Sequence[str], everything: Sequence[Check]) -> str:
    """Return a table with a line per kernel, then every result that is not right, in less than 60 lines."""
    rows, problems = [], []
    states = (*FINAL, "crashed", "hung", "not run")
    for kernel in kernels:
        own = [results.get((kernel, number), {"status": "not run"}) for number in range(len(everything))]
        row: dict[str, Any] = {"kernel": kernel} | {
            state: sum(entry["status"] == state for entry in own) for state in states
        }
        for dtype in ("bfloat16", "float16", "float32"):
            pairs = [(check.case, entry) for check, entry in zip(everything, own) if check.case.dtype == dtype]
            errors = [
                entry["gradient"] for case, entry in pairs if case.precision == "highest" and entry.get("gradient")
            ]
            row[dtype] = max(errors, default=None)
        rows.append(row)
        reasons: dict[str, list[str]] = {}
        for check, entry in zip(everything, own):
            if entry["status"] not in ("ok", "not run"):
                key = f"{kernel}: {entry['status']}: {entry.get('reason', '')}"
                reasons.setdefault(key, []).append(check.describe())
        for key, names in reasons.items():
            problems.append(f"{key} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")"))
    columns: list[dict[str, str]] = [{"key": "kernel"}, *({"key": state} for state in states)]
    columns += [
        {"key": name, "label": f"error, {name}", "format": ".1e"} for name in ("bfloat16", "float16", "float32")
    ]
    problems.sort(key=lambda line: ": not covered: " in line)
    more = [f"and {len(problems) - 40} more, see smoke.jsonl"] if len(problems) > 40 else []
    return "\n".join([format_table({"columns": columns, "rows": rows}), "", *problems[:40], *more]).rstrip()


def failed(results: dict[tuple[str, int], dict[str, Any]], kernels: Sequence[str], count: int) -> bool:
    """Return whether a result is wrong or missing."""
    states = [results.get((kernel, number), {}).get("status") for kernel in kernels for number in range(count)]
    return any(state not in ("ok", "not covered") for state in states)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing cases and print the table; return the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all cases (default: %(default)s)")
    parser.add_argument("--kernels", nargs="+", choices=PROVIDERS, metavar="KERNEL", help="default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker, options.device, map(int, options.cases.split(",")))
        return 0
    if options.out is None:
        parser.error("expected the folder OUT")
    kernels = options.kernels or (GPU_KERNELS if device == "cuda" else CPU_KERNELS)
    options.out.mkdir(parents=True, exist_ok=True)
    everything = checks(device)
    runner = Runner(options.out, device, options.seconds)
    runner.run(kernels, len(everything))
    print(summary(runner.results, kernels, everything))
    return int(failed(runner.results, kernels, len(everything)))


if __name__ == "__main__":
    sys.exit(main())
