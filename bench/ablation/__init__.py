"""Times of the wgmma tiles (csrc/cuda/sm90) with one part taken out at a time, or with another structure. For an H100.

    python -m bench ablation                              16 images and 1 image of 4,096 pixels
    python -m bench ablation --build DIR                  compile the variants, which needs nvcc and no GPU
    python -m bench ablation --use DIR --out FILE.csv     measure those, and also write the rows to a file

Features are bfloat16 with 64/256 channels; the loss is row and l1 with its gradient, without the kernels before and
after the tiles. Each variant is a small library that launches its kernel by the product's plan. Times are replays of a
CUDA graph; clocks are those of a thread block for one of its tiles, by the clock rate measured after the replays.

The results of a variant without a part are wrong: the difference of its time to "as is" is what the part costs if
nothing else changes, and is not additive. The results of a variant with another structure equal those of "as is" bit by
bit; the column "results" says whether they do.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpkd.arguments import positive
from srpkd.checking.cases import Case, features
from srpkd.checking.kernels import KERNELS
from srpkd.files import expand_user
from srpkd.kernels import build
from srpkd.kernels.formulas import scales_of

from .. import machine, measure, results
from .variants import VARIANTS, Patch, apply, slug

LIBRARY = Path(__file__).with_name("library.cu")
CHANNELS = (64, 256)
TOLERANCE = 1e-4  # relative, of the loss of "as is"
SPIN = 300_000  # nanoseconds
KEY = ("variant", "batch", "pixels", "device")


class CaseOfLibrary(ctypes.Structure):
    """struct Case of library.cu."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("images", "pixels", "student_channels", "teacher_channels")),
        ("multiprocessors", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "alpha_student", "alpha_teacher")),
    )


class Description(ctypes.Structure):
    """struct Description of library.cu."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("workspace_bytes", "losses_at", "losses", "results_bytes", "grid", "tiles")
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folders = parser.add_mutually_exclusive_group()
    folders.add_argument("--build", type=expand_user, metavar="DIR", help="compile the variants into DIR, and stop")
    folders.add_argument(
        "--use", type=expand_user, metavar="DIR", help="measure the variants in DIR; compile missing ones"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
        help=f"from {', '.join(VARIANTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[16, 1], metavar="B", help="images (default: 16 1)"
    )
    parser.add_argument("--pixels", type=positive, default=4096, metavar="N", help="of an image (default: %(default)s)")
    parser.add_argument("--out", type=expand_user, metavar="CSV", help="file of results")


def run(options: argparse.Namespace) -> None:
    """Compile the variants, measure them, and print a line for each.

    Raises:
        ValueError: there is no GPU of compute capability 9.0, a library cannot be compiled, or results are wrong.
    """
    if options.build:
        for library in compiled(options.build, options.variants).values():
            print(library)
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ValueError("the tiles use wgmma: expected a GPU of compute capability 9.0; --build needs none")
    with tempfile.TemporaryDirectory() as scratch:
        libraries = compiled(options.use or Path(scratch), options.variants)
        for batch in options.batch:
            case = Case(options.pixels, CHANNELS, batch, "bfloat16", device="cuda", threads=torch.get_num_threads())
            print(f"{case.describe().partition(',')[0]}, tiles alone\n{HEADER}", flush=True)
            base: float | None = None
            expected: Tensor | None = None
            for name, library in libraries.items():
                variation = Variation(library, case)
                row = measured(variation, check=name == "as is")
                if name == "as is":
                    base, expected = row["us"], variation.results()
                row |= {
                    "us_to_as_is": None if base is None else row["us"] - base,
                    "results": compared(variation, expected) if VARIANTS[name].equal else "",
                }
                row = {"variant": name, "batch": batch, "pixels": options.pixels} | row
                print(as_text(row), flush=True)  # at once, because a kernel that hangs loses what follows
                if options.out:
                    common = {"device": machine.device_name("cuda")}
                    results.upsert(options.out, [row | common | machine.versions()], KEY)


# --- compiling --------------------------------------------------------------------------------------------------------


def compiled(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the library of each variant in a folder. Those that are missing, or of other sources, are compiled.

    Raises:
        ValueError: nvcc is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(build.jobs())) as pool:
        return dict(zip(names, pool.map(lambda name: compile_variant(folder, name), names)))


def compile_variant(folder: Path, name: str) -> Path:
    """Compile one variant, unless the folder has it."""
    patches = VARIANTS[name].patches
    digest = hashlib.sha256(
        repr((build.source_digest(), LIBRARY.read_text(encoding="utf-8"), patches, build.NVCC_FLAGS)).encode()
    )
    library = folder.resolve() / f"{slug(name)}-{digest.hexdigest()[:12]}.so"
    if library.exists():
        return library
    if (home := build.cuda_home()) is None:
        raise ValueError(f"{library} is not built, and no CUDA toolkit is found: set CUDA_HOME to its folder")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch) / library.name
        command = [str(home / "bin" / "nvcc"), "-std=c++17", *build.NVCC_FLAGS, "-gencode=arch=compute_90a,code=sm_90a"]
        compile_library([*command, "-shared", "-Xcompiler", "-fPIC"], patches, Path(scratch), result)
        os.replace(result, library)
    return library


def compile_library(command: Sequence[str], patches: tuple[Patch, ...], scratch: Path, result: Path) -> None:
    """Compile the library with a patched copy of the sources.

    Raises:
        ValueError: the compiler fails, or a patch does not fit the sources.
    """
    sources = scratch / "csrc"
    shutil.copytree(build.CSRC, sources)
    apply(patches, sources / "cuda")
    words = [*command, f"-I{sources / 'cuda'}", str(LIBRARY), "-o", str(result)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)}: {done.stdout[-3000:]}")


# --- measuring --------------------------------------------------------------------------------------------------------


class Variation:
    """The kernel of a library on the features of a case."""

    def __init__(self, library: Path, case: Case, multiprocessors: int | None = None) -> None:
        self.library = ctypes.CDLL(str(library))
        self.inputs = inputs_of(case)
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(case.device).multi_processor_count
        self.case = CaseOfLibrary(
            case.batch, case.pixels, *case.channels, multiprocessors, *(tensor.data_ptr() for tensor in self.inputs)
        )
        self.description = Description()
        self.library.describe(ctypes.byref(self.case), ctypes.byref(self.description))
        # aligned as TMA needs it, also on a CPU; not the results of an earlier variant, which this one may not write
        memory = torch.full((self.description.workspace_bytes + 256,), 255, dtype=torch.uint8, device=case.device)
        self.memory = memory[-memory.data_ptr() % 256 :][: self.description.workspace_bytes]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library that returns an error message.

        Raises:
            RuntimeError: the message is not empty.
        """
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        if message := function(*arguments):
            raise RuntimeError(message.decode())

    def launch(self, stream: int = 0) -> None:
        """Enqueue the kernel; raises as ``call``."""
        memory = ctypes.c_void_p(self.memory.data_ptr())
        self.call("launch", ctypes.byref(self.case), memory, ctypes.c_void_p(stream))

    def loss(self) -> float:
        """Return the mean loss of the last call."""
        at, count = self.description.losses_at, self.description.losses
        losses = self.memory[at : at + 8 * count].view(torch.float64)
        return float(losses.sum()) / (self.case.images * self.case.pixels**2)

    def results(self) -> Tensor:
        """Return a copy of the bytes of all results of the last call: loss, h and U."""
        at = self.description.losses_at
        return self.memory[at : at + self.description.results_bytes].clone()

    def hertz(self, stream: int) -> float:
        """Return the clock rate of the multiprocessors."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.memory.device)
        self.call("clocks", ctypes.c_int64(SPIN), ctypes.c_void_p(counts.data_ptr()), ctypes.c_void_p(stream))
        clocks, nanoseconds = counts.tolist()
        return 1e9 * clocks / nanoseconds


@cache
def inputs_of(case: Case) -> list[Tensor]:
    """Return features and scales, those of the student first."""
    student, teacher = features(case)
    scales = scales_of(student, teacher, case.relation, torch.float32)
    return [student, teacher, *(alpha.contiguous() for alpha in (scales.student, scales.teacher) if alpha is not None)]


def compared(variation: Variation, expected: Tensor | None) -> str:
    """Return "equal" or "DIFFER": whether the results of the last call are these bytes. "" if they are unknown."""
    if expected is None:
        return ""
    return "equal" if torch.equal(variation.results(), expected) else "DIFFER"


def measured(variation: Variation, check: bool) -> dict[str, Any]:
    """Return the columns of a variant.

    Args:
        check: compare the loss with that of PyTorch.

    Raises:
        ValueError: the loss is wrong, or the launch cannot be captured by a CUDA graph.
    """
    variation.memory.zero_()  # results do not fill their places
    variation.launch(stream())
    torch.cuda.synchronize()
    if check:
        student, teacher = variation.inputs[:2]
        expected, found = float(KERNELS["blocked"].make(Case())(student.float(), teacher.float())), variation.loss()
        if not abs(found - expected) <= TOLERANCE * expected:
            raise ValueError(f'the loss of "as is" is {found:g}, expected {expected:g}')
    seconds = measure.gpu_seconds(lambda: variation.launch(stream()), "cuda")
    if seconds is None:
        raise ValueError("a CUDA graph cannot capture the launch")
    hertz, described = variation.hertz(stream()), variation.description
    clocks = seconds * hertz * described.grid / described.tiles
    return {"us": 1e6 * seconds, "clocks_per_tile": clocks, "ghz": hertz / 1e9}


def stream() -> int:
    """Return the handle of the current stream, which may be captured."""
    return torch.cuda.current_stream().cuda_stream


HEADER = f"{'variant':<22}{'us':>8}{'us to as is':>13}{'clocks/tile':>13}{'GHz':>6}{'results':>9}  meaning"


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    difference = "" if row["us_to_as_is"] is None else f"{row['us_to_as_is']:+.1f}"
    meaning = VARIANTS[row["variant"]].meaning
    numbers = f"{row['us']:8.1f}{difference:>13}{row['clocks_per_tile']:13,.0f}{row['ghz']:6.2f}{row['results']:>9}"
    return f"{row['variant']:<22}{numbers}  {meaning}"
