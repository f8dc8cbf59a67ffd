"""The machine code of CUDA kernels: which registers they have, and which instructions."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.machine_code import INSTRUCTION, opcode, output_of, tool
from srpkd.kernels import build, native


class Kernel(NamedTuple):
    """A kernel for one architecture.

    Attributes:
        symbol: the mangled name.
        architecture: such as "sm_90a".
        registers: those of a thread when the kernel starts.
        stack: bytes of a thread in local memory, where registers spill to.
        words: the opcodes, with modifiers.
        listing: the instructions and labels, as nvdisasm prints them.
    """

    symbol: str
    architecture: str
    registers: int
    stack: int
    words: tuple[str, ...]
    listing: str


def extension_with_cuda() -> Path:
    """Return the path of the installed extension. Skip the test if the machine cannot build the CUDA part."""
    module, reason = native.load_existing()
    if module is not None and module.cuda_architectures:
        return Path(module.__file__)
    if (unavailable := build.cuda_unavailable_reason() or build.nvcc_problem()) is not None:
        pytest.skip(unavailable)
    pytest.fail(f"the extension is not built with CUDA ({reason or 'run make install'}); SRPKD_BUILD_CUDA=0 skips this")


@functools.lru_cache(maxsize=8)  # the tests of one source follow each other; disassembling takes seconds
def kernels_in(binary: Path, source: str) -> tuple[Kernel, ...]:
    """Return the kernels that a binary contains from ``source``, the name of a file without its suffix."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        output_of([cuobjdump, "--extract-elf", f"{source}.", str(binary.resolve())], folder)
        for path in sorted(Path(folder).glob("*.cubin")):
            architecture = path.name.split(".")[-2]
            usage = output_of([cuobjdump, "-res-usage", str(path)], folder)
            listing = output_of([nvdisasm, "-c", str(path)], folder)
            for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
                text = listing.partition(f"\n.text.{symbol}:")[2].partition("\n.text.")[0]
                code = INSTRUCTION.findall(text)
                assert code, symbol
                words = tuple(map(opcode, code))
                found.append(Kernel(symbol, architecture, int(registers), int(stack), words, text))
    return tuple(found)
