"""Compiles kernels for the host, with the emulation in cuda_emulation/."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from compile_once import compile_once


@pytest.fixture(scope="session")
def compile_emulation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Return a function that compiles sources in cuda_emulation/ with further options and loads the library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(__file__).parent / "cuda_emulation"

    def run(*sources: str, further: Sequence[str] = ("-O1",)) -> ctypes.CDLL:
        options = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        options.append("-ftree-vectorize")  # the products and clocks of the emulation, also with -O1
        options.append("-DSRPKD_EMULATION")  # tensor maps without the headers of CUDA
        options += [*further, *shlex.split(os.environ.get("SRPKD_CXX_FLAGS", ""))]
        # without LD_PRELOAD, because the compiler does not run under the sanitizers that tests/sanitize.py preloads
        environment = {**os.environ, "LD_PRELOAD": ""}

        def output(suffix: str, *command: str | Path) -> Path:
            return compile_once(tmp_path_factory, [compiler, *options, *command], suffix, environment)[1]

        objects = [output(".o", "-c", f"-I{folder}", folder / source) for source in sources]
        return ctypes.CDLL(str(output(".so", "-shared", *objects)))

    return run


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    """The whole relation loss; the modules that test something else define another library."""
    result = compile_emulation("loss.cpp", "sm80_tiles.cpp", "sm90_tiles.cpp")
    result.relation_loss.restype = ctypes.c_char_p
    return result
