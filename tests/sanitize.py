"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer: the CPU extension, and the emulated CUDA kernels.

    python tests/sanitize.py        about three minutes on two cores: make sanitize

Works on a copy of the tree, see mutations.py, whose extension is compiled without its GPU part and with the sanitizers.
Their libraries are loaded before Python is. Leaks are not looked for: Python and torch leave much behind at exit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mutations import compile_native, copy_of, run

FLAGS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
# the emulation jumps from stack to stack, of which the sanitizer knows nothing: it watches the heap, where all of the
# emulated memory is
EMULATION_FLAGS = "-O0 -fsanitize=address --param=asan-stack=0"
# the baseline's vectors run in a process of their own; of the emulation, what reads and writes at the edges of memory
RUNS = (
    ("tests/kernels/test_native.py", "not baseline", FLAGS),
    ("tests/csrc/test_cuda_emulation.py", "any_number or views or resident or mistake",
     EMULATION_FLAGS),
)  # fmt: skip


def main() -> int:
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            sys.exit(f"{compiler} has no {name}: install GCC with its sanitizers, or set CXX to it")
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
            sys.exit(f"the extension does not compile with the sanitizers:\n{output[-4000:]}")
        for tests, chosen, flags in RUNS:
            command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", tests, "-k", chosen]
            done = run(command, folder, environment | {"SRPKD_CXX_FLAGS": flags})
            print(done.stdout[-6000:], flush=True)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
