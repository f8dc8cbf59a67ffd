"""Building the extension: what is built when, and what is said where it cannot be. Compilers are mostly faked."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
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

from srpkd import relation_loss
from srpkd.info import describe
from srpkd.kernels import BackendUnavailable, Relation, auto_backend, build, native

CPU = torch.device("cpu")
VARIABLES = (
    "SRPKD_BUILD", "SRPKD_BUILD_CUDA", "SRPKD_CXX_FLAGS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "TORCH_EXTENSIONS_DIR",
    "CXX", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting from outside, and none that stays; what is known of the extension is asked anew, then and after."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    native._existing.cache_clear()
    yield
    native._existing.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No extension was built ahead of time, and none on first use: gives where that one would lie."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "cuda_unavailable_reason", lambda: "nvcc is not asked: a test fakes whatever is run")
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
    """The variable, then the GPUs that are here, then the default list."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert build.architectures() == build.DEFAULT_ARCHITECTURES
    here = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: here[index])
    assert build.architectures() == "8.6;9.0a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert build.architectures() == "7.5"


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert build.jobs() == "12"  # of 2 GB each
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert build.jobs() == "2"
    sizes["SC_PHYS_PAGES"] = 1000
    assert build.jobs() == "1"
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == "7"


def test_why_no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By what is there to compile with, never by whether there is a GPU."""
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.cuda_unavailable_reason() == "csrc/cuda has no sources"
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
    monkeypatch.setenv("SRPKD_BUILD_CUDA", "0")
    assert build.cuda_unavailable_reason() == "SRPKD_BUILD_CUDA=0 leaves it out"


def test_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A toolkit has headers beside its compiler: a lone nvcc in PATH, as of a wrapper, is none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build.cuda_home() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert build.cuda_home() == tmp_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert build.cuda_home() == tmp_path


def test_everything_that_a_build_needs_is_installed() -> None:
    arguments = _setup_arguments({"SRPKD_BUILD": "0"})
    patterns = arguments["package_data"]["srpkd.csrc"]
    assert "srpkd.csrc" in arguments["packages"]
    for path in build.CSRC.glob("**/*"):
        if path.is_file():
            relative = str(path.relative_to(build.CSRC))
            assert any(fnmatch(relative, pattern) and relative.count("/") == pattern.count("/") for pattern in patterns)


# --- where it is not built ------------------------------------------------------------------------------------------


def test_auto_does_not_build(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda: pytest.fail("auto started a build"))
    assert native.unavailable_reason(CPU) is None
    assert not native.is_built(CPU)
    assert auto_backend(CPU, Relation()) == "blocked"
    assert relation_loss(*features(), layout="nlc").isfinite()
    assert 'native       not built: the first use of backend="native" builds it' in describe()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
        ("SRPKD_BUILD", "0", "SRPKD_BUILD=0 forbids building it"),
    ],
)
def test_says_why_it_cannot_be_built(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert reason in native.unavailable_reason(CPU)
    assert f"native       not available: {reason}" in describe()
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        relation_loss(*features(), layout="nlc", backend="native")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        native.extension()
    assert auto_backend(CPU, Relation()) == "blocked"


def test_ninja_is_missing(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = build.shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name, **rest: None if name == "ninja" else which(name, **rest))
    assert native.unavailable_reason(CPU) == "ninja is not installed: pip install ninja"


def test_what_was_built_and_does_not_fit_is_said(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_for_another_torch() -> None:
        unbuilt.parent.mkdir()
        unbuilt.write_bytes(b"\x7fELF\0srpkd-built-for-torch:1.13.1;\0")

    monkeypatch.setattr(build, "unavailable_reason", lambda: None)
    monkeypatch.setattr(build, "build", build_for_another_torch)
    with pytest.raises(RuntimeError, match=r"was built and is not available: .*built for torch 1\.13\.1"):
        native.extension()


def test_binary_for_another_torch(unbuilt: Path) -> None:
    """It is refused by what is written in it, before it is loaded; these could not be."""
    unbuilt.parent.mkdir()
    for mark, version in ((b"\0srpkd-built-for-torch:1.13.1+cu99;\0", "1.13.1+cu99"), (b"not a binary", "None")):
        unbuilt.write_bytes(b"\x7fELF" + bytes(1000) + mark + bytes(1000))
        native._existing.cache_clear()
        reason = native.unavailable_reason(CPU)
        assert f"built for torch {version}, and this is torch {torch.__version__}" in reason
        with pytest.raises(BackendUnavailable, match="install srpkd again"):
            relation_loss(*features(), layout="nlc", backend="native")
        assert relation_loss(*features(), layout="nlc").isfinite()
        assert reason in describe()


def marks(sources: str) -> bytes:
    """What a binary built for this torch says."""
    return f"srpkd-built-for-torch:{torch.__version__};srpkd-built-from-sources:{sources};".encode()


def test_binary_from_other_sources(unbuilt: Path) -> None:
    """As after a pull without a new installation: its operators may be others than Python calls."""
    unbuilt.parent.mkdir()
    unbuilt.write_bytes(marks("0123456789abcdef"))
    assert "built from other sources than these: install srpkd again" in native.unavailable_reason(CPU)
    assert auto_backend(CPU, Relation()) == "blocked"


def test_binary_that_does_not_load(unbuilt: Path) -> None:
    unbuilt.parent.mkdir()
    unbuilt.write_bytes(marks(build.source_digest()))
    assert "does not load" in native.unavailable_reason(CPU)
    assert auto_backend(CPU, Relation()) == "blocked"


# --- on first use ---------------------------------------------------------------------------------------------------


def test_built_once_by_many(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    started, both = [], threading.Barrier(2)

    def compiler(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command)
        Path(command[-1], unbuilt.name).write_text("a library")
        return SimpleNamespace(returncode=0, stdout="")

    def ask() -> None:
        both.wait()
        assert build.build() == unbuilt

    monkeypatch.setattr(build.subprocess, "run", compiler)
    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(started) == 1
    assert unbuilt.read_text() == "a library"
    assert sorted(path.name for path in unbuilt.parent.iterdir()) == [unbuilt.name, "lock"]
    said = capfd.readouterr().err
    assert f"building the native backend into {unbuilt.parent}" in said
    assert "srpkd: built in" in said


def test_build_that_fails(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = SimpleNamespace(returncode=1, stdout="error: expected ';'")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(build.BuildError, match="expected ';'"):
        native.extension()
    assert not unbuilt.exists()
    assert relation_loss(*features(), layout="nlc").isfinite()


def test_a_change_has_a_place_of_its_own(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    other_torch = build.cached_library()
    monkeypatch.setattr(build, "CSRC", tmp_path)
    other_sources = build.cached_library()
    monkeypatch.setenv("SRPKD_CXX_FLAGS", "-O0 '-DNAME=two words'")
    assert build.flags(cuda=False)[-2:] == ["-O0", "-DNAME=two words"]
    assert len({unbuilt, other_torch, other_sources, build.cached_library()}) == 4


@pytest.mark.slow
def test_builds_and_loads(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it, with the compiler, for an extension that compiles in seconds."""
    if (reason := build.unavailable_reason()) is not None:
        pytest.skip(reason)
    csrc = tmp_path / "package" / "csrc"
    csrc.mkdir(parents=True)
    (csrc / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        'extern "C" __attribute__((used)) const char marks[] = "srpkd-built-for-torch:" SRPKD_TORCH_VERSION '
        '";srpkd-built-from-sources:" SRPKD_SOURCES ";";\n'
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.attr("torch_version") = SRPKD_TORCH_VERSION; '
        'm.attr("cuda_architectures") = SRPKD_CUDA_ARCHITECTURES; }\n'
    )
    kernels = tmp_path / "package" / "kernels"
    kernels.mkdir()
    # a name that the standard library has too, as some files beside build.py do: it must not be found
    (kernels / "inspect.py").write_text("raise ImportError('taken for the standard library')\n")
    script = kernels / "build.py"
    # and of another name than the real extension's: of two with one name pybind11 gives the first, if that is loaded
    script.write_text(Path(build.__file__).read_text().replace(f'NAME = "{build.NAME}"', 'NAME = "_small"'))
    monkeypatch.setattr(build, "NAME", "_small")
    monkeypatch.setattr(build, "CSRC", csrc)
    monkeypatch.setattr(build, "__file__", str(script))
    module = native.extension()
    assert module.torch_version == torch.__version__
    assert module.cuda_architectures == ""
    assert native.is_built(CPU)
    assert build.stale_reason(build.cached_library()) is None


# --- ahead of time --------------------------------------------------------------------------------------------------


def _setup_arguments(environment: dict[str, str], torch_is_there: bool = True) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if not torch_is_there:
            patch.setitem(sys.modules, "torch", None)
        patch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_setup_builds_where_torch_is() -> None:
    arguments = _setup_arguments({})
    (extension,) = arguments["ext_modules"]
    assert extension.name == f"srpkd.kernels.{build.NAME}"
    assert "csrc/bindings.cpp" in extension.sources
    assert f'-DSRPKD_TORCH_VERSION="{torch.__version__}"' in extension.extra_compile_args["cxx"]
    assert not any(flag.startswith("-march") for flag in extension.extra_compile_args["cxx"])


def test_setup_skips() -> None:
    """Before torch is imported at all."""
    for torch_is_there in (True, False):
        assert "ext_modules" not in _setup_arguments({"SRPKD_BUILD": "0"}, torch_is_there)


def test_setup_without_torch() -> None:
    assert "ext_modules" not in _setup_arguments({}, torch_is_there=False)
    with pytest.raises(SystemExit, match="torch cannot be imported"):
        _setup_arguments({"SRPKD_BUILD": "1"}, torch_is_there=False)


def _build_that_fails(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list:
    arguments = _setup_arguments(environment)
    command_class = arguments["cmdclass"]["build_ext"]

    def fail(self) -> None:
        raise subprocess.CalledProcessError(1, "c++")

    monkeypatch.setattr(command_class.__mro__[1], "run", fail)
    command = command_class.__new__(command_class)
    command.extensions = arguments["ext_modules"]
    command.run()
    return command.extensions


def test_setup_survives_a_build_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert _build_that_fails({}, monkeypatch) == []
    assert "installing without the native backend" in capsys.readouterr().out


def test_setup_fails_where_the_build_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _build_that_fails({"SRPKD_BUILD": "1"}, monkeypatch)
