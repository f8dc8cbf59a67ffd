"""Relation distillation without the N x N matrix.

Stability: public are the names in ``srpkd.__all__``, the commands that ``srpkd --help`` lists with their options, and
the files that they write. Everything else, ``srpkd.kernels`` included, may change in any release.
"""

from .distill_loop import distill
from .distiller import RelationDistiller
from .kernels import BackendUnavailable
from .loss import SRPLoss, relation_loss
from .models.checkpoints import CheckpointError

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "CheckpointError", "RelationDistiller", "SRPLoss", "distill", "relation_loss"]
