"""Run the C++ tests under sanitizers: CPU extension and emulated CUDA kernels.

    python tests/sanitize.py [OPTION ...]        options of pytest; make sanitize gives --core

The parts run at the same time, each in a copy of the tree (see mutations.py): the extension, compiled without CUDA, and
the emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and the extension under ThreadSanitizer. The
libraries of the sanitizers are loaded with LD_PRELOAD. Leak detection is off, because Python and torch do not free all
memory at exit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations import ROOT, compile_native, copy_of, run

COMPILER = os.environ.get("CXX", "c++")
MEMORY = ("libasan.so", "libubsan.so")
THREADS = ("libtsan.so",)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # such as torch
}


@dataclass(frozen=True)
class Part:
    """Tests with the same flags of the compiler: files, and which of their tests (-k)."""

    libraries: tuple[str, ...]
    flags: str
    needs_extension: bool
    tests: dict[str, str]


PARTS = (
    # without the tests that start a subprocess; and without the checks of UndefinedBehaviorSanitizer whose faults
    # AddressSanitizer finds too, at each access to a member: they take a fifth of the compilation
    Part(
        MEMORY,
        "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr,null,object-size "
        "-fno-sanitize-recover=undefined",
        True,
        {
            "tests/kernels/test_native.py": "not other_processors",
            "tests/kernels/test_native_products.py": "not row_norms",
            "tests/kernels/test_sampling.py": "native and not opcheck",
        },
    ),
    # The tests that access the boundaries of memory. The emulation switches between stacks, which the sanitizer does
    # not support. Without stack checks, it still checks the heap, which contains all emulated memory.
    Part(
        MEMORY,
        "-O0 -fsanitize=address --param=asan-stack=0",
        False,
        {
            "tests/csrc/test_cuda_emulation.py": "any_number or views or resident or mistakes",
            "tests/csrc/test_hopper_emulation.py": "outside or layout or noticed",
        },
    ),
    Part(
        THREADS,
        "-O1 -fno-omit-frame-pointer -fsanitize=thread",
        True,
        {
            "tests/kernels/test_native.py": "not other_processors",
            "tests/kernels/test_sampling.py": "native and not opcheck",
        },
    ),
)


def path_of(library: str) -> str:
    """Return the path of a library of the compiler."""
    found = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"{COMPILER} has no {library}: install GCC with the sanitizer libraries, or set CXX to it")
    return found


def openmp_on_threads(folder: Path) -> str:
    """Compile the OpenMP runtime that ThreadSanitizer understands, and return its path."""
    library = str(folder / "openmp_threads.so")
    source = str(ROOT / "tests/csrc/openmp_threads.cpp")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-fsanitize=thread", source, "-o", library], check=True)
    return library


def fixed_addresses() -> list[str]:
    """Return the start of a command without random addresses, for which ThreadSanitizer may have no room."""
    command = ["setarch", "--addr-no-randomize"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def run_part(part: Part, paths: dict[str, str]) -> bool:
    """Run the tests of a part in a copy of the tree, print the ends of their outputs, and return whether all passed.

    paths: of the libraries.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        preloaded = [paths[library] for library in part.libraries]
        environment = dict(OPTIONS)
        if part.libraries == THREADS:
            preloaded.append(openmp_on_threads(folder))
            environment["OMP_NUM_THREADS"] = "3"
        environment["LD_PRELOAD"] = " ".join(preloaded)
        if part.needs_extension and (output := compile_native(folder, part.flags, **environment)) is not None:
            print(f"compiling the extension with the sanitizers failed:\n{output[-4000:]}", flush=True)
            return False
        pytest = [*fixed_addresses(), sys.executable, "-m", "pytest"]
        for tests, chosen in part.tests.items():
            options = ["-q", "-s", "-p", "no:cacheprovider", *sys.argv[1:], "-k", chosen]
            done = run([*pytest, tests, *options], folder, environment | {"SRPKD_CXX_FLAGS": part.flags})
            print(f"{tests}, {' '.join(part.libraries)}:\n{done.stdout[-6000:]}", flush=True)
            if done.returncode:
                return False
    return True


def main() -> int:
    paths = {library: path_of(library) for library in MEMORY + THREADS}
    with ThreadPoolExecutor(len(PARTS)) as pool:
        passed = list(pool.map(lambda part: run_part(part, paths), PARTS))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
