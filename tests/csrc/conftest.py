"""Compiles kernels for the host, with the emulation in cuda_emulation/."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from compile_once import compile_once
from emulated_kernels import EmulatedGpu
from torch.utils.cpp_extension import include_paths, library_paths

from srpkd.kernels import native

KERNELS = "algebra_kernels.cpp", "sm80_kernels.cpp", "sm90_kernels.cpp"
OF_TORCH = "operator.cpp"


@pytest.fixture(scope="session")
def compile_emulation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Return a function that compiles sources in cuda_emulation/ and loads the library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(__file__).parent / "cuda_emulation"

    def run(*sources: str, optimization: str = "-O1") -> ctypes.CDLL:
        options = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        options.append("-Wno-pass-failed")  # Clang does not unroll all loops that nvcc does
        options.append("-ftree-vectorize")  # the products and clocks of the emulation, also with -O1
        options.append("-fvisibility=hidden")  # else libraries of one process share what functions remember
        options.append("-DSRPKD_EMULATION")  # tensor maps without the headers of CUDA
        options += [optimization, *shlex.split(os.environ.get("SRPKD_CXX_FLAGS", ""))]
        # without LD_PRELOAD, because the compiler does not run under the sanitizers that tests/sanitize.py preloads
        environment = {**os.environ, "LD_PRELOAD": ""}

        def output(suffix: str, *command: str | Path) -> Path:
            return compile_once(tmp_path_factory, [compiler, *options, *command], suffix, environment)[1]

        objects = []
        for source in sources:
            options_of_source = [f"-I{folder}", f"-I{folder / 'runtime'}"]
            if source == OF_TORCH:
                options_of_source += ["-std=c++20", *(f"-isystem{path}" for path in include_paths())]
            objects.append(output(".o", "-c", *options_of_source, folder / source))
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"] if OF_TORCH in sources else []
        return ctypes.CDLL(str(output(".so", "-shared", *objects, *libraries)))

    return run


@pytest.fixture(scope="session")
def library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    """The whole relation loss; the modules that test something else define another library."""
    result = compile_emulation("loss.cpp", *KERNELS)
    result.relation_loss.restype = ctypes.c_char_p
    return result


@pytest.fixture(scope="session")
def operator_library(compile_emulation: Callable[..., ctypes.CDLL]) -> ctypes.CDLL:
    """The operators of csrc/cuda. The extension has their schemas."""
    if (reason := native.unavailable_reason(torch.device("cpu"))) is not None:
        pytest.skip(f"native: {reason}")
    native.extension()
    return compile_emulation(OF_TORCH, *KERNELS)


@pytest.fixture
def emulated_gpu(operator_library: ctypes.CDLL) -> Iterator[Callable[..., EmulatedGpu]]:
    """Return a function that starts an emulated GPU, which runs until the next one or the end of the test."""

    yield partial(EmulatedGpu, operator_library)
    operator_library.stop()
