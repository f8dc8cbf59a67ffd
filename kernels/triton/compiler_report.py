"""A report on the compiled Triton kernels, without a GPU: ``python -m srpkd.kernels.triton.compiler_report``.

Compiles every configuration that backend ``triton`` can choose ahead of time, for one GPU of each architecture, and
prints registers per thread, spilled bytes per thread, shared memory per program, and the matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from ..formulas import DISTANCES, NORMALIZATIONS, Relation, gradient_dtype
from . import relation_plan
from .backward import backward_kernel, backward_plan
from .closed_form import closed_form_plan
from .closed_form.gradient import closed_form_gradient_kernel
from .closed_form.moments import moments_kernel
from .closed_form.row import gains_kernel, row_scales_kernel
from .closed_form.sums import finish_kernel
from .configurations import TABLE, architecture, configuration
from .gradient import gradient_kernel, loss_kernel
from .moments import moment_kernel, terms_kernel, weighted_moment_kernel
from .plans import Array, Launch, Plan
from .primitives import triton
from .scales import scale_kernel
from .tiles import relation_kernel

KERNELS = {
    "relation": relation_kernel,
    "moment": moment_kernel,
    "terms": terms_kernel,
    "scale": scale_kernel,
    "weighted_moment": weighted_moment_kernel,
    "gradient": gradient_kernel,
    "loss": loss_kernel,
    "backward": backward_kernel,
    "closed_gains": gains_kernel,
    "closed_moments": moments_kernel,
    "closed_sums": finish_kernel,
    "closed_scales": row_scales_kernel,
    "closed_gradient": closed_form_gradient_kernel,
}

CAPABILITIES = ((8, 0), (8, 6), (9, 0), (10, 0))
SHARED_LIMIT = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448, (10, 0): 232448}  # bytes per program
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
}  # fmt: skip
PRECISIONS = ("highest", "high", "medium")  # the number formats of float32 features
BATCH, PIXELS = 16, 4096  # B and N
CLOSED_FORM = tuple(name for name in KERNELS if name.startswith("closed_"))
ROW_ONLY = ("closed_gains", "closed_scales")  # kernels of CLOSED_FORM
ALGEBRA = tuple(name for name in KERNELS if name != "relation" and name not in CLOSED_FORM)
ROW_L1, ROW_L2, COSINE_L2 = Relation("row", "l1"), Relation("row", "l2"), Relation("cosine", "l2")


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched on features (B, N, C_s), (B, N, C_t).

    Attributes:
        kernel: "relation", the tile kernel, or one of ALGEBRA or CLOSED_FORM.
        capability: compute capability of the GPU.
        numbers: "bfloat16", "float16", or the matmul precision of float32: "medium", "high", "highest".
        channels: (C_s, C_t).
        layout: "nchw": pixels are adjacent in memory; "nlc": channels are adjacent; "odd": neither are, no argument is
            a multiple of 16, and every count that can be 1 is 1. Triton specialises kernels on arguments that are 1 or
            multiples of 16.
    """

    kernel: str
    capability: tuple[int, int]
    numbers: str
    channels: tuple[int, int] = (64, 256)
    relation: Relation = ROW_L1
    need_grad: bool = True
    layout: str = "nchw"

    def __str__(self) -> str:
        shape = "{}/{}".format(*self.channels)
        relation = f"{self.relation.normalize} {self.relation.distance}"
        relation += " rectify" * self.relation.rectify + " detach_norms" * self.relation.detach_norms
        relation += "" if self.need_grad else " forward only"
        return f"{self.kernel:<15} {self.numbers:<8} {shape:>9} {self.layout} {relation}"


@dataclass(frozen=True)
class Report:
    """The resources of a compiled case.

    Attributes:
        registers: per thread.
        spilled: bytes per thread.
        shared: bytes of shared memory per program.
        instructions: number of matrix instructions in the PTX, by name.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]


def launch_of(case: Case) -> Launch:
    """Return the launch of a case's kernel; for "row", of the two of ``closed_form`` the second."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case.numbers, torch.float32)
    student, teacher = (
        torch.empty(BATCH, channels, PIXELS, dtype=dtype, device="meta").mT for channels in case.channels
    )
    loss, gradient = student.new_empty(BATCH, dtype=torch.float32), None
    if case.need_grad and case.kernel != "loss":
        gradient = torch.empty_like(student, dtype=gradient_dtype(dtype))
    plan: Plan | None
    if case.kernel == "backward" and gradient is not None:
        plan = backward_plan(gradient, loss, student, 1.0)
    elif case.kernel in CLOSED_FORM:
        plan = closed_form_plan(student, teacher, loss, gradient, case.relation)
    else:
        chosen = configuration(case.capability, case.numbers, *case.channels)
        plan = relation_plan(student, teacher, loss, gradient, case.relation, chosen, "none")
    assert plan is not None, "the images of a gradient are adjacent"
    return [launch for launch in plan.launches if launch.kernel is KERNELS[case.kernel]][-1]


def type_of(argument: Array | int | float | None) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(argument, Array):
        return f"*{TYPES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def compile_case(case: Case) -> Report:
    """Compile a case ahead of time, as a launch on contiguous, aligned tensors compiles it."""
    precision = torch.get_float32_matmul_precision()
    if case.numbers in PRECISIONS:
        torch.set_float32_matmul_precision(case.numbers)
    try:
        launch = launch_of(case)
    finally:
        torch.set_float32_matmul_precision(precision)
    kernel, values = launch.kernel, dict(zip(launch.kernel.arg_names, launch.arguments))
    known = {name: value for name, value in launch.constants.items() if name in kernel.arg_names}
    options = {name: value for name, value in launch.constants.items() if name not in known}
    known |= {name: None for name, value in values.items() if value is None}
    ones = {"nchw": "stride_[stug]n", "nlc": "stride_[stug]c", "odd": "pixels|column_splits"}[case.layout]
    known |= {name: 1 for name in values if re.fullmatch(ones, name)}
    signature = {name: "constexpr" if name in known else type_of(values[name]) for name in kernel.arg_names}
    aligned = re.compile(r"\w+_ptr|stride_\w+|pixels|channels\w*|split_(columns|pixels)|image_elements")
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
    """Return the output of ``cuobjdump -res-usage``: REG, STACK, ... The stack of these kernels holds only spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", output)}


def cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Yield every row of the TABLE with the maximum number of channels that it fits, and the kernels of ALGEBRA."""
    looped = 320  # more channels than fit into one block of any row
    for (name, numbers), rows in TABLE.items():
        for most_s, most_t, *_ in rows if name == architecture(capability) else ():
            yield Case("relation", capability, numbers, (min(most_s, looped), min(most_t, looped)))
    for numbers in ("bfloat16", "highest"):
        for kernel in ALGEBRA:
            yield Case(kernel, capability, numbers)
    for numbers in ("bfloat16", "float16", "highest"):
        for kernel in CLOSED_FORM:
            for channels in ((64, 256), (128, 128)):
                if kernel not in ("closed_sums", "closed_gains") or numbers == "bfloat16":  # the others are equal
                    for relation in (ROW_L2,) if kernel in ROW_ONLY else (ROW_L2, COSINE_L2):
                        yield Case(kernel, capability, numbers, channels, relation)


def variants(capability: tuple[int, int]) -> Iterator[Case]:
    """Yield further cases: every relation, forward only, other layouts, fewer channels, ALGEBRA in float16."""
    for normalize in NORMALIZATIONS:
        for distance in DISTANCES:
            yield Case("relation", capability, "bfloat16", relation=Relation(normalize, distance))
        yield Case("relation", capability, "bfloat16", relation=Relation(normalize, "l1"), need_grad=False)
        for numbers in ("bfloat16", "highest"):
            relation = Relation(normalize, "l2", rectify=True)
            yield Case("relation", capability, numbers, relation=relation)
            yield Case("relation", capability, numbers, relation=replace(relation, detach_norms=True))
        yield Case("gradient", capability, "bfloat16", relation=Relation(normalize, "l1"))
    yield Case("scale", capability, "bfloat16", relation=Relation("cosine", "l1"))
    for numbers in ("bfloat16", "highest"):
        yield Case("relation", capability, numbers, (48, 100))
        for layout in ("nlc", "odd"):
            yield Case("relation", capability, numbers, layout=layout)
    for kernel in ALGEBRA:
        yield Case(kernel, capability, "float16")
        yield Case(kernel, capability, "bfloat16", layout="odd")
    for kernel in CLOSED_FORM:
        if kernel not in ROW_ONLY:
            yield Case(kernel, capability, "bfloat16", relation=Relation("none", "l2"))
            yield Case(kernel, capability, "bfloat16", relation=COSINE_L2, layout="nlc")
            yield Case(kernel, capability, "bfloat16", relation=COSINE_L2, layout="odd")
        yield Case(kernel, capability, "bfloat16", relation=ROW_L2, layout="odd")
    yield Case("closed_gradient", capability, "bfloat16", relation=replace(COSINE_L2, detach_norms=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m srpkd.kernels.triton.compiler_report", description=__doc__)
    parser.add_argument("--sm", type=int, action="append", choices=[10 * a + b for a, b in CAPABILITIES])
    parser.add_argument("--variants", action="store_true", help="add further relations, layouts and channel counts")
    parser.add_argument("--processes", type=int, help="number of compiler processes (default: one per core)")
    options = parser.parse_args()
    chosen: list[Case] = []
    for capability in CAPABILITIES:
        if options.sm is None or 10 * capability[0] + capability[1] in options.sm:
            chosen += cases(capability)
            chosen += variants(capability) if options.variants else ()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'GPU':<6} {'kernel, numbers, channels, layout, relation':<56} registers spilled shared  instructions")
    # spawned, because threads and CUDA contexts do not survive a fork
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for case, report in zip(chosen, pool.map(compile_case, chosen)):
            matrix = ", ".join(f"{name} {count}" for name, count in report.instructions.items())
            name = "sm_{}{}".format(*case.capability)
            numbers = f"{report.registers:>9} {report.spilled:>7} {report.shared:>6}"
            print(f"{name:<6} {case!s:<56} {numbers}  {matrix}", flush=True)


if __name__ == "__main__":
    main()
