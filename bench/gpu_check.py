"""Everything that needs a GPU, in parts of at most four minutes, all in about ten: see gpu_check.sh.

    python -m bench.gpu_check OUT [--only PART ...]

The parts, the most valuable first:

    smoke      every kernel on fifty cases: right, and equal bits twice; also in launches that overlap
    table      the twelve cases of a GPU's table: time of a call, on the GPU alone, and of the host
    profile    time of every kernel, what its warps wait for by Nsight Compute, and the first call of Triton's kernels
    tests      the tests marked gpu, in parallel with pytest-xdist
    ablation   the wgmma tiles without one of their parts
    train      training steps
    sanitize   small cases under compute-sanitizer
    sweep      more sizes and options

Each part ends with its table. With the same OUT, a part resumes where it was stopped. Nothing is installed or
downloaded; a part whose packages are missing is skipped. Without a GPU all parts except profile and ablation run as a
rehearsal on the CPU, with few and small cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srpkd.checking.kernels import CUDA_KERNELS, KERNEL_VARIABLE, OVERLAP_VARIABLE, TOGETHER_VARIABLE
from srpkd.checking.processes import recorded
from srpkd.kernels import build, native
from srpkd.reporting.table import format_table

from . import gpu_tests, machine, relation, results

GPU_KERNELS = ("native-sm90", "native-sm80", "native", "closed_form", "triton")
ALL_STEPS = 120  # seconds that all rows of the training steps take at least
# without it, an access beyond an array stays inside the allocator's pool, and compute-sanitizer misses it
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        run: function (Check) -> None.
        seconds: limits: if all parts run, and if this is the only one.
        packages: what it needs besides torch and numpy.
        helpful: what it can do without.
    """

    run: Callable[[Check], None]
    seconds: tuple[int, int]
    packages: tuple[str, ...] = ()
    helpful: tuple[str, ...] = ()


class Check:
    """The state of a run: the folder, the time that is left, and the failures."""

    def __init__(self, out: Path, on_gpu: bool) -> None:
        self.out, self.on_gpu = out, on_gpu
        self.deadline = time.monotonic()
        self.failures: list[str] = []

    @property
    def left(self) -> float:
        """Seconds that are left for this part."""
        return self.deadline - time.monotonic()

    def command(self, name: str, *words: object, accepted: Sequence[int] = (0,), **limits: Any) -> int:
        """Run a command; record a failure, and return the exit status. The limits are those of ``attempt``."""
        status, end = self.attempt(name, *words, **limits)
        if status not in accepted:
            self.failures.append(f"{name} ({end})")
        return status

    def attempt(
        self, name: str, *words: object, seconds: float | None = None, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run a command until its limit or the end of the part; return the exit status, and how it ended in words."""
        limit = self.left if seconds is None else min(seconds, self.left)
        command = [str(word) for word in words]
        print(f"--- {name}: {' '.join(command)}", flush=True)
        if limit <= 0:
            return 1, "no time left"
        # a process group, to stop the workers of pytest and the compilers too
        process = subprocess.Popen(command, env=os.environ | (environment or {}), start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return 124, f"stopped after {limit:.0f} s; repeat with the same OUT to resume"
        finally:  # also if this process is told to end
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return status, f"exit status {status}"

    def python(self, name: str, *words: object, **options: Any) -> int:
        """Run a command of Python; the options are those of ``command``."""
        return self.command(name, sys.executable, "-u", *words, **options)

    def bench_on_gpu(self, name: str, *words: object, **limits: Any) -> None:
        """Run a command of ``bench`` that needs a GPU; in a rehearsal say so."""
        if self.on_gpu:
            self.python(name, "-m", "bench", *words, **limits)
        else:
            print(f"--- {name}: skipped, needs a GPU: python -m bench {' '.join(map(str, words))}")


# --- parts ------------------------------------------------------------------------------------------------------------


def smoke(check: Check) -> None:
    """Check the backends, on a GPU on all cases; the file keeps the results of the part for the next ones."""
    options = ["--silence", 45, *(["--device", "cuda", "--full"] if check.on_gpu else ["--device", "cpu"])]
    kernels: tuple[str, ...] = GPU_KERNELS if check.on_gpu else ("native", "closed_form", "blocked")
    out = ["--out", check.out / "smoke.jsonl", "--seconds", int(check.left - 15)]
    check.python("smoke", "-m", "srpkd.check", *options, *out, "--backend", *kernels)
    # each kernel in a launch of its own, and early. Apart, as this is off by default: a fault does not keep the kernels
    # from being measured
    kernels = (*CUDA_KERNELS, "closed_form") if check.on_gpu else ("closed_form",)
    out = ["--out", check.out / "smoke-overlap.jsonl", "--seconds", max(1, int(check.left - 5))]
    overlap = {OVERLAP_VARIABLE: "1", TOGETHER_VARIABLE: "0"}
    check.python("smoke, overlap", "-m", "srpkd.check", *options, *out, "--backend", *kernels, environment=overlap)


def table(check: Check) -> None:
    file, margin = check.out / "relation.csv", 20
    command = ["-m", "bench", "relation", "--missing", "--out", file]
    if check.on_gpu:
        command += ["--sweep", "table", "--budget", 2]
        plain, selected = sound_kernels(check)
        providers = ["eager", "compile", *plain, *selected]
    else:
        command += ["--pixels", 64, 128, "--budget", 0.1]
        providers = ["eager", "blocked"]
    check.python("table", *command, "--providers", *providers, "--minutes", (check.left - margin) / 60)
    print(times(results.read(file)))


def sound_kernels(check: Check) -> tuple[list[str], list[str]]:
    """Return the kernels that the smoke test found neither to crash nor to hang, which would stop a measurement.

    Second are those that are selected by name, which must have passed it.
    """
    found: dict[str, set[str]] = {}
    for (kernel, _), entry in recorded(check.out / "smoke.jsonl").items():
        found.setdefault(kernel, set()).add(entry["status"])
    plain: list[str] = []
    selected: list[str] = []
    for kernel in GPU_KERNELS:
        states = found.get(kernel, set())
        if states & {"crashed", "hung"} or (kernel in CUDA_KERNELS and "ok" not in states):
            print(f"{kernel} is left out: it has not passed the part smoke with this OUT")
        else:
            (selected if kernel in CUDA_KERNELS else plain).append(kernel)
    return plain, selected


def profile(check: Check) -> None:
    plain, selected = sound_kernels(check) if check.on_gpu else (list(GPU_KERNELS), [])
    sound = {*plain, *selected}
    tiles = [name for name in ("native-sm90", "triton") if name in sound]
    to, l2 = check.out / "profile", ("--normalize", "row", "--distance", "l2", "--batch", 16)
    if "native-sm90" in sound:
        check.bench_on_gpu("profile", "profile", "--out", to, seconds=0.6 * check.left)
    if tiles:
        with tempfile.TemporaryDirectory() as empty:  # the first call compiles
            cold = {"TRITON_CACHE_DIR": empty}
            check.bench_on_gpu("breakdown", "breakdown", "--batch", 16, 1, "--providers", *tiles, environment=cold)
    if "closed_form" in sound:
        check.bench_on_gpu("profile of l2", "profile", "--out", to, *l2, "--providers", "closed_form")
        check.bench_on_gpu("breakdown of l2", "breakdown", *l2, "--providers", "closed_form")


def ablation(check: Check) -> None:
    if check.on_gpu and "native-sm90" not in sound_kernels(check)[1]:
        return
    if check.on_gpu and torch.cuda.get_device_capability() != (9, 0):
        print("the tiles use wgmma: skipped")
        return
    # compile the variants there before, on a machine without a GPU
    libraries = check.out / "ablation"
    check.bench_on_gpu("ablation", "ablation", "--use", libraries, "--out", check.out / "ablation.csv")


def tests(check: Check) -> None:
    # the results of another kernel of `native` are kept apart
    folder = check.out / "-".join(filter(None, ("tests", os.environ.get(KERNEL_VARIABLE))))
    print(f"{gpu_tests.start(folder)} tests have passed before")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu_tests", "--tb=line"]
    command += ["--continue-on-collection-errors"]
    # the GPU tests of every file; in the rehearsal some that are quick on a CPU
    command += ["-m", "gpu", "tests"] if check.on_gpu else ["-m", "not gpu", "tests/test_finite.py"]
    if importlib.util.find_spec("xdist"):
        workers = min(12, os.cpu_count() or 1) if check.on_gpu else 1
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "4"]  # in order
    # 5: no tests are left
    check.python("tests", *command, accepted=(0, 5), environment={gpu_tests.VARIABLE: str(folder)})
    print(gpu_tests.summary(folder))


def train(check: Check) -> None:
    file = check.out / "train.csv"
    if file.exists():
        print(f"{file} is recorded")
        return
    command, choice = ["-m", "bench", "train", "--out", file], []
    if check.on_gpu and check.left < ALL_STEPS:
        command += ["--budget", max(1, int(check.left / 10)), "--short"]
    elif check.on_gpu:  # the budget counts twice: for the distillation steps, and for those of the teacher
        command += ["--budget", max(1, int(check.left / 5)), "--speedups", "channels_last", "bf16"]
    else:
        command += ["--budget", 0.1, "--speedups", "bf16", "--no-teacher"]
        choice += ["--size", 32, "--netG", "resnet_1blocks", "--ngf", 2, "--teacher-ngf", 2]
    check.python("train", *command, *choice)
    if not check.on_gpu or check.left > 30:
        check.python("operators of a step", "-m", "bench", "train", "--profile", *choice)


def sanitize(check: Check) -> None:
    if not check.on_gpu:
        check.python("sanitize", "-m", "bench.sanitize", "native", "blocked", "closed_form")
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: skipped")
        return
    trial = (tool, "--error-exitcode", "9", sys.executable, "-c", "import torch; torch.ones(1, device='cuda')")
    status, end = check.attempt("trial of compute-sanitizer", *trial, seconds=check.left / 4)
    if status:  # no failure: this GPU or its driver may not allow the tool
        print(f"compute-sanitizer does not work here ({end}): skipped")
        return
    plain, selected = sound_kernels(check)
    groups = [plain, *([name] for name in selected)]
    # first without it, to compile the kernels
    check.python("sanitize, compile", "-m", "bench.sanitize", *plain, seconds=check.left / 4)
    runs = [(name, group) for name in ("memcheck", "racecheck") for group in reversed(groups)]
    for i, (name, group) in enumerate(runs):
        options = (tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "bench.sanitize", *group)
        share = check.left / (len(runs) - i)
        check.command(f"{name}, {', '.join(group)}", *options, seconds=share, environment=UNCACHED)


def sweep_sizes(check: Check) -> None:
    file, accuracy = check.out / "relation.csv", check.out / "accuracy.csv"
    command = ["-m", "bench", "relation", "--missing", "--out", file]
    if check.on_gpu:
        command += ["--sweep", "full", "--budget", 2]
        command += ["--providers", "eager", "compile", "closed_form", "native", "triton"]
    else:
        command += ["--pixels", 32, 256, "--providers", "eager", "blocked", "--budget", 0.1]
    check.python("sweep", *command, "--minutes", (check.left - 40) / 60)
    if check.on_gpu and not accuracy.exists() and check.left > 20:
        check.python("accuracy", "-m", "bench", "accuracy", "--out", accuracy)
    print(times(results.read(file)))


PARTS = {
    "smoke": Part(smoke, (90, 200)),
    "table": Part(table, (125, 210)),
    "profile": Part(profile, (60, 210)),
    "tests": Part(tests, (120, 210), ("pytest",), ("xdist", "hypothesis")),
    "ablation": Part(ablation, (40, 120)),
    "train": Part(train, (60, 210), ("torchvision", "PIL", "matplotlib", "jinja2")),
    "sanitize": Part(sanitize, (60, 210)),
    "sweep": Part(sweep_sizes, (45, 210)),
}


# --- the report -------------------------------------------------------------------------------------------------------


def times(rows: Sequence[results.Row]) -> str:
    """Return a line per case, by provider: microseconds of a call, on the GPU alone, and of the host."""
    columns: list[dict[str, str]] = [{"key": "case", "label": "us: call / GPU / host"}]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for case, own in results.group_by(rows, relation.KEY[1:]).items():
        named = dict(zip(relation.KEY[1:], case))
        precision = f" {named['precision']}" if named["dtype"] == "float32" else ""
        line = {
            "case": f"N={named['pixels']} C={named['channels']} B={named['batch']} {named['dtype']}{precision} "
            f"{named['normalize']} {named['distance']}" + ("" if named["mode"] == "forward+backward" else " forward")
        }
        for row in own:
            values = [results.number(row, column) for column in ("median_s", "gpu_s", "host_s")]
            cells = ["–" if value is None else f"{1e6 * value:,.0f}" for value in values]
            line[row["provider"]] = " / ".join(cells) if row["status"] == "ok" else row["status"]
        lines.append(line)
    shown = lines[-50:]
    note = [f"{len(lines) - 50} earlier cases are in the CSV file"] if len(lines) > 50 else []
    return "\n".join([format_table({"columns": columns + [{"key": name} for name in names], "rows": shown}), *note])


def missing(names: Sequence[str]) -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def prepare(check: Check) -> None:
    """Build the extension if there is none for this torch and these sources, and print what can run."""
    for library in Path(native.__file__).parent.glob(f"{build.NAME}*.so"):
        if build.stale_reason(library):
            library.unlink()  # this is a copy of the tree
    code = """
import sys
from srpkd.info import describe
from srpkd.kernels import native
try:
    native.extension()
    status = 0
except RuntimeError as error:
    print(f"{error}\\ncontinue without the native backend")
    status = int(sys.argv[1])
print(describe())
sys.exit(status)
"""
    check.python("build", "-c", code, int(check.on_gpu), seconds=180)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts or one, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="run these parts")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = machine.versions()["commit"]
    if problem := other_commit(out, commit):
        parser.error(problem)

    check = Check(out, torch.cuda.is_available())
    if not check.on_gpu:
        print("torch sees no CUDA device: this is a rehearsal on the CPU")
    chosen = options.only or list(PARTS)
    print(f"{time.strftime('%FT%TZ', time.gmtime())} commit {commit}, torch {torch.__version__}: {', '.join(chosen)}")
    for name in chosen:
        for kind, packages in (("skipped without", PARTS[name].packages), ("reduced without", PARTS[name].helpful)):
            if lacking := missing(packages):
                print(f"{name}: {kind} {', '.join(lacking)}")
    check.deadline = time.monotonic() + 200
    prepare(check)
    for name in chosen:
        part = PARTS[name]
        start = time.monotonic()
        # a rehearsal is about reaching the end
        check.deadline = start + part.seconds[len(chosen) == 1] * (1 if check.on_gpu else 5)
        print(f"\n=== {name}", flush=True)
        if lacking := missing(part.packages):
            check.failures.append(f"{name} (skipped: {', '.join(lacking)} not installed)")
        else:
            part.run(check)
        print(f"=== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join([f"FAILED: {failure}" for failure in check.failures]) or f"success; the results are in {out}")
    return int(bool(check.failures))


def other_commit(out: Path, commit: str) -> str | None:
    """Return an error message if the folder has results of another commit; otherwise record the commit in it."""
    file = out / "commit.txt"
    if file.exists() and (found := file.read_text(encoding="utf-8").strip()) != commit:
        return f"{out} has results of commit {found}, and this is {commit}: use another folder"
    file.write_text(commit + "\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
