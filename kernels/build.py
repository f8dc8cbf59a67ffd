"""The build of the C++ extension in ``csrc/``: ahead of time by setup.py, or on first use.

setup.py loads this file by its path. The file therefore imports nothing from this package, and torch only in functions.

Environment:
    SRPKD_BUILD            0: never build; 1: a failed build fails the installation; unset: build if possible.
    SRPKD_BUILD_CUDA       0: build without the CUDA part, which takes most of the time.
    SRPKD_CXX_FLAGS        additional flags for the C++ compiler, for example ``-O1 -fsanitize=address``.
    CXX                    the C++ compiler; ``c++`` by default.
    CC, NVCC_CCBIN         the host's compiler for nvcc; by default CXX, or g++.
    CUDA_HOME, CUDA_PATH   folder of the CUDA toolkit, see ``cuda_home``.
    TORCH_CUDA_ARCH_LIST   GPU architectures to build for, for example ``8.0;9.0a`` or ``Ampere``; by default those of
                           the installed GPUs, or DEFAULT_ARCHITECTURES if there are none. See ``architectures``.
    MAX_JOBS               number of parallel compilers; by default limited by cores and memory.
    TORCH_EXTENSIONS_DIR   folder for extensions that are built on first use; by default torch_extensions in
                           XDG_CACHE_HOME, which is ~/.cache by default.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

NAME = "_native"
CSRC = Path(__file__).resolve().parent.parent / "csrc"  # csrc/ is beside kernels/, in the repository and in a wheel
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
OLDEST_ARCHITECTURE = (8, 0)  # of the kernels
ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
# the names of torch.utils.cpp_extension
NAMED_ARCHITECTURES = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Rubin": "10.7+PTX",
} | dict.fromkeys(("Maxwell", "Pascal", "Volta", "Volta+Tegra", "Turing"), "7.5")
BYTES_PER_JOB = 2**31  # one source with torch's headers needs less than 2 GB to compile
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off"]
# Machine code with source lines is compressed only on request; this makes the extension a fifth as large
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xfatbin", "-compress-all"]
MARKERS = re.compile(rb"srpkd-built-(for-torch|from-sources):([^;]*);")  # csrc/bindings.cpp writes them into the binary
# the program of the process that compiles; its argument is the keywords of cpp_extension.load
COMPILE = "import json, sys; from torch.utils import cpp_extension; cpp_extension.load(**json.loads(sys.argv[1]))"


class BuildError(RuntimeError):
    """The extension cannot be built. After a failed build, the message contains the end of the compiler's output."""


def setting() -> str:
    """Return SRPKD_BUILD: "0", "1" or ""."""
    value = os.environ.get("SRPKD_BUILD", "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"SRPKD_BUILD={value!r}: expected 0 (never build), 1 (a failed build is an error), or leave it unset"
        )
    return value


def stale_reason(library: Path) -> str | None:
    """Return why a binary does not fit this torch or these sources, or None if it does.

    Reads the markers in the file without loading it: a stale library can fail on a symbol or give wrong results.
    """
    import torch

    markers = {name.decode(): value.decode() for name, value in MARKERS.findall(library.read_bytes())}
    if (version := markers.get("for-torch")) != torch.__version__:
        return f"it was built for torch {version}, and this is torch {torch.__version__}"
    return None if markers.get("from-sources") == source_digest() else "it was built from different sources"


# --- compiler, sources and flags ------------------------------------------------------------------------------------


def sources(cuda: bool) -> list[Path]:
    """Return the sources of the extension, with or without the CUDA part."""
    found = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    if cuda:
        found += [*CSRC.glob("cuda/**/*.cpp"), *CSRC.glob("cuda/**/*.cu")]
    return sorted(found)


def source_digest() -> str:
    """Return a hash of all sources and headers in csrc/."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("**/*")):
        if path.is_file() and path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(path.relative_to(CSRC).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_home() -> Path | None:
    """Return the folder of a CUDA toolkit that contains nvcc and its headers, or None. It needs no GPU."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).parents[1]))
    for folder in map(Path, [*filter(None, candidates), "/usr/local/cuda"]):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    return None


def cuda_unavailable_reason() -> str | None:
    """Return why the CUDA part cannot be built, or None if it can."""
    import torch

    if os.environ.get("SRPKD_BUILD_CUDA") == "0":
        return "SRPKD_BUILD_CUDA=0 disables the CUDA part"
    if not list(CSRC.glob("cuda/**/*.cu")):
        return "csrc/cuda contains no sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if (home := cuda_home()) is None:
        return "no CUDA toolkit found: set CUDA_HOME to its folder"
    nvcc = home / "bin" / "nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:  # such as a toolkit for another processor
        return f"{nvcc} does not run ({error.strerror}): set CUDA_HOME to a toolkit that runs here"
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = ".".join(release.groups()) if release else "of unknown version"
        needed = torch.version.cuda.split(".")[0]
        return (
            f"{home} is CUDA {found}, but torch is built for CUDA {torch.version.cuda}: set CUDA_HOME to a toolkit of "
            f"CUDA {needed}, or install torch for CUDA {found}"
        )
    try:
        listed = architectures()
    except ValueError as error:
        return str(error)
    if not listed:
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
        source = f"TORCH_CUDA_ARCH_LIST={chosen!r} names" if chosen else "the installed GPUs have"
        return f"{source} no compute capability of 8.0 or higher, which the kernels need"
    return None


def nvcc_problem() -> str | None:
    """Return why nvcc cannot compile on this system and what to do, or None if it can or there is no nvcc.

    A CUDA toolkit rejects newer compilers, and its headers can contradict those of a newer C library.
    """
    home = cuda_home()
    if home is None or (error := _nvcc_error(home, compiler := _nvcc_compiler())) is None:
        return None
    return (
        f"{home / 'bin' / 'nvcc'} cannot compile with {compiler or 'the default compiler'} on this system ({error}): "
        "set CC and CXX to older compilers, such as gcc-14 and g++-14, or CUDA_HOME to a newer toolkit"
    )


@functools.cache
def _nvcc_error(home: Path, compiler: str | None) -> str | None:
    """Return what nvcc reports about an empty file, or None if it compiles. This takes about a second."""
    options = ["-std=c++20"] + (["-ccbin", compiler] if compiler else [])
    with tempfile.TemporaryDirectory() as folder:
        command = [str(home / "bin" / "nvcc"), *options, "-x", "cu", "-c", os.devnull, "-o", f"{folder}/empty"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return None
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    error = next((line for line in lines if re.search("error|fatal", line)), lines[-1])
    return textwrap.shorten(re.sub(".*error:( #error)?( --)? ", "", error), 110, placeholder=" ...")


def _nvcc_compiler() -> str | None:
    """Return the C++ compiler for nvcc, or None for its default. torch.utils.cpp_extension passes CC to it."""
    return os.environ.get("CC") or os.environ.get("NVCC_CCBIN") or os.environ.get("CXX") or None


def architectures() -> str:
    """Return the GPU architectures to build for, in the format of TORCH_CUDA_ARCH_LIST.

    These are the requested ones that the kernels and nvcc support. PTX for 8.0, which the driver compiles for any newer
    GPU, replaces those that are too new for nvcc.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST contains something else than architectures.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    listed = chosen if chosen and chosen != "native" else ";".join(installed_architectures()) or DEFAULT_ARCHITECTURES
    found, needs_ptx = [], False
    for word in re.split(r"[;\s]+", listed.strip("; ")):
        for name in NAMED_ARCHITECTURES.get(word.removesuffix("+PTX"), word).split(";"):
            if (match := ARCHITECTURE.fullmatch(name)) is None:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST={chosen!r}: expected architectures separated by ';', such as 8.6, 9.0a or "
                    f"8.0+PTX, received {name!r}"
                )
            version, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4] or ""
            if version < OLDEST_ARCHITECTURE:
                continue
            if (known := _nvcc_architectures(cuda_home())) and "{}{}".format(*version) not in known:
                needs_ptx = True
            elif version == (9, 0):
                # wgmma, the instructions of Hopper's tensor cores, exist only in 9.0a, which runs wherever 9.0 does.
                # Its PTX would run nowhere else
                found.append("9.0a")
                needs_ptx = needs_ptx or bool(ptx)
            else:
                found.append("{}.{}".format(*version) + suffix + ptx)
    if needs_ptx and not any(name.endswith("+PTX") for name in found):
        found = ["8.0+PTX", *(name for name in found if name != "8.0")]
    return ";".join(dict.fromkeys(found))


def installed_architectures() -> list[str]:
    """Return the architectures of the installed GPUs."""
    import torch

    if torch.version.hip or not torch.cuda.is_available():  # with a driver that is too old, the second call would raise
        return []
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ["{}.{}".format(*capability) for capability in sorted(capabilities)]


@functools.cache
def _nvcc_architectures(home: Path | None) -> frozenset[str]:
    """Return the architectures that nvcc compiles for, such as "86"; nothing if it does not tell."""
    if home is None:
        return frozenset()
    done = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True)
    return frozenset(re.findall(r"compute_(\d+)", done.stdout))


@functools.lru_cache(maxsize=64)
def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether an extension that is built for some architectures contains code that a GPU can run.

    Machine code runs on GPUs of the same major version and at least the same minor version, except that code for other
    GPUs does not run on 8.7, a Tegra. Code with the suffix "a" runs on its own version only. The driver compiles PTX
    without a suffix for any newer GPU.
    """
    for match in map(ARCHITECTURE.fullmatch, architectures.split(";")):
        if match is None:
            continue
        version = int(match[1]), int(match[2])
        same_family = version[0] == capability[0] and version <= capability and (8, 7) not in (version, capability)
        runs = version == capability or (same_family and match[3] != "a")
        if runs or (match[4] and match[3] == "" and version <= capability):
            return True
    return False


def jobs() -> str:
    """Return MAX_JOBS, or the number of compilers that cores and memory allow."""
    if chosen := os.environ.get("MAX_JOBS"):
        return chosen
    if sys.platform == "win32":  # it has no sysconf; nothing is built there, see unsupported_platform
        return str(available_cores())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(available_cores(), memory // BYTES_PER_JOB)))


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(cuda: bool) -> dict[str, str]:
    """Return the environment variables for torch.utils.cpp_extension."""
    # pip installs ninja beside this Python
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"MAX_JOBS": jobs(), "PATH": path}
    return settings | {"CUDA_HOME": str(cuda_home())} if cuda else settings


def flags(cuda: bool) -> list[str]:
    """Return the flags for the C++ compiler.

    Raises:
        BuildError: SRPKD_CXX_FLAGS has a quotation mark without a second one.
    """
    import torch

    macros = {"TORCH_VERSION": torch.__version__, "SOURCES": source_digest()}
    macros["CUDA_ARCHITECTURES"] = architectures() if cuda else ""
    defined = [f'-DSRPKD_{name}="{value}"' for name, value in macros.items()]
    further = os.environ.get("SRPKD_CXX_FLAGS", "")
    try:
        return [*CXX_FLAGS, *defined, *shlex.split(further)]
    except ValueError as error:
        raise BuildError(f"SRPKD_CXX_FLAGS={further!r}: expected flags as in a shell ({error})") from error


def nvcc_flags() -> list[str]:
    """Return the flags for nvcc.

    They name the architectures, so that torch.utils.cpp_extension does not: it refuses some that nvcc supports.
    """
    chosen = [*NVCC_FLAGS]
    if "CC" not in os.environ and (compiler := _nvcc_compiler()):
        chosen.append(f"-ccbin={compiler}")
    for match in filter(None, map(ARCHITECTURE.fullmatch, architectures().split(";"))):
        number = match[1] + match[2] + match[3]
        codes = [f"sm_{number}", f"compute_{number}"] if match[4] else [f"sm_{number}"]
        chosen += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return chosen


# --- building on first use ------------------------------------------------------------------------------------------


def unsupported_platform() -> str | None:
    """Return why the extension cannot be built on this operating system, or None if it can."""
    return "it can be built with GCC or clang on Linux or macOS only" if sys.platform == "win32" else None


def unavailable_reason() -> str | None:
    """Return why the extension cannot be built on this machine and what to do, or None if it can."""
    compiler = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    try:
        if setting() == "0":
            return "SRPKD_BUILD=0 disables the build"
    except ValueError as error:
        return str(error)
    if reason := unsupported_platform():
        return reason
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) found: install g++ or clang, or set CXX"
    if shutil.which("ninja", path=environment(cuda=False)["PATH"]) is None:
        return "ninja is not installed: pip install ninja"
    if not sources(cuda=False):
        return f"{CSRC} contains no sources: install srpkd again"
    if cuda_unavailable_reason() is None and (problem := nvcc_problem()):
        return f"{problem}; or set SRPKD_BUILD_CUDA=0 to build the CPU part alone"
    return None


def cached_library() -> Path:
    """Return the path of the extension that is built on first use, one for each torch, sources and flags.

    Raises:
        BuildError: the user has no home directory, and no variable names another folder; or as ``flags``.
    """
    import torch

    cuda = cuda_unavailable_reason() is None
    digest = hashlib.sha256(repr((sys.version, torch.__version__, flags(cuda), NVCC_FLAGS)).encode())
    folder = f"srpkd_{digest.hexdigest()[:16]}"
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root, folder, f"{NAME}.so")
    if (cache := user_cache()) is None:
        raise BuildError("this user has no home directory: set HOME, or TORCH_EXTENSIONS_DIR to a folder")
    return cache / "torch_extensions" / folder / f"{NAME}.so"


def user_cache() -> Path | None:
    """Return the folder for the user's caches, or None for a user without a home directory.

    Such a user is only a number, as in some containers.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def build() -> Path:
    """Build the extension on first use and return its path. Concurrent processes build it once.

    Raises:
        BuildError: the build failed, or the folder cannot be written to.
    """
    library = cached_library()
    try:
        return _build_once(library)
    except OSError as error:
        raise BuildError(
            f"the native backend cannot be built in {library.parent}: {error.strerror or error}; set "
            "TORCH_EXTENSIONS_DIR to a folder on a disk with room that you have permission to write to"
        ) from error


def _build_once(library: Path) -> Path:
    from filelock import FileLock  # which torch needs; the system releases its lock if the process dies

    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.parent / "lock"):
        if library.exists():  # another process built it while this one waited for the lock
            return library
        duration = "several minutes, with its GPU part" if cuda_unavailable_reason() is None else "about a minute"
        print(f"srpkd: building the native backend in {library.parent} (once, {duration})", file=sys.stderr)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = build_in(Path(scratch))
            with open(built, "rb+") as file:
                os.fsync(file.fileno())  # after a power failure it could be empty, and would not be built again
            os.replace(built, library)  # atomic: no process finds an incomplete file
        print(f"srpkd: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return library


def build_in(folder: Path) -> Path:
    """Compile, link and load the extension in another process, with its files in ``folder``; return its path.

    Raises:
        BuildError: the build failed.
    """
    cuda = cuda_unavailable_reason() is None
    arguments = {
        "name": NAME,
        "sources": [str(source) for source in sources(cuda)],
        "extra_cflags": [shlex.quote(flag) for flag in flags(cuda)],
        "extra_cuda_cflags": nvcc_flags() if cuda else [],
        "build_directory": str(folder),
        "with_cuda": cuda,
        "verbose": True,
    }
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(arguments)],
        cwd=folder,  # -c puts it first into sys.path: it has no files that hide modules
        env=os.environ | environment(cuda),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise BuildError(f"building the native backend failed:\n{result.stdout[-4000:]}")
    return folder / f"{NAME}.so"
