"""Run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer: CPU extension and emulated CUDA kernels.

    python tests/sanitize.py [OPTION ...]        options of pytest; make sanitize gives --core

The two parts run at the same time, each in a copy of the tree (see mutations.py). The extension of the first is
compiled with the sanitizers and without CUDA. The libraries of the sanitizers are loaded with LD_PRELOAD. Leak
detection is off, because Python and torch do not free all memory at exit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations import compile_native, copy_of, run


@dataclass(frozen=True)
class Part:
    """Tests with the same flags of the compiler: files, and which of their tests (-k)."""

    flags: str
    needs_extension: bool
    tests: dict[str, str]


PARTS = (
    # without the tests that start a subprocess; and without the checks of UndefinedBehaviorSanitizer whose faults
    # AddressSanitizer finds too, at each access to a member: they take a fifth of the compilation
    Part(
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
        "-O0 -fsanitize=address --param=asan-stack=0",
        False,
        {
            "tests/csrc/test_cuda_emulation.py": "any_number or views or resident or mistakes",
            "tests/csrc/test_hopper_emulation.py": "outside or layout or noticed",
        },
    ),
)


def sanitizer_environment() -> dict[str, str]:
    """Return the variables with which a process loads the sanitizers and reports what they find."""
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            sys.exit(f"{compiler} has no {name}: install GCC with the sanitizer libraries, or set CXX to it")
        libraries.append(found)
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_part(part: Part, environment: dict[str, str]) -> bool:
    """Run the tests of a part in a copy of the tree, print the ends of their outputs, and return whether all passed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        if part.needs_extension and (output := compile_native(folder, part.flags, **environment)) is not None:
            print(f"compiling the extension with the sanitizers failed:\n{output[-4000:]}", flush=True)
            return False
        for tests, chosen in part.tests.items():
            options = ["-q", "-s", "-p", "no:cacheprovider", *sys.argv[1:], "-k", chosen]
            command = [sys.executable, "-m", "pytest", tests, *options]
            done = run(command, folder, environment | {"SRPKD_CXX_FLAGS": part.flags})
            print(f"{tests}:\n{done.stdout[-6000:]}", flush=True)
            if done.returncode:
                return False
    return True


def main() -> int:
    environment = sanitizer_environment()
    with ThreadPoolExecutor(len(PARTS)) as pool:
        passed = list(pool.map(lambda part: run_part(part, environment), PARTS))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
