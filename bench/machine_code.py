"""The machine code of the extension, with the source lines that each instruction comes from.

nvcc writes these lines into the extension (-lineinfo), with the calls that were inlined. nvdisasm prints them: it is
part of the CUDA toolkit and of Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from srpkd.kernels import build

FUNCTION = re.compile(r"\.text\.(\S+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(\S.*)")
LINE = re.compile(r'\s*//## File "(.+?)", line (\d+)( inlined at)?')
PREDICATE = re.compile(r"@!?U?P\w+\s+")


class Frame(NamedTuple):
    """A line of the sources."""

    file: str
    line: int


class Instruction(NamedTuple):
    """An instruction.

    Attributes:
        opcode: with its modifiers, without predicate and operands.
        frames: the line of the kernel, that of the inlined function which it calls there, and so on.
    """

    opcode: str
    frames: tuple[Frame, ...]


def tool(name: str) -> str | None:
    """Return the path of an executable of the CUDA toolkit, or of Triton's wheel, which includes some of them."""
    folders = [home / "bin"] if (home := build.cuda_home()) else []
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = (str(folder / name) for folder in folders if (folder / name).exists())
    return shutil.which(name) or next(found, None)


def opcode(text: str) -> str:
    """Return the opcode of an instruction as nvdisasm and Nsight Compute print it."""
    return PREDICATE.sub("", text.strip()).split()[0].rstrip(";")


def functions(listing: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, list[Instruction]]:
    """Return the instructions of the wanted functions in the output of ``nvdisasm -c -gi``, by mangled name."""
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] | None = None
    frames: list[Frame] = []
    outermost = True  # the comments start a new chain of calls, innermost first
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            own = found.setdefault(match[1], []) if wanted(match[1]) else None
            frames = []
        elif own is None:
            continue
        elif match := LINE.match(line):
            if outermost:
                frames = []
            frames.append(Frame(match[1], int(match[2])))
            outermost = match[3] is None
        elif match := INSTRUCTION.match(line):
            own.append(Instruction(opcode(match[1]), tuple(reversed(frames))))
    return found


def disassemble(library: Path, names: Iterable[Collection[str]]) -> list[list[Instruction]]:
    """Return the functions of an extension whose mangled names may contain one of these sets of identifiers.

    Raises:
        OSError: a tool is missing or fails.
    """
    cuobjdump, nvdisasm = (tool(name) or "" for name in ("cuobjdump", "nvdisasm"))
    if not (cuobjdump and nvdisasm):
        raise OSError("source lines need cuobjdump and nvdisasm: install the CUDA toolkit or Triton")
    words = [list(name) for name in names]

    def wanted(text: str) -> bool:
        return any(all(word in text for word in name) for name in words)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        output_of([cuobjdump, "--extract-elf", "all", str(library.resolve())], folder)
        binaries = [path for path in sorted(Path(folder).glob("*.cubin")) if wanted(path.read_bytes().decode("latin1"))]
        listings = pool.map(lambda path: output_of([nvdisasm, "-c", "-gi", str(path)], folder), binaries)
        return [one for listing in listings for one in functions(listing, wanted).values()]


def output_of(command: list[str], folder: str) -> str:
    """Run a tool and return what it prints."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
