"""Building the compiled part, ``csrc/``: what setup.py builds ahead of time, and what is built on first use.

setup.py loads this file by its path, so it imports nothing of this package, and torch only inside functions.

Environment:
    SRPKD_BUILD            0: never build; 1: installing fails where building does; unset: build where possible.
    SRPKD_BUILD_CUDA       0: leave the GPU part out; it takes most of the time.
    SRPKD_CXX_FLAGS        further flags for the host's compiler, as in ``-O1 -fsanitize=address``.
    TORCH_CUDA_ARCH_LIST   the GPU architectures to build for, as in ``8.0;9.0a``; else those of the GPUs that are
                           here, else DEFAULT_ARCHITECTURES.
    MAX_JOBS               how many compilers run side by side; else as many as cores and memory allow.
    TORCH_EXTENSIONS_DIR   where what is built on first use is kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "_native"
CSRC = Path(__file__).resolve().parent.parent / "csrc"  # beside kernels/, in the repository and where it is installed
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
BYTES_PER_JOB = 2**31  # the compilers of one source, torch's headers in it, stay below 2 GB
# -fopenmp is for compiling alone: linked, it could bring a second OpenMP runtime beside the one that torch brings
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", *(["-fopenmp"] if sys.platform == "linux" else [])]
NVCC_FLAGS = ["-O3", "-lineinfo"]
MARKS = re.compile(rb"srpkd-built-(for-torch|from-sources):([^;]*);")  # csrc/bindings.cpp leaves them in the binary


class BuildError(RuntimeError):
    """The compiled part could not be built; says why."""


def setting() -> str:
    """SRPKD_BUILD: "0", "1" or ""."""
    value = os.environ.get("SRPKD_BUILD", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"SRPKD_BUILD={value!r}: expected 0 (never build), 1 (fail where building fails) or nothing")
    return value


def stale_reason(library: Path) -> str | None:
    """Why a binary is of no use here, read without loading it: it would fail on a symbol, or worse, not fail.

    None where it was built for this torch, and from these sources.
    """
    import torch

    marks = {name.decode(): value.decode() for name, value in MARKS.findall(library.read_bytes())}
    if (version := marks.get("for-torch")) != torch.__version__:
        return f"it was built for torch {version}, and this is torch {torch.__version__}"
    return None if marks.get("from-sources") == source_digest() else "it was built from other sources than these"


# --- what to build with ---------------------------------------------------------------------------------------------


def sources(cuda: bool) -> list[Path]:
    """The sources of the extension, with the GPU's or without."""
    found = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    if cuda:
        found += [*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")]
    return sorted(found)


def source_digest() -> str:
    """A hash of everything in csrc/."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("**/*")):
        if path.is_file() and path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(path.relative_to(CSRC).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_home() -> Path | None:
    """The CUDA toolkit that nvcc and its headers are in, or None. Whether there is a GPU does not matter."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).parents[1]]
    for guess in [*filter(None, guesses), "/usr/local/cuda"]:
        if (Path(guess) / "bin" / "nvcc").exists() and (Path(guess) / "include" / "cuda_runtime.h").exists():
            return Path(guess)
    return None


def cuda_unavailable_reason() -> str | None:
    """Why the GPU part is left out, or None where it can be built."""
    import torch

    if os.environ.get("SRPKD_BUILD_CUDA") == "0":
        return "SRPKD_BUILD_CUDA=0 leaves it out"
    if not list(CSRC.glob("cuda/*.cu")):
        return "csrc/cuda has no sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if (home := cuda_home()) is None:
        return "no CUDA toolkit was found: set CUDA_HOME to one"
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"{home} is CUDA {'.'.join(release.groups()) if release else '?'}, torch's is {torch.version.cuda}"
    return None


def architectures() -> str:
    """The GPU architectures to build for, as TORCH_CUDA_ARCH_LIST has them."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    import torch

    here = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    # only the "a" of Hopper has its tensor cores' own instructions
    names = [f"{major}.{minor}" + ("a" if major == 9 else "") for major, minor in sorted(here)]
    return ";".join(names) or DEFAULT_ARCHITECTURES


def jobs() -> str:
    """MAX_JOBS, or as many as there are cores, and memory for."""
    if chosen := os.environ.get("MAX_JOBS"):
        return chosen
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(cores, memory // BYTES_PER_JOB)))


def environment(cuda: bool) -> dict[str, str]:
    """What torch.utils.cpp_extension is to find in the environment."""
    # ninja, when it was installed by pip, is beside this Python
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"MAX_JOBS": jobs(), "PATH": path}
    return settings | {"CUDA_HOME": str(cuda_home()), "TORCH_CUDA_ARCH_LIST": architectures()} if cuda else settings


def flags(cuda: bool) -> list[str]:
    """The flags for the host's compiler."""
    import torch

    macros = {"TORCH_VERSION": torch.__version__, "SOURCES": source_digest()}
    macros["CUDA_ARCHITECTURES"] = architectures() if cuda else ""
    defined = [f'-DSRPKD_{name}="{value}"' for name, value in macros.items()]
    return [*CXX_FLAGS, *defined, *shlex.split(os.environ.get("SRPKD_CXX_FLAGS", ""))]


# --- building on first use ------------------------------------------------------------------------------------------


def unavailable_reason() -> str | None:
    """Why the extension cannot be built here, or None."""
    compiler = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    if setting() == "0":
        return "SRPKD_BUILD=0 forbids building it"
    if os.name != "posix":
        return "it is built with GCC or clang, on Linux or macOS"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}): install g++ or clang, or set CXX"
    if shutil.which("ninja", path=environment(cuda=False)["PATH"]) is None:
        return "ninja is not installed: pip install ninja"
    if not sources(cuda=False):
        return f"{CSRC} has no sources"
    return None


def cached_library() -> Path:
    """Where the extension lies once it was built on first use: a place for every torch, source and set of flags."""
    import torch

    cuda = cuda_unavailable_reason() is None
    digest = hashlib.sha256(repr((sys.version, torch.__version__, flags(cuda), NVCC_FLAGS)).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return root / f"srpkd_{digest.hexdigest()[:16]}" / f"{NAME}.so"


def build() -> Path:
    """Build the extension for first use, once however many processes ask, and give its place.

    Raises:
        BuildError: with the compiler's last words.
    """
    library = cached_library()
    with _locked(library.parent):
        if library.exists():  # another process built it while this one waited
            return library
        print(f"srpkd: building the native backend into {library.parent}: once, for about a minute", file=sys.stderr)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            # in a process of its own, that its environment and what it loads stay there; -P, or the files beside this
            # one would hide modules that they share a name with
            command = [sys.executable, "-P", str(Path(__file__).resolve()), scratch]
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if result.returncode:
                raise BuildError(f"building the native backend failed:\n{result.stdout[-4000:]}")
            os.replace(Path(scratch) / library.name, library)  # at once: nobody finds half a file
        print(f"srpkd: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return library


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(folder: str) -> None:
    """Compile, link and load: what ``build`` runs in a process of its own."""
    cuda = cuda_unavailable_reason() is None
    os.environ.update(environment(cuda))
    from torch.utils import cpp_extension

    cpp_extension.load(
        NAME,
        [str(source) for source in sources(cuda)],
        extra_cflags=[shlex.quote(flag) for flag in flags(cuda)],
        extra_cuda_cflags=NVCC_FLAGS,
        build_directory=folder,
        with_cuda=cuda,
        verbose=True,
    )


if __name__ == "__main__":
    _build_into(sys.argv[1])
