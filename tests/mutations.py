"""Mutation tests: each of these faults must make a test fail.

    python tests/mutations.py             all backends: make mutations
    python tests/mutations.py native      one or more backends

The faults are those of tests/faults/. The tests run in a copy of the tree in a temporary folder; the tree itself does
not change. First the tests of a backend must pass without a fault. Then, with one fault at a time, the assertion of at
least one test must fail. If an import, a fixture or the compilation fails, the fault is reported as "broken", because
no test has detected it. For a fault in C++, the sources that contain it are compiled again, without CUDA. The exit
status is 1 if a fault survives or is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from xml.etree import ElementTree

from faults import BACKENDS, Backend

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "kernels", "srpkd", "tests")


def copy_of(folder: Path) -> None:
    """Copy the tree; the links srpkd/kernels and srpkd/csrc are relative."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", folder)


@contextmanager
def extension(folder: Path) -> Iterator[None]:
    """Context in which the copy has a compiled extension, whose files are compiled again only if they change.

    The digest of all sources is a flag of each compilation: a fault in one file would compile all of them.
    """
    path = folder / "kernels" / "build.py"
    text = path.read_text("utf-8")
    path.write_text(text + '\n\ndef source_digest() -> str:\n    return "copy"\n')
    try:
        yield
    finally:
        path.write_text(text)
        (folder / "kernels" / "_native.so").unlink(missing_ok=True)


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


def check_backend(name: str, backend: Backend, folder: Path) -> list[str]:
    """Run the tests of a backend in the copy, without a fault and with each fault; print and return the verdicts."""
    verdicts: list[str] = []

    def report(fault: str, verdict: str, detail: str, start: float) -> None:
        verdicts.append(verdict)
        print(f"{name:14} {fault:52} {verdict:9} {time.monotonic() - start:4.0f} s  {detail.strip()}", flush=True)

    start = time.monotonic()
    verdict, detail = run_tests(folder, backend)
    report("(no fault)", verdict, detail, start)
    for fault in backend.faults if verdict == "passed" else []:
        start, path = time.monotonic(), folder / fault.path
        text = path.read_text("utf-8")
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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        verdicts: list[str] = []
        for name in chosen:
            with extension(folder) if BACKENDS[name].compiled else nullcontext():
                verdicts += check_backend(name, BACKENDS[name], folder)
    failed = sum(verdict not in ("killed", "passed") for verdict in verdicts)
    print(f"\n{verdicts.count('killed')} faults killed, {failed} not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
