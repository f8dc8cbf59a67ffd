"""Compiles the emulation of the CUDA kernels, cuda_emulation/, for the tests in this folder."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

OPTIONS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Return a function that compiles a source in cuda_emulation/ for the host and loads it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(__file__).parent / "cuda_emulation"

    def load(source: str) -> ctypes.CDLL:
        target = tmp_path_factory.mktemp("cuda_emulation") / "library.so"
        flags = ["-Wno-unknown-pragmas", *shlex.split(os.environ.get("SRPKD_CXX_FLAGS", ""))]
        command = [compiler, *OPTIONS, *flags, f"-I{folder}", "-o", str(target), str(folder / source)]
        # without LD_PRELOAD, because the compiler does not run under the sanitizers that tests/sanitize.py preloads
        done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": ""}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))

    return load
