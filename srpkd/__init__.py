"""Relation distillation without the N x N matrix.

Stability: public are the names in ``srpkd.__all__``, the commands that ``srpkd --help`` lists with their options, and
the files that they write. Everything else, ``srpkd.kernels`` included, may change in any release.
"""

from importlib.util import find_spec

if find_spec("srpkd.kernels") is None:
    raise ImportError(
        f"{__file__} is in a checkout without symbolic links, which git makes on Windows by default: run srpkd from "
        "another folder, where it is installed, or clone it again with git clone -c core.symlinks=true"
    )

from .distill_loop import distill
from .distiller import RelationDistiller
from .kernels import BackendUnavailable
from .loss import SRPLoss, relation_loss
from .models.checkpoints import CheckpointError

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "CheckpointError", "RelationDistiller", "SRPLoss", "distill", "relation_loss"]
