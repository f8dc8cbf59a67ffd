"""srpkd: relation distillation without the N x N matrix."""

from .distill import distill
from .distiller import RelationDistiller
from .loss import SRPLoss, relation_loss

__version__ = "0.1.0"
__all__ = ["RelationDistiller", "SRPLoss", "distill", "relation_loss"]
