"""The engine: relation losses of raw features (B, N, C), one file per way to compute them.

Arrows point one way: op -> dispatch -> backends -> algebra; distributed.py, for relations across processes, is beside
op. Nothing here knows of images or GANs.
"""

from .algebra import DISTANCES, NORMALIZATIONS, Relation, Scales, Tiles
from .dispatch import BACKENDS, BackendUnavailable, automatic, requested, why_not
from .op import relation_loss_op

__all__ = [
    "BACKENDS",
    "DISTANCES",
    "NORMALIZATIONS",
    "BackendUnavailable",
    "Relation",
    "Scales",
    "Tiles",
    "automatic",
    "relation_loss_op",
    "requested",
    "why_not",
]
