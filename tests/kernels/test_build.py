"""The build of the extension: ahead of time, on first use, and the messages if it fails. Most compilers are fakes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from helpers import ROOT, features
from torch.utils import cpp_extension

from srpkd import relation_loss
from srpkd.info import describe
from srpkd.kernels import BackendUnavailable, Relation, auto_backend, build, native

CPU = torch.device("cpu")
L1 = Relation("row", "l1")
VARIABLES = (
    "SRPKD_BUILD", "SRPKD_BUILD_CUDA", "SRPKD_CXX_FLAGS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "TORCH_EXTENSIONS_DIR",
    "CXX", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run without the environment's settings, and look for the extension again before and after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    native.load_existing.cache_clear()
    yield
    native.load_existing.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hide the extension that is built ahead of time; return the path of the one to build on first use."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "cuda_unavailable_reason", lambda: "nvcc does not run: tests replace subprocess.run")
    original = importlib.util.find_spec
    ours = f"srpkd.kernels.{build.NAME}"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == ours else original(name, *rest)
    )
    return build.cached_library()


# --- settings -------------------------------------------------------------------------------------------------------


def test_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.setting() == ""
    for value in ("0", "1"):
        monkeypatch.setenv("SRPKD_BUILD", value)
        assert build.setting() == value
    monkeypatch.setenv("SRPKD_BUILD", "yes")
    with pytest.raises(ValueError, match="SRPKD_BUILD='yes'"):
        build.setting()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable has priority over the installed GPUs, and these over the default list."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as with a driver that is too old
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: pytest.fail("it raises"))
    assert build.architectures() == build.DEFAULT_ARCHITECTURES
    installed = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(installed))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: installed[index])
    assert build.architectures() == "8.6;9.0a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert build.architectures() == "8.6;9.0a"
    installed[:] = [(7, 5)]
    assert build.architectures() == ""
    installed[:] = [(7, 5), (8, 0)]
    assert build.architectures() == "8.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert build.architectures() == "8.9"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0a", "8.0;9.0a"),
        ("8.6", "8.6"),
        ("9.0", "9.0a"),  # without the suffix there are no instructions of wgmma
        ("9.0+PTX", "8.0+PTX;9.0a"),
        ("8.0 8.6 9.0+PTX", "8.0+PTX;8.6;9.0a"),
        ("5.2 6.0 6.1 7.0 7.2 7.5 8.0 8.6 8.7 9.0+PTX", "8.0+PTX;8.6;8.7;9.0a"),  # of NVIDIA's containers
        ("Ampere;Hopper", "8.0;8.6+PTX;9.0a"),
        ("Turing;Ada", "8.9+PTX"),
        ("8.0;12.0", "8.0+PTX"),  # nvcc of CUDA 12.6
        ("12.0", "8.0+PTX"),
        ("7.5", ""),
        ("8.0+PTX;9.0a;9.0;", "8.0+PTX;9.0a"),
        ("8.8;10.0f+PTX", "8.8;10.0f+PTX"),  # which torch.utils.cpp_extension refuses
    ],
)
def test_lists_of_architectures(listed: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels and nvcc do not support is left out, and what is too new gets PTX."""
    known = frozenset(("50", "60", "70", "75", "80", "86", "87", "88", "89", "90", "100"))
    monkeypatch.setattr(build, "_nvcc_architectures", lambda home: known)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.architectures() == expected
    codes = [flag.rpartition("code=")[2] for flag in build.nvcc_flags() if "-gencode" in flag]
    for name in filter(None, expected.split(";")):
        number = name.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}" in codes and (f"compute_{number}" in codes) == name.endswith("+PTX")
    assert len(codes) == len(set(codes)) == len(re.findall(r"\d\.|PTX", expected))
    if expected:
        assert cpp_extension._get_cuda_arch_flags(build.nvcc_flags()) == []  # torch adds none


def test_nvcc_tells_its_architectures(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_120\\n'\n")
    nvcc.chmod(0o755)
    assert build._nvcc_architectures(tmp_path) == {"80", "120"}
    assert build._nvcc_architectures(None) == frozenset()


def test_wrong_architectures_are_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They do not raise, because ``auto`` asks for the reason at every first call."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "cuda_home", lambda: tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_80")
    assert "TORCH_CUDA_ARCH_LIST='sm_80': expected architectures" in str(build.cuda_unavailable_reason())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    assert "TORCH_CUDA_ARCH_LIST='7.0;7.5' names no compute capability of 8.0" in str(build.cuda_unavailable_reason())
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(build, "installed_architectures", lambda: ["7.5"])
    assert "the installed GPUs have no compute capability" in str(build.cuda_unavailable_reason())


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert build.jobs() == "12"  # 2 GB each
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert build.jobs() == "2"
    sizes["SC_PHYS_PAGES"] = 1000
    assert build.jobs() == "1"
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == "7"


def test_cuda_unavailable_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CUDA part needs sources, a toolkit and a CUDA build of torch, but no GPU."""
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.cuda_unavailable_reason() == "csrc/cuda contains no sources"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "one.cu").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in build.cuda_unavailable_reason()
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(build, "cuda_home", lambda: None)
    assert "set CUDA_HOME" in build.cuda_unavailable_reason()
    monkeypatch.setattr(build, "cuda_home", lambda: tmp_path)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    for release, fits in (("12.9", False), ("13.0", True)):
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n")
        nvcc.chmod(0o755)
        assert (build.cuda_unavailable_reason() is None) == fits
    nvcc.write_text("#!/bin/sh\n")
    assert "is CUDA of unknown version, but torch is built for CUDA 13.2" in str(build.cuda_unavailable_reason())
    monkeypatch.setenv("SRPKD_BUILD_CUDA", "0")
    assert build.cuda_unavailable_reason() == "SRPKD_BUILD_CUDA=0 disables the CUDA part"


def test_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A toolkit contains headers: an nvcc in PATH without headers, such as a wrapper, does not count."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build.cuda_home() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert build.cuda_home() == tmp_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert build.cuda_home() == tmp_path


def test_all_sources_are_installed() -> None:
    arguments = _setup_arguments({"SRPKD_BUILD": "0"})
    patterns = arguments["package_data"]["srpkd.csrc"]
    assert "srpkd.csrc" in arguments["packages"]
    for path in build.CSRC.glob("**/*"):
        if path.is_file():
            relative = str(path.relative_to(build.CSRC))
            assert any(fnmatch(relative, pattern) and relative.count("/") == pattern.count("/") for pattern in patterns)


# --- without a build ------------------------------------------------------------------------------------------------


def test_auto_does_not_build(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda: pytest.fail("auto started a build"))
    assert native.unavailable_reason(CPU) is None
    assert not native.is_built(CPU)
    assert auto_backend(CPU, L1) == "blocked"
    assert relation_loss(*features(), layout="nlc", distance="l1").isfinite()
    assert 'native       not built: the first use of backend="native" builds it' in describe()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "no C++ compiler (no-such-compiler) found"),
        ("SRPKD_BUILD", "0", "SRPKD_BUILD=0 disables the build"),
        ("SRPKD_BUILD", "yes", "SRPKD_BUILD='yes': expected 0 (never build)"),
        ("SRPKD_CXX_FLAGS", '"-O1', "SRPKD_CXX_FLAGS='\"-O1': expected flags as in a shell (No closing quotation)"),
    ],
)
def test_reason_if_it_cannot_be_built(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert reason in str(native.unavailable_reason(CPU))
    assert f"native       not available: {reason}" in describe()
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        relation_loss(*features(), layout="nlc", backend="native")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        native.extension()
    assert auto_backend(CPU, L1) == "blocked"


def test_missing_ninja(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = build.shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name, **rest: None if name == "ninja" else which(name, **rest))
    assert native.unavailable_reason(CPU) == "ninja is not installed: pip install ninja"


def test_stale_extension_after_a_build(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_for_another_torch() -> None:
        unbuilt.parent.mkdir()
        unbuilt.write_bytes(b"\x7fELF\0srpkd-built-for-torch:1.13.1;\0")

    monkeypatch.setattr(build, "unavailable_reason", lambda: None)
    monkeypatch.setattr(build, "build", build_for_another_torch)
    with pytest.raises(RuntimeError, match=r"was built but is not available: .*built for torch 1\.13\.1"):
        native.extension()


def test_binary_for_another_torch(unbuilt: Path) -> None:
    """It is refused by its markers before it is loaded: these files cannot be loaded."""
    unbuilt.parent.mkdir()
    for marker, version in ((b"\0srpkd-built-for-torch:1.13.1+cu99;\0", "1.13.1+cu99"), (b"not a binary", "None")):
        unbuilt.write_bytes(b"\x7fELF" + bytes(1000) + marker + bytes(1000))
        native.load_existing.cache_clear()
        reason = str(native.unavailable_reason(CPU))
        assert f"built for torch {version}, and this is torch {torch.__version__}" in reason
        with pytest.raises(BackendUnavailable, match="install srpkd again"):
            relation_loss(*features(), layout="nlc", backend="native")
        assert relation_loss(*features(), layout="nlc", distance="l1").isfinite()
        assert reason in describe()


def markers(sources: str) -> bytes:
    """Return the markers of a binary that is built for this torch."""
    return f"srpkd-built-for-torch:{torch.__version__};srpkd-built-from-sources:{sources};".encode()


def test_binary_from_different_sources(unbuilt: Path) -> None:
    """As after a pull without a new installation: the operators may differ from those that Python calls."""
    unbuilt.parent.mkdir()
    unbuilt.write_bytes(markers("0123456789abcdef"))
    assert "built from different sources: install srpkd again" in str(native.unavailable_reason(CPU))
    assert auto_backend(CPU, L1) == "blocked"


def test_binary_that_does_not_load(unbuilt: Path) -> None:
    unbuilt.parent.mkdir()
    unbuilt.write_bytes(markers(build.source_digest()))
    assert "does not load" in str(native.unavailable_reason(CPU))
    assert auto_backend(CPU, L1) == "blocked"


# --- on first use ---------------------------------------------------------------------------------------------------


def test_concurrent_requests_build_once(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    started, both = [], threading.Barrier(2)

    def compiler(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command)
        Path(json.loads(command[-1])["build_directory"], unbuilt.name).write_text("a library", encoding="utf-8")
        return SimpleNamespace(returncode=0, stdout="")

    def request() -> None:
        both.wait()
        assert build.build() == unbuilt

    monkeypatch.setattr(build.subprocess, "run", compiler)
    threads = [threading.Thread(target=request) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert unbuilt.read_text(encoding="utf-8") == "a library"
    assert sorted(path.name for path in unbuilt.parent.iterdir()) == [unbuilt.name, "lock"]
    output = capfd.readouterr().err
    assert f"building the native backend in {unbuilt.parent}" in output
    assert "srpkd: built in" in output


def test_failed_build(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = SimpleNamespace(returncode=1, stdout="error: expected ';'")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(build.BuildError, match="expected ';'"):
        native.extension()
    assert not unbuilt.exists()
    assert relation_loss(*features(), layout="nlc", distance="l1").isfinite()


def test_each_configuration_has_its_own_path(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    other_torch = build.cached_library()
    monkeypatch.setattr(build, "CSRC", tmp_path)
    other_sources = build.cached_library()
    monkeypatch.setenv("SRPKD_CXX_FLAGS", "-O0 '-DNAME=two words'")
    assert build.flags(cuda=False)[-2:] == ["-O0", "-DNAME=two words"]
    assert len({unbuilt, other_torch, other_sources, build.cached_library()}) == 4


@pytest.mark.slow
@pytest.mark.core(0)
def test_builds_and_loads(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real build of an extension that compiles in seconds."""
    if (reason := build.unavailable_reason()) is not None:
        pytest.skip(reason)
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        'extern "C" __attribute__((used)) const char markers[] = "srpkd-built-for-torch:" SRPKD_TORCH_VERSION '
        '";srpkd-built-from-sources:" SRPKD_SOURCES ";";\n'
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("torch_version") = SRPKD_TORCH_VERSION; '
        'm.attr("cuda_architectures") = SRPKD_CUDA_ARCHITECTURES; }\n'
    )
    # files in the current folder must not hide modules of the standard library
    (tmp_path / "inspect.py").write_text("raise ImportError('imported instead of the standard library')\n")
    monkeypatch.chdir(tmp_path)
    # not the name of the real extension: pybind11 returns the first of two modules with the same name
    monkeypatch.setattr(build, "NAME", "_small")
    monkeypatch.setattr(build, "CSRC", csrc)
    module = native.extension()
    assert module.torch_version == torch.__version__
    assert module.cuda_architectures == ""
    assert native.is_built(CPU)
    assert build.stale_reason(build.cached_library()) is None


def test_ninja_accepts_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A dry run of the build on first use: torch names an object file after its source, without the folder."""
    cuda = build.cuda_unavailable_reason() is None
    environment = build.environment(cuda)
    if (ninja := shutil.which("ninja", path=environment["PATH"])) is None:
        pytest.skip("ninja is not installed")
    tools, folder = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("build")
    (tools / "ninja").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {ninja} --version\n{ninja} -n "$@"\necho exit status $?\nexit 1\n'
    )
    (tools / "ninja").chmod(0o755)
    path = os.pathsep.join([str(tools), environment["PATH"]])
    monkeypatch.setattr(build, "environment", lambda _: environment | {"PATH": path})
    with pytest.raises(build.BuildError, match="exit status 0") as failure:
        build.build_in(folder)
    steps = len(build.sources(cuda)) + 1
    assert f"[{steps}/{steps}]" in str(failure.value)


# --- ahead of time --------------------------------------------------------------------------------------------------


def _setup_arguments(environment: dict[str, str], with_torch: bool = True) -> dict[str, Any]:
    """Return the arguments that setup.py passes to setuptools."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"SRPKD_BUILD_CUDA": "0"} | environment).items():
            patch.setenv(name, value)
        if not with_torch:
            patch.setitem(sys.modules, "torch", None)
        patch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_setup_builds_with_torch() -> None:
    arguments = _setup_arguments({})
    (extension,) = arguments["ext_modules"]
    assert extension.name == f"srpkd.kernels.{build.NAME}"
    assert "csrc/bindings.cpp" in extension.sources
    assert f'-DSRPKD_TORCH_VERSION="{torch.__version__}"' in extension.extra_compile_args["cxx"]
    assert not any(flag.startswith("-march") for flag in extension.extra_compile_args["cxx"])


def test_setup_does_not_build() -> None:
    """SRPKD_BUILD=0 applies with and without torch."""
    for with_torch in (True, False):
        assert "ext_modules" not in _setup_arguments({"SRPKD_BUILD": "0"}, with_torch)


def test_setup_without_torch() -> None:
    assert "ext_modules" not in _setup_arguments({}, with_torch=False)
    with pytest.raises(SystemExit, match="torch cannot be imported"):
        _setup_arguments({"SRPKD_BUILD": "1"}, with_torch=False)


def test_setup_on_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """os.sysconf, which Windows does not have, ended the installation."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(sys, "platform", "win32")
    assert "ext_modules" not in _setup_arguments({})
    assert "installing without the native backend: it can be built with GCC or clang" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="SRPKD_BUILD=1, but the extension cannot be built here: it can be built with"):
        _setup_arguments({"SRPKD_BUILD": "1"})


def _failed_build(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, toolkit: Path | None = None
) -> tuple[list[list[str]], list[setuptools.Extension]]:
    """Run setup.py's build_ext with compilers that fail; return the sources of each attempt, and what is installed."""
    attempts: list[list[str]] = []

    def fail(command: setuptools.Command) -> None:
        attempts.append([source for extension in command.extensions for source in extension.sources])
        raise subprocess.CalledProcessError(1, "c++")

    if toolkit is not None:
        nvcc, header = toolkit / "bin" / "nvcc", toolkit / "include" / "cuda_runtime.h"
        for file in (nvcc, header):
            file.parent.mkdir()
            file.touch(0o755)
        nvcc.write_text("#!/bin/sh\necho release 13.2\n")
        environment = environment | {"SRPKD_BUILD_CUDA": "1", "CUDA_HOME": str(toolkit)}
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)  # sources are relative paths
        patch.setattr(torch.version, "cuda", "13.2")
        patch.setattr(cpp_extension, "CUDAExtension", cpp_extension.CppExtension)  # the real one needs a real toolkit
        arguments = _setup_arguments(environment)
        command = setuptools.Distribution(arguments).get_command_obj("build_ext")
        patch.setattr(cpp_extension.BuildExtension, "run", fail)
        command.ensure_finalized()
        command.run()
    return attempts, command.extensions


def test_setup_continues_after_a_failed_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    attempts, installed = _failed_build({}, monkeypatch)
    assert installed == []
    assert len(attempts) == 1
    assert "installing without the native backend" in capsys.readouterr().out


def test_setup_builds_without_cuda_after_a_failed_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (with_cuda, without), installed = _failed_build({}, monkeypatch, tmp_path)
    assert installed == []
    assert any(source.endswith(".cu") for source in with_cuda)
    assert without == [source for source in with_cuda if "cuda/" not in source]
    output = capsys.readouterr().out
    assert output.index("with CUDA failed") < output.index("without CUDA failed")


def test_setup_fails_if_the_build_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _failed_build({"SRPKD_BUILD": "1"}, monkeypatch)
