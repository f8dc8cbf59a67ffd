"""The faults that tests/mutations.py puts into the copy of the tree, by backend."""

from . import cuda, cuda_host, hopper, native, python, training, triton
from .kinds import Backend

BACKENDS: dict[str, Backend] = {
    **python.BACKENDS,
    **native.BACKENDS,
    **triton.BACKENDS,
    **cuda.BACKENDS,
    **cuda_host.BACKENDS,
    **hopper.BACKENDS,
    **training.BACKENDS,
}
