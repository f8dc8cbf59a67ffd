"""The faults that tests/mutations.py puts into the kernels, by backend."""

from . import cuda, hopper, native, python, triton
from .kinds import Backend

BACKENDS: dict[str, Backend] = {
    **python.BACKENDS,
    **native.BACKENDS,
    **triton.BACKENDS,
    **cuda.BACKENDS,
    **hopper.BACKENDS,
}
