"""Every kernel on small cases, against float64 and twice for equal bits.

Each kernel runs in its own processes, which are replaced if they crash or hang, so that a fault of one kernel does not
hide the results of the others: after an error of CUDA, a process cannot use the GPU any more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..files import writing
from ..kernels import DISTANCES, NORMALIZATIONS
from ..kernels.formulas import Distance, Normalize, has_float64
from ..structures import to_device
from . import gate
from .cases import PRECISIONS, Case, features, settings
from .kernels import KERNELS, CannotRun, evaluate, poisoned_memory

# Processes are forked from one that has imported torch and does not use a GPU: a process that does cannot be forked.
# Windows cannot fork, and macOS not safely: its libraries, which torch uses, may have started threads.
CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
SHARDS = {"triton": 6}  # processes of a kernel; Triton compiles for most cases
Results = dict[tuple[str, int], dict[str, Any]]  # by kernel and number of the case; later ones replace earlier ones
Verdict = Literal["right", "FAILED", "not finished"]
FINAL = ("ok", "wrong", "bits differ", "not covered")  # results that a repetition would not change
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

    @property
    def identity(self) -> str:
        """What tells a check from all others in a file of results, those of other devices and versions too."""
        return f"{self.case.describe()}, {self.kind}"


def checks(device: str, full: bool = False) -> list[Check]:
    """Return some thirty cases, or with ``full`` some fifty, the most telling first."""

    base = Case(200, (64, 256), 2, "bfloat16", device=device, threads=1)

    def case(normalize: Normalize = "row", distance: Distance = "l1", **options: Any) -> Case:
        return replace(base, normalize=normalize, distance=distance, **options)

    some: list[tuple[Normalize, Distance]] = [("row", "l1"), ("cosine", "l2"), ("none", "huber")]
    found = [Check(case(normalize, distance)) for distance in DISTANCES for normalize in NORMALIZATIONS]
    found += [Check(case(*relation, dtype="float16")) for relation in some[:2]]
    found += [Check(case(*relation, dtype="float32")) for relation in some]
    found += [Check(case(dtype="float32", precision=precision)) for precision in PRECISIONS]
    found += [Check(case(pixels=pixels, batch=1)) for pixels in (1, 65, 1025)]
    found += [Check(case(pixels=130, channels=channels)) for channels in ((1, 1), (300, 129))]
    found += [Check(case(mode="forward")), Check(case(), "zero norm"), Check(case(), "tokens")]
    found += [Check(case(*relation, flags=(flag,))) for flag in ("rectify", "detach_norms") for relation in some[:2]]
    if full:
        found += [Check(case("none", "huber", dtype="float16"))]
        found += [Check(case(dtype=dtype, flags=("rectify",))) for dtype in ("float16", "float32")]
        found += [Check(case(dtype="float32", precision="high", flags=("rectify",)))]
        found += [Check(case(*relation, dtype="float32", precision=name)) for name in PRECISIONS for relation in some]
        found += [Check(case(pixels=pixels, batch=1)) for pixels in (128, 4096)]
        found += [Check(case(pixels=130, channels=channels)) for channels in ((16, 64), (128, 256), (256, 1024))]
        found += [Check(case(*relation, mode="forward")) for relation in some[1:]]
        found += [Check(case("cosine", "l2"), "zero norm")]
        found += [Check(case(normalize, "l2", channels=(64, 64)), "close") for normalize in ("row", "cosine")]
        found += [Check(case("row", "l2", mode="forward")), Check(case("row", "l2", dtype="float32"), "zero norm")]
        found += [Check(case(*relation, pixels=256, batch=16)) for relation in some[:2]]
        # on Hopper, two terms: more room in shared memory without a gradient, and several groups of the student
        found += [Check(case(dtype="float32", mode="forward"))]
        found += [Check(case(dtype="float32", pixels=130, channels=(128, 256)))]
    if device == "cpu":  # the precision of float32 products only affects GPUs
        found = [check for check in found if check.case.precision == "highest"]
    return list(dict.fromkeys(found))


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


def exit_with_parent() -> None:
    """End this process when its parent process ends for any reason: one that is killed leaves its processes running."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def work(kernel: str, everything: Sequence[Check], numbers: Iterable[int], results: Connection, errors: Path) -> None:
    """Run cases by their numbers, and send a dict before and after each; what is printed on stderr goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the process of the command ends this one
    exit_with_parent()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    for number in numbers:
        results.send({"case": number})
        start = time.perf_counter()
        result = outcome(kernel, everything[number])
        results.send({"case": number, "seconds": round(time.perf_counter() - start, 2)} | result)
        if result["status"] == "crashed":
            sys.exit(1)  # after an error of CUDA, the process cannot use the GPU any more


def outcome(kernel: str, check: Check) -> dict[str, Any]:
    """Return the status of a kernel on a case, its errors and what is wrong."""
    case, provider = check.case, KERNELS[kernel]
    if (reason := provider.unavailable_reason(case)) is not None:
        return {"status": "not covered", "reason": reason}
    try:
        with settings(case):
            student, teacher = inputs(check)
            loss = provider.make(case)
            with poisoned_memory():
                first, second = (evaluate(loss, student, teacher, case) for _ in range(2))
            if not has_float64(student.device):
                student, teacher, first, second = to_device((student, teacher, first, second), torch.device("cpu"))
            found, share, reason = compare(first, check, student, teacher)
        status = "ok" if reason is None else "wrong"
        pairs = zip(first, second)
        if reason is None and not all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None):
            status, reason = "bits differ", "two runs give different bits"
        return {"status": status, "reason": reason or "", "share": share} | found._asdict()
    except CannotRun as error:
        return {"status": "not covered", "reason": str(error)}
    except Exception as error:  # everything that a kernel can raise is a result
        return {"status": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def compare(
    result: tuple[Tensor, Tensor | None], check: Check, student: Tensor, teacher: Tensor
) -> tuple[gate.Errors, float, str | None]:
    """Return the errors of a result against float64, their share of the limit, and why they are too large, if so."""
    value, gradient = result
    if check.case.pixels == 1:  # the relation of a pixel to itself is constant: the exact gradient is 0
        finite = value.isfinite().all() and (gradient is None or gradient.isfinite().all())
        return gate.Errors(0.0), 0.0, None if finite else "the loss or the gradient of a single pixel is not finite"
    if check.kind == "zero norm":  # where the definition and PyTorch have gradients of 1/eps
        reference = KERNELS["reference"].make(check.case)
        expected = gate.Result(
            *evaluate(reference, student.double(), teacher.double(), replace(check.case, dtype="float64"))
        )
    else:
        expected = gate.float64_result(student, teacher, check.case)
    found = gate.relative_errors(gate.Result(value, gradient), expected, check.case.loss_scale)
    limits = ONE_CHANNEL if check.case.channels == (1, 1) else gate.KERNEL_LIMITS
    share = gate.share_of_limit(found, check.case, limits)
    return found, share, gate.failure_reason(found, check.case, limits)


# --- the processes of all kernels -----------------------------------------------------------------------------------


class Runner:
    """Run the missing cases of all kernels in processes, and collect the results.

    Args:
        everything: the cases.
        seconds: time for all cases; those that are left then are not run.
        silence: seconds without a result after which a process counts as hung. The first includes importing torch, and
            compiling for Triton and from PTX.
        file: where to write the results as they arrive, and from where to read those of an earlier run.

    Raises:
        ValueError: the file has results of other cases.
        OSError: the file cannot be read or written.
    """

    def __init__(self, everything: Sequence[Check], seconds: float, silence: float, file: Path | None = None) -> None:
        self.everything, self.silence, self.file = everything, silence, file
        self.deadline = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.running: list[BaseProcess] = []
        self.is_stopped = False
        if file:
            with writing(file):  # before anything runs
                file.open("a").close()
        self.results = recorded(file) if file else {}
        for (_, number), entry in self.results.items():
            found = entry.get("check", "unknown ones")
            if number < len(everything) and found != everything[number].identity:
                raise ValueError(f"{file} has results of other cases, such as {found}: use another file, or remove it")

    def run(self, kernels: Sequence[str]) -> None:
        """Run all kernels at once, each in as many processes as SHARDS says. Raises the first error of a thread."""
        if CONTEXT.get_start_method() == "forkserver":
            CONTEXT.set_forkserver_preload([__name__])
        shards = []
        numbers = range(len(self.everything))
        for kernel in kernels:
            missing = [n for n in numbers if self.results.get((kernel, n), {}).get("status") not in FINAL]
            count = min(SHARDS.get(kernel, 1), max(1, (os.cpu_count() or 1) // 2))
            shards += [(kernel, part) for start in range(count) if (part := missing[start::count])]
        with ThreadPoolExecutor(max(1, len(shards))) as pool:
            running = {pool.submit(self.run_shard, *shard) for shard in shards}
            try:
                while running:
                    # on Windows, Ctrl-C takes effect only when it returns
                    done, running = wait(running, 0.5, FIRST_EXCEPTION)
                    for shard in done:
                        shard.result()
            except BaseException:  # Ctrl-C, or an error: the pool would wait for the threads
                self.stop()
                raise

    def stop(self) -> None:
        """End the processes, and start none any more."""
        with self.lock:
            self.is_stopped = True
            for process in self.running:
                process.kill()

    def run_shard(self, kernel: str, numbers: list[int]) -> None:
        """Run cases of one kernel; replace the process after a crash, until the time is over."""
        for _ in range(RESTARTS):
            if not numbers or time.monotonic() > self.deadline:
                return
            with tempfile.TemporaryDirectory() as folder:
                numbers = self.run_process(kernel, numbers, Path(folder, "stderr"))

    def run_process(self, kernel: str, numbers: list[int], errors: Path) -> list[int]:
        """Run cases in one process, and return those that are left after it ended.

        Args:
            errors: a new file for what the process prints on stderr.
        """
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=work, args=(kernel, self.everything, numbers, sender, errors))
        with self.lock:
            if self.is_stopped:
                return []
            process.start()
            self.running.append(process)
        sender.close()  # the end of the process is then the end of what can be received
        left, started = list(numbers), None
        status, reason = "crashed", ""
        while True:
            wait = min(self.silence, self.deadline - time.monotonic())
            if not receiver.poll(max(wait, 0.0)):
                slow = f"no result for {self.silence:g} s: run it again, with a larger --silence if it is only slow"
                status, reason = ("hung", slow) if wait == self.silence else ("no time", "")
                process.kill()
                break
            try:
                entry = receiver.recv()
            except (EOFError, OSError):  # it ended, perhaps while it sent something
                break
            started = entry["case"]
            if "status" in entry:
                self.add(kernel, entry)
                left.remove(started)
                started = None
        process.join()
        with self.lock:
            self.running.remove(process)
        if status == "no time" or self.is_stopped or process.exitcode == -signal.SIGINT:  # Ctrl-C is no crash
            return []
        if started is None and len(left) == len(numbers):  # it ended before its first case
            started = left[0]
        if started is not None:
            printed = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
            lines = " ".join(printed.splitlines()[-3:])
            reason = reason or f"exit status {process.exitcode}: {' '.join(lines.split())[-300:]}"
            self.add(kernel, {"case": started, "status": status, "reason": reason})
            left.remove(started)
        return left

    def add(self, kernel: str, entry: dict[str, Any]) -> None:
        """Record a result."""
        entry = {"check": self.everything[entry["case"]].identity} | entry
        with self.lock:
            self.results[kernel, entry["case"]] = entry
            if self.file:
                with writing(self.file):
                    append_line(self.file, {"kernel": kernel} | entry)


def recorded(file: Path) -> Results:
    """Return the recorded results.

    Raises:
        ValueError: the file has something else.
    """
    try:
        return {(entry.pop("kernel"), entry["case"]): entry for entry in read_lines(file)}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} has no results of srpkd check: use another file, or remove it") from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, without a line whose writing was cut off; [] if there is no file."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def append_line(file: Path, entry: dict[str, Any]) -> None:
    """Append an object to a file of JSON lines, after the end of a line whose writing was cut off."""
    with file.open("a+b") as lines:
        lines.seek(max(lines.tell() - 1, 0))
        is_cut_off = lines.read() not in (b"", b"\n")  # b"": the file is empty
        lines.write(b"\n" * is_cut_off + json.dumps(entry).encode() + b"\n")


def verdict(results: Results, kernel: str, count: int) -> Verdict:
    """Return "FAILED" if a result of a kernel is wrong, "not finished" if one is missing, "right" otherwise."""
    states = {results.get((kernel, number), {}).get("status") for number in range(count)}
    if states - {"ok", "not covered", None}:
        return "FAILED"
    return "not finished" if None in states else "right"
