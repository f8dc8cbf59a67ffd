"""Plans: the launches of a call, prepared once for every kind of arguments and repeated with little work on the host.

What a call launches depends only on device, dtype, shapes, strides and options, not on values: grids, strides, split
numbers, and the place of every array in one block of scratch memory. A ``Plan`` holds it. Its first run compiles the
kernels in parallel and launches them through triton.jit. The following runs launch the compiled kernels directly, which
takes a small part of the time that triton.jit needs to bind and specialise the arguments.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .configurations import number_format
from .primitives import INTERPRET, guard, triton

T = TypeVar("T")

ALIGNMENT = 128  # bytes, of the arrays in scratch memory: a cache line
SCRATCH = 0  # the first base of a run
PLANS = 256  # kinds of calls that are remembered
PATIENCE = 2.0  # seconds of compilation after which a message says so


class Array(NamedTuple):
    """An array of a plan: one of the tensors of a run, or a contiguous part of its scratch memory.

    Attributes:
        base: SCRATCH, or the position of the tensor among those of a run, from 1 on.
        offset: bytes from the start of the base.
    """

    base: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, bases: tuple[Tensor, ...]) -> Tensor:
        """Return the array as a tensor, for a run's scratch memory and tensors."""
        if self.base != SCRATCH:
            return bases[self.base]
        return bases[SCRATCH][self.offset : self.offset + self.bytes].view(self.dtype).view(self.shape)


class Launch(NamedTuple):
    """A kernel with its grid, its positional arguments, and its constexpr arguments and compile options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Array | int | float | None, ...]
    constants: dict[str, Any]


class Prepared(NamedTuple):
    """A compiled launch.

    Attributes:
        run: the launcher of the compiled kernel.
        grid: three axes.
        kernel: what the launcher takes after the stream: function, metadata, and no hooks.
        arguments: all arguments of the kernel. A compiled kernel takes the constexpr arguments too, and ignores them.
        pointers: the addresses to fill in: (position among the arguments, base, offset).
    """

    run: Callable[..., None]
    grid: tuple[int, ...]
    kernel: tuple[Any, ...]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]


class Plan:
    """The launches of a call, and the layout of its scratch memory.

    Build it with ``argument`` for each tensor of a run, in their order, and with ``scratch``, ``free`` and ``launch``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.scratch_bytes = 0
        self._bases = 1
        self._live: dict[int, int] = {}  # end by start of the parts of scratch memory that are in use
        self._prepared: dict[tuple[bool, ...], list[Prepared]] = {}

    def argument(self, tensor: Tensor) -> Array:
        """Return the array of the next tensor of a run, which has the shape, strides and dtype of this one."""
        base, self._bases = self._bases, self._bases + 1
        return Array(base, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Array:
        """Return a contiguous array in the first part of scratch memory that is large enough and not in use."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        size = math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        start = 0
        for used, end in sorted(self._live.items()):
            if used - start >= size:
                break
            start = end
        self._live[start] = start + size
        self.scratch_bytes = max(self.scratch_bytes, start + size)
        return Array(SCRATCH, start, shape, strides, dtype)

    def free(self, *arrays: Array | None) -> None:
        """Let arrays of later launches share the memory of these arrays in scratch memory; None is ignored."""
        for array in arrays:
            if array is not None:
                del self._live[array.offset]

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Array | int | float | None, **constants: Any
    ) -> None:
        """Add a launch. The positional arguments precede the constexpr arguments of the kernel."""
        three_axes = (*grid, 1, 1)[:3]  # compiled kernels take no fewer
        self.launches.append(Launch(kernel, three_axes, arguments, constants))

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Launch the kernels on tensors, on the current stream. Return scratch memory and tensors, for ``Array.of``."""
        scratch = tensors[0].new_empty(self.scratch_bytes, dtype=torch.uint8)
        bases = (scratch, *tensors)
        addresses = [tensor.data_ptr() for tensor in bases]
        # Triton specialises kernels on pointers that are multiples of 16
        alignment = tuple([address % 16 == 0 for address in addresses])
        with guard(self.device):
            prepared = self._prepared.get(alignment)
            if not prepared or has_launch_hooks():
                self._prepared[alignment] = self._run_by_triton(bases, is_first=prepared is None)
            else:
                stream = triton.runtime.driver.active.get_current_stream(self.device.index)
                for run, grid, kernel, arguments, pointers in prepared:
                    arguments = arguments.copy()
                    for position, base, offset in pointers:
                        arguments[position] = addresses[base] + offset
                    run(*grid, stream, *kernel, *arguments)
        return bases

    def _run_by_triton(self, bases: tuple[Tensor, ...], is_first: bool) -> list[Prepared]:
        """Launch the kernels through triton.jit. Return them prepared, or [] if Triton does not return what it ran."""
        calls = [
            [argument.of(bases) if isinstance(argument, Array) else argument for argument in launch.arguments]
            for launch in self.launches
        ]
        compiles = is_first and not INTERPRET
        with announced() if compiles else nullcontext():
            if compiles:
                compile_in_parallel(self.launches, calls, self.device)
            compiled = [
                launch.kernel[launch.grid](*call, **launch.constants) for launch, call in zip(self.launches, calls)
            ]
        # a Triton without these attributes launches by triton.jit every time
        if not all(hasattr(kernel, name) for kernel in compiled for name in ("run", "function", "packed_metadata")):
            return []
        return [_prepared(launch, kernel) for launch, kernel in zip(self.launches, compiled)]


_plans: dict[Hashable, Any] = {}
MISSING = object()


def planned(kind: str, pair: tuple[Tensor, Tensor], build: Callable[[], T], *further: Hashable) -> T:
    """Return what ``build`` returned for an earlier pair of tensors like these; call it for the first of their kind.

    Args:
        kind: of the plan that ``build`` makes.
        pair: tensors on one device, of which the dtype of the first decides that of the second.
        further: what the plan depends on beside device, dtype, matmul precision, shapes and strides.
    """
    one, other = pair
    key = (kind, one.device, number_format(one.dtype), one.shape, one.stride(), other.shape, other.stride(), *further)
    result = _plans.get(key, MISSING)
    if result is MISSING:
        if len(_plans) >= PLANS:
            _plans.pop(next(iter(_plans)), None)
        result = _plans[key] = build()
    return result


def _prepared(launch: Launch, compiled: Any) -> Prepared:
    arguments, names = list(launch.arguments), launch.kernel.arg_names
    pointers = [
        (position, argument.base, argument.offset)
        for position, argument in enumerate(arguments)
        if isinstance(argument, Array)
    ]
    arguments += [launch.constants[name] for name in names[len(arguments) :]]
    kernel = (compiled.function, compiled.packed_metadata, None, None, None)
    return Prepared(compiled.run, launch.grid, kernel, arguments, pointers)


def has_launch_hooks() -> bool:
    """Return whether something, such as Triton's profiler, wants to know of launches; only triton.jit tells it."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# -- compilation -----------------------------------------------------------------------------------------------------


_told = itertools.count()  # so that a process prints the message once


@contextmanager
def announced() -> Iterator[None]:
    """Print a message, once per process, if the body takes longer than PATIENCE."""

    def tell() -> None:
        if next(_told) == 0:
            text = "srpkd: compiling Triton kernels for this GPU; Triton keeps them in its cache for later runs"
            print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# Triton parses the source of its kernels. CPython before 3.11.8 and 3.12.2 fails with a SystemError if two threads
# parse at the same time (python/cpython#106905).
PARSES_IN_THREADS = sys.version_info >= (3, 12, 2) or (3, 11, 8) <= sys.version_info < (3, 12)


def compile_in_parallel(launches: list[Launch], calls: list[list[Any]], device: torch.device) -> None:
    """Compile and load the kernels that are not compiled yet, one thread per kernel. Launches then find them.

    Triton's passes and the assembler run without Python's lock.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or not PARSES_IN_THREADS:  # the launches compile them, one by one
        return

    def load(kernel: Any) -> None:
        with guard(device):
            kernel.run  # noqa: B018  a property, which loads the kernel and, in Triton 3.6, compiles its launcher

    with ThreadPoolExecutor(len(launches)) as pool:
        with mode(pool, ignore_errors=True):  # the launch raises them
            kernels = [
                launch.kernel.warmup(*call, grid=launch.grid, **launch.constants)
                for launch, call in zip(launches, calls)
            ]
        kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]
        list(pool.map(load, [kernel for kernel in kernels if kernel is not None and kernel.module is None]))
