"""The engine: relation losses of raw features (B, N, C), one module per backend.

Imports point one way: op -> dispatch -> backends -> formulas; distributed.py, for relations across processes, is beside
op. Nothing here depends on images or GANs.
"""

from .dispatch import BACKENDS, BackendUnavailable, auto_backend, requested_backend, unavailable_reason
from .formulas import DISTANCES, NORMALIZATIONS, Relation, Scales, TileSums
from .op import python_relation_loss

__all__ = [
    "BACKENDS",
    "DISTANCES",
    "NORMALIZATIONS",
    "BackendUnavailable",
    "Relation",
    "Scales",
    "TileSums",
    "auto_backend",
    "python_relation_loss",
    "requested_backend",
    "unavailable_reason",
]
