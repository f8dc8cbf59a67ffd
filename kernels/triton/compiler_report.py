"""What the compiler makes of the Triton kernels, without a GPU: ``python -m srpkd.kernels.triton.compiler_report``.

Compiles ahead of time every configuration that backend ``triton`` can choose, for one GPU of each kind, and prints
registers per thread, bytes spilled per thread, shared memory per program, and the matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from ..formulas import DISTANCES, NORMALIZATIONS, Relation
from . import scales_and_gradient as algebra
from . import tiles as backend
from .configurations import TABLE, architecture, configuration
from .primitives import triton

CAPABILITIES = ((8, 0), (8, 6), (9, 0), (10, 0))
SHARED_LIMIT = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448, (10, 0): 232448}  # bytes per program
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16"}  # of features; float32 otherwise
ALGEBRA = ("moment", "scale", "weighted_moment", "gradient")
SCALARS = {"delta": "fp32", "eps": "fp32", "weight": "fp32"}  # integers otherwise


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched on features (B, N, C_s), (B, N, C_t).

    Attributes:
        kernel: "relation", the tiles, or one of ALGEBRA.
        numbers: "bfloat16", "float16", or float32 by its matmul precision: "medium", "high", "highest".
        channels: (C_s, C_t).
        layout: "nchw": pixels adjacent in memory, "nlc": channels, or "odd": neither, nothing a multiple of 16 and
            one of everything that can be: launches compile in integers of 1, and what multiples of 16 there are.
    """

    kernel: str
    capability: tuple[int, int]
    numbers: str
    channels: tuple[int, int] = (64, 256)
    relation: Relation = field(default_factory=Relation)
    need_grad: bool = True
    layout: str = "nchw"

    def __str__(self) -> str:
        shape = "{}/{}".format(*self.channels)
        what = f"{self.relation.normalize} {self.relation.distance}" + ("" if self.need_grad else " forward only")
        return f"{self.kernel:<15} {self.numbers:<8} {shape:>9} {self.layout} {what}"


@dataclass(frozen=True)
class Report:
    """What the compiler says of a case: per thread, and for shared memory per program, in bytes."""

    registers: int
    spilled: int
    shared: int
    instructions: Counter


def arguments(case: Case) -> tuple[dict, dict]:
    """What is known of a case's arguments when its kernel is compiled, and the compile options."""
    relation = case.relation
    if case.kernel == "relation":
        chosen = configuration(case.capability, case.numbers, *case.channels)
        known = backend.constants(relation, case.need_grad, case.channels, case.numbers, chosen)
        if not case.need_grad:
            known |= {"U_ptr": None, "h_ptr": None}
        if relation.normalize == "none":
            known |= {"alpha_s_ptr": None, "alpha_t_ptr": None, "h_ptr": None}
        return known, backend.compile_options(chosen)
    known = {"BLOCK_M": algebra.PIXELS, "BLOCK_N": algebra.DEPTH, "BLOCK_K": algebra.DEPTH}
    known |= {"BLOCK_C": algebra.CHANNELS, "BLOCK_P": algebra.PARTIALS, "NORMALIZE": relation.normalize}
    return known | {"TERMS": {"bfloat16": 1, "float16": 2}.get(case.numbers, 3)}, algebra.OPTIONS


def compile_case(case: Case) -> Report:
    """Compile ahead of time, as a launch on contiguous, aligned tensors would."""
    kernel = getattr(backend if case.kernel == "relation" else algebra, f"{case.kernel}_kernel")
    known, options = arguments(case)
    ones = {"nchw": "stride_[stug]n", "nlc": "stride_[stug]c", "odd": r"pixels|splits|\w+_splits|partials"}[case.layout]
    known |= {name: 1 for name in kernel.arg_names if re.fullmatch(ones, name)}
    known = {name: value for name, value in known.items() if name in kernel.arg_names}
    features = POINTERS.get(case.numbers, "*fp32")
    types = {"student_ptr": features, "teacher_ptr": features}
    types["gradient_ptr"] = "*bf16" if case.numbers == "bfloat16" else "*fp32"
    types |= dict.fromkeys(known, "constexpr")
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else SCALARS.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = re.compile(r"\w+_ptr|stride_\w+|pixels|channels\w*|split_(columns|pixels)")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if case.layout != "odd" and name not in known and aligned.fullmatch(name)
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs=known, attrs=attributes),
        target=triton.backends.compiler.GPUTarget("cuda", 10 * case.capability[0] + case.capability[1], 32),
        options=options,
    )
    usage = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    instructions = Counter({name: ptx.count(name) for name in MATRIX_INSTRUCTIONS if name in ptx})
    return Report(usage["REG"], usage["STACK"], compiled.metadata.shared, instructions)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What ``cuobjdump -res-usage`` says of a binary: REG, STACK, ...; on the stack these kernels have only spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", output)}


def cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Every row of the backend's table with the most channels it has room for, and the algebra around the tiles."""
    beyond = 320  # more channels than any row holds at once
    for (name, numbers), rows in TABLE.items():
        for most_s, most_t, *_ in rows if name == architecture(capability) else ():
            yield Case("relation", capability, numbers, (min(most_s, beyond), min(most_t, beyond)))
    for numbers in ("bfloat16", "highest"):
        for kernel in ALGEBRA:
            yield Case(kernel, capability, numbers)


def variants(capability: tuple[int, int]) -> Iterator[Case]:
    """What else there is: every relation, the forward pass alone, other layouts, fewer channels, float16's algebra."""
    for normalize in NORMALIZATIONS:
        for distance in DISTANCES:
            yield Case("relation", capability, "bfloat16", relation=Relation(normalize, distance))
        yield Case("relation", capability, "bfloat16", relation=Relation(normalize), need_grad=False)
        yield Case("gradient", capability, "bfloat16", relation=Relation(normalize))
    yield Case("scale", capability, "bfloat16", relation=Relation("cosine"))
    for numbers in ("bfloat16", "highest"):
        yield Case("relation", capability, numbers, (48, 100))
        for layout in ("nlc", "odd"):
            yield Case("relation", capability, numbers, layout=layout)
    for kernel in ALGEBRA:
        yield Case(kernel, capability, "float16")
        yield Case(kernel, capability, "bfloat16", layout="odd")


def compiler_pool(processes: int | None = None) -> ProcessPoolExecutor:
    """Processes to compile in. Spawned, for the parent may have threads or a GPU, which do not survive a fork."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m srpkd.kernels.triton.compiler_report", description=__doc__)
    parser.add_argument("--sm", type=int, action="append", choices=[10 * a + b for a, b in CAPABILITIES])
    parser.add_argument("--variants", action="store_true", help="more relations, layouts and numbers of channels")
    parser.add_argument("--processes", type=int, help="how many to compile at a time (default: one per core)")
    options = parser.parse_args()
    chosen = []
    for capability in CAPABILITIES:
        if options.sm is None or 10 * capability[0] + capability[1] in options.sm:
            chosen += cases(capability)
            chosen += variants(capability) if options.variants else ()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'GPU':<6} {'kernel, numbers, channels, layout, relation':<56} registers spilled shared  instructions")
    with compiler_pool(options.processes) as pool:
        for case, report in zip(chosen, pool.map(compile_case, chosen)):
            matrix = ", ".join(f"{name} {count}" for name, count in report.instructions.items())
            name = "sm_{}{}".format(*case.capability)
            numbers = f"{report.registers:>9} {report.spilled:>7} {report.shared:>6}"
            print(f"{name:<6} {case!s:<56} {numbers}  {matrix}", flush=True)


if __name__ == "__main__":
    main()
