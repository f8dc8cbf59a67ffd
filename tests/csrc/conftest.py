"""Compiles kernels for the host, with the emulation in cuda_emulation/."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compile_once import compile_once


@pytest.fixture(scope="session")
def compile_emulation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Return a function that compiles a source in cuda_emulation/ with further options and loads the library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(__file__).parent / "cuda_emulation"

    def run(source: str, *further: str) -> ctypes.CDLL:
        options = ["-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
        options.append("-ftree-vectorize")  # the products and clocks of the emulation, also with -O1
        options.append("-DSRPKD_EMULATION")  # tensor maps without the headers of CUDA
        command = [
            compiler,
            *options,
            "-Wno-unknown-pragmas",
            *further,
            *shlex.split(os.environ.get("SRPKD_CXX_FLAGS", "")),
            f"-I{folder}",
            folder / source,
        ]
        # without LD_PRELOAD, because the compiler does not run under the sanitizers that tests/sanitize.py preloads
        _, library = compile_once(tmp_path_factory, command, ".so", {**os.environ, "LD_PRELOAD": ""})
        return ctypes.CDLL(str(library))

    return run


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    """The whole relation loss; the modules that test something else define another library."""
    result = compile_emulation("loss.cpp", "-O1")
    result.relation_loss.restype = ctypes.c_char_p
    return result
