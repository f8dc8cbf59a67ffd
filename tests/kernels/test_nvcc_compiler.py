"""nvcc with C++ compilers and C libraries that its release does not support. Compilers are fakes."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from helpers import ROOT
from torch.utils import cpp_extension

from srpkd.kernels import build, native

# the first error of CUDA 13.0 with GCC 16, and with the C library of Debian in 2026
GCC_16 = (
    "In file included from <command-line>:\n"
    "crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!\n"
    "  137 | #error -- unsupported GNU version!\n"
)
GLIBC_243 = (
    "/usr/include/bits/mathcalls.h(206): error: exception specification is incompatible with that of previous function "
    '"rsqrt" (declared at line 629 of /opt/cuda/targets/x86_64-linux/include/crt/math_functions.h)\n'
)
REMEDY = "set CC and CXX to older compilers, such as gcc-14 and g++-14, or CUDA_HOME to a newer toolkit"


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toolkit that fits torch, and whose nvcc prints the file errors and fails if that exists."""
    for name in ("SRPKD_BUILD", "SRPKD_BUILD_CUDA", "CC", "CXX", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch(0o755)
    (tmp_path / "bin/nvcc").write_text(
        "#!/bin/sh\n"
        f'test "$1" = --version && exec echo release 13.2\n'
        f'echo "$@" >> {tmp_path}/calls\n'
        f"test ! -e {tmp_path}/errors || {{ cat {tmp_path}/errors >&2; exit 2; }}\n"
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    build._nvcc_error.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        (GCC_16, "unsupported GNU version! gcc versions later than 15 are not supported!"),
        (GLIBC_243, 'exception specification is incompatible with that of previous function "rsqrt" ('),
        ("g++-20: No such file\nnvcc fatal   : Failed to preprocess host compiler.\n", "nvcc fatal : Failed to pre"),
        ("Killed\n", "Killed"),
        ("", "exit status 2"),
    ],
)
def test_an_nvcc_that_cannot_compile(printed: str, error: str, toolkit: Path) -> None:
    assert build.nvcc_problem() is None
    build._nvcc_error.cache_clear()
    (toolkit / "errors").write_text(printed)
    problem = str(build.nvcc_problem())
    assert problem.startswith(f"{toolkit}/bin/nvcc cannot compile with the default compiler on this system ({error}")
    assert problem.endswith(f"): {REMEDY}")


def test_an_nvcc_that_does_not_run(toolkit: Path) -> None:
    """Such as that of another processor: the choice of a backend asks for it, so it must not raise."""
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text("not a program")
    for mode, error in ((0o755, "Exec format error"), (0o644, "Permission denied")):
        nvcc.chmod(mode)
        expected = f"{nvcc} does not run ({error}): set CUDA_HOME to a toolkit that runs here"
        assert build.cuda_unavailable_reason() == expected


def test_without_a_toolkit_there_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_home", lambda: None)
    assert build.nvcc_problem() is None


@pytest.mark.parametrize(
    ("variables", "probed", "flag"),
    [
        ({}, None, None),
        ({"CXX": "g++-14"}, "g++-14", "g++-14"),
        ({"CXX": "g++-14", "NVCC_CCBIN": "g++-13"}, "g++-13", "g++-13"),
        ({"CXX": "g++-14", "CC": "gcc-12"}, "gcc-12", None),  # torch.utils.cpp_extension passes CC
    ],
    ids=str,
)
def test_nvcc_uses_the_chosen_compiler(
    variables: dict[str, str], probed: str | None, flag: str | None, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build.nvcc_problem() is None
    (call,) = (toolkit / "calls").read_text("utf-8").splitlines()
    assert call.startswith(f"-std=c++20 -ccbin {probed} -x cu" if probed else "-std=c++20 -x cu")
    assert [found for found in build.nvcc_flags() if "ccbin" in found] == ([f"-ccbin={flag}"] if flag else [])


def test_it_is_not_built_on_first_use(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the build would fail after minutes, at every call."""
    (toolkit / "errors").write_text(GCC_16)
    assert str(build.unavailable_reason()).endswith(f"{REMEDY}; or set SRPKD_BUILD_CUDA=0 to build the CPU part alone")
    monkeypatch.setenv("SRPKD_BUILD_CUDA", "0")
    assert build.unavailable_reason() is None


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments that setup.py passes to setuptools."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(cpp_extension, "CUDAExtension", cpp_extension.CppExtension)  # the real one needs a real toolkit
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_setup_builds_the_cpu_part(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def sources() -> list[str]:
        (extension,) = setup_arguments(monkeypatch)["ext_modules"]
        return extension.sources

    assert any(source.endswith(".cu") for source in sources())
    (toolkit / "errors").write_text(GCC_16)
    assert not any("cuda/" in source for source in sources())
    assert f"building the extension without CUDA: {toolkit}/bin/nvcc cannot compile" in capsys.readouterr().out
    monkeypatch.setenv("SRPKD_BUILD", "1")
    with pytest.raises(SystemExit, match=r"SRPKD_BUILD=1: .* gcc versions later than 15 .* SRPKD_BUILD_CUDA=0"):
        setup_arguments(monkeypatch)


def test_reason_on_a_gpu(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install the same again would not help."""
    (toolkit / "errors").write_text(GCC_16)
    monkeypatch.setattr(native.cuda_device, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(native, "load_existing", lambda: (SimpleNamespace(cuda_architectures=""), None))
    reason = str(native.unavailable_reason(torch.device("cuda", 0)))
    assert reason.startswith(f"it was built without the CUDA part: {toolkit}/bin/nvcc cannot compile")
    assert reason.endswith(f"{REMEDY}, and install srpkd again with --no-build-isolation")
