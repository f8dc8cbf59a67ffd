"""Run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer: CPU extension and emulated CUDA kernels.

    python tests/sanitize.py        about three minutes on two cores: make sanitize

The tests run in a copy of the tree (see mutations.py), whose extension is compiled with the sanitizers and without
CUDA. The libraries of the sanitizers are loaded with LD_PRELOAD. Leak detection is off, because Python and torch do not
free all memory at exit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mutations import compile_native, copy_of, run

FLAGS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
# The emulation switches between stacks, which the sanitizer does not support. Without stack checks, it still checks the
# heap, which contains all emulated memory.
EMULATION_FLAGS = "-O0 -fsanitize=address --param=asan-stack=0"
# Without the tests that start a subprocess; of the emulation, the tests that access the boundaries of memory.
RUNS = (
    ("tests/kernels/test_native.py", "not baseline", FLAGS),
    ("tests/kernels/test_native_products.py", "not row_norms", FLAGS),
    ("tests/kernels/test_sampling.py", "native and not opcheck", FLAGS),
    ("tests/csrc/test_cuda_emulation.py", "any_number or views or resident or mistakes",
     EMULATION_FLAGS),
    ("tests/csrc/test_hopper_emulation.py", "outside or layout or noticed", EMULATION_FLAGS),
)  # fmt: skip


def main() -> int:
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            sys.exit(f"{compiler} has no {name}: install GCC with the sanitizer libraries, or set CXX to it")
        libraries.append(found)
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        copy_of(folder)
        if (output := compile_native(folder, FLAGS, **environment)) is not None:
            sys.exit(f"compiling the extension with the sanitizers failed:\n{output[-4000:]}")
        for tests, chosen, flags in RUNS:
            command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", tests, "-k", chosen]
            done = run(command, folder, environment | {"SRPKD_CXX_FLAGS": flags})
            print(done.stdout[-6000:], flush=True)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
