"""What a generator learns from its teacher, beside its own task: output, relations, features.

lambda_kd * L1(student output, teacher output)
+ lambda_srp * SRPLoss at the tapped layers
+ lambda_feature * MSE(adapter(student feature), teacher feature)      (FitNet, Romero et al. 2015)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distiller import FeatureTap, RelationDistiller, unwrapped
from .distributed import wrap


class StudentTeacher(nn.Module):
    """Runs a student and its teacher on the same images and weighs what sets them apart.

    The student and the adapters are its submodules, the teacher is not: ``parameters()`` gives what is trained.

    Args:
        student, teacher: generators (B, C, H, W) -> (B, C', H, W); what ``parallel.wrap`` gives is fine too.
        layers: student module name -> teacher module name; used by lambda_srp and lambda_feature.
        loss: the relation loss.
        lambda_kd, lambda_srp, lambda_feature: weights; a part of weight 0 costs nothing.
        input_shape: (C, H, W) of an image; both networks see one at first, to learn their tapped layers' shapes.

    Raises:
        ValueError: a pair of tapped layers differs in height or width; or as RelationDistiller raises.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str],
        loss: nn.Module,
        *,
        lambda_kd: float,
        lambda_srp: float,
        lambda_feature: float,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.relations = RelationDistiller(student, teacher, layers, loss)
        self.layers = self.relations.layers
        self.lambda_kd, self.lambda_srp, self.lambda_feature = lambda_kd, lambda_srp, lambda_feature
        self.adapters = nn.ModuleList()
        if not (lambda_srp or lambda_feature):
            return
        images = torch.zeros(1, *input_shape, device=next(student.parameters()).device)
        student_shapes = feature_shapes(self.relations.student_tap, unwrapped(student), images)
        teacher_shapes = feature_shapes(self.relations.teacher_tap, teacher, images)
        for ours, theirs in self.layers.items():
            shapes = student_shapes[ours], teacher_shapes[theirs]
            if shapes[0][1:] != shapes[1][1:]:
                raise ValueError(
                    f"student layer {ours!r} gives {tuple(shapes[0])} and teacher layer {theirs!r} {tuple(shapes[1])} "
                    "(C, H, W) for an image of the training size: tap layers whose maps have one height and width"
                )
            if lambda_feature:
                self.adapters.append(wrap(nn.Conv2d(shapes[0][0], shapes[1][0], 1).to(images.device)))

    @property
    def student(self) -> nn.Module:
        return self.relations.student

    @property
    def teacher(self) -> nn.Module:
        return self.relations.teacher

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(student's output, {"kd": ..., "srp": ..., "feature": ...}): the weighted losses that have a weight."""
        relations, losses = self.relations, {}
        if not (self.lambda_srp or self.lambda_feature):
            output = self.student(images)
            if self.lambda_kd:
                with torch.no_grad():
                    teacher_output = self.teacher(images)
                losses["kd"] = self.lambda_kd * F.l1_loss(output, teacher_output)
            return output, losses
        with relations.teacher_tap.recording() as theirs, torch.no_grad():
            teacher_output = self.teacher(images)
        with relations.student_tap.recording() as ours:
            output = self.student(images)
        if self.lambda_kd:
            losses["kd"] = self.lambda_kd * F.l1_loss(output, teacher_output)
        if self.lambda_srp:
            losses["srp"] = self.lambda_srp * relations.compare(ours, theirs)
        if self.lambda_feature:
            losses["feature"] = self.lambda_feature * sum(
                F.mse_loss(adapter(ours[name]), theirs[self.layers[name]])
                for adapter, name in zip(self.adapters, self.layers)
            )
        return output, losses

    def close(self) -> None:
        """Remove the hooks from both networks."""
        self.relations.close()


@torch.no_grad()
def feature_shapes(tap: FeatureTap, network: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """The (C, H, W) of each tapped layer, from one pass in eval mode (running statistics stay as they are)."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with tap.recording() as features:
            network(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {name: feature.shape[1:] for name, feature in features.items()}
