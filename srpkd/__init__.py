"""srpkd: relation distillation without the N x N matrix."""

from .distill_loop import distill
from .distiller import RelationDistiller
from .kernels import BackendUnavailable
from .loss import SRPLoss, relation_loss
from .models.checkpoints import CheckpointError

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "CheckpointError", "RelationDistiller", "SRPLoss", "distill", "relation_loss"]
