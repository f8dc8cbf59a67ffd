"""Losses between a student generator and its teacher: outputs, relations, features.

lambda_kd * L1(student output, teacher output)
+ lambda_srp * SRPLoss at the tapped layers
+ lambda_feature * MSE(adapter(student feature), teacher feature)      (FitNet, Romero et al. 2015)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distiller import RelationDistiller, check_has_relations, preserved_modes, total
from ..finite import first_nonfinite
from ..taps import FeatureTap, unwrap
from .distributed import wrap


class StudentTeacher(nn.Module):
    """A student, its teacher, and the distillation losses between them.

    The student and the adapters are submodules, the teacher is not: ``parameters()`` returns what is trained.

    Args:
        student: generator (B, C, H, W) -> (B, C', H, W), also one that ``distributed.wrap`` returned.
        teacher: generator of the same signature.
        layers: student module name -> teacher module name, for lambda_srp and lambda_feature.
        loss: relation loss of two features.
        lambda_kd: weight of the L1 distance of the outputs; a term with weight 0 is not computed.
        lambda_srp: weight of the relation loss.
        lambda_feature: weight of the feature loss.
        input_shape: (C, H, W) of an image; both networks process one zero image, for the shapes of tapped features.

    Raises:
        ValueError: a pair of tapped features differs in height or width; or as RelationDistiller raises.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        lambda_kd: float,
        lambda_srp: float,
        lambda_feature: float,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.relations = RelationDistiller(student, teacher, layers, loss, forward=partial(_run, teacher))
        self.layers = self.relations.layers
        self.lambda_kd, self.lambda_srp, self.lambda_feature = lambda_kd, lambda_srp, lambda_feature
        self.adapters = nn.ModuleList()
        self.last_pass: dict[str, Tensor] = {}  # outputs and features of the last pass, in the order of computation
        if not self.compares_features:
            return
        images = torch.zeros(1, *input_shape, device=next(student.parameters()).device)
        student_shapes = feature_shapes(self.relations.student_tap, unwrap(student), images)
        teacher_shapes = feature_shapes(self.relations.teacher_tap, teacher, images)
        for student_name, teacher_name in self.layers.items():
            student_shape, teacher_shape = student_shapes[student_name], teacher_shapes[teacher_name]
            if student_shape[1:] != teacher_shape[1:]:
                raise ValueError(
                    f"student layer {student_name!r} gives {tuple(student_shape)} and teacher layer "
                    f"{teacher_name!r} {tuple(teacher_shape)} (C, H, W) for an image of the training size: tap layers "
                    "of the same height and width by --layers, or choose a --netG like the teacher's"
                )
            if lambda_srp:
                try:
                    check_has_relations(loss, student_shape)
                except ValueError as error:
                    raise ValueError(f"student layer {student_name!r}: {error}") from error
            if lambda_feature:
                self.adapters.append(wrap(nn.Conv2d(student_shape[0], teacher_shape[0], 1).to(images.device)))

    @property
    def compares_features(self) -> bool:
        """Whether a loss of tapped features has a weight."""
        return bool(self.lambda_srp or self.lambda_feature)

    def forward(self, images: Tensor, others: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run both networks on images (B, C, H, W).

        Args:
            images: inputs of both networks, whose outputs and features are compared.
            others: inputs of the student alone, in the same pass.

        Returns:
            The student's output for the images, then the others, and the weighted losses that have a weight:
            {"kd": ..., "srp": ..., "feature": ...}.
        """
        self.last_pass = {}  # frees the memory
        passes, losses = self.relations.run(images, others, record_features=self.compares_features), {}
        features = passes.student_features
        output = passes.student_output
        if others is not None:
            features = {name: feature[: len(images)] for name, feature in features.items()}
            output = output[: len(images)]
        self.last_pass = {
            **{f"the teacher's feature {name}": value.detach() for name, value in passes.teacher_features.items()},
            "the teacher's output": passes.teacher_output,
            **{f"the student's feature {name}": value.detach() for name, value in features.items()},
            "the student's output": output.detach(),
        }
        if self.lambda_kd:
            losses["kd"] = self.lambda_kd * F.l1_loss(output, passes.teacher_output)
        if self.lambda_srp:
            losses["srp"] = self.lambda_srp * self.relations.compare(features, passes.teacher_features)
        if self.lambda_feature:
            losses["feature"] = self.lambda_feature * total(
                F.mse_loss(adapter(features[student_name]), passes.teacher_features[teacher_name])
                for adapter, (student_name, teacher_name) in zip(self.adapters, self.layers.items())
            )
        return passes.student_output, losses

    def nonfinite_source(self) -> str:
        """Return what was not finite first in the last forward pass, a feature or an output in words, or ""."""
        return first_nonfinite(self.last_pass)

    def adapter_weights(self) -> dict[str, Tensor]:
        """Return ``"<student layer>.weight"`` and ``".bias"`` -> tensor of an adapter; {} if lambda_feature is 0."""
        return {
            f"{layer}.{key}": value
            for layer, adapter in zip(self.layers, self.adapters)
            for key, value in unwrap(adapter).state_dict().items()
        }

    def close(self) -> None:
        """Remove the hooks from both networks."""
        self.relations.close()


def _run(teacher: nn.Module, network: nn.Module, images: Tensor, others: Tensor | None) -> Tensor:
    """Return a network's output for the images and, if it is not the teacher, for the others behind them."""
    return network(images if others is None or network is teacher else torch.cat((images, others)))


@torch.no_grad()
def feature_shapes(tap: FeatureTap, network: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """Return the shape (C, H, W) of each tapped feature, from one pass in eval mode.

    Modes and running statistics of the network do not change.
    """
    with preserved_modes(network):
        network.eval()
        with tap.recording() as features:
            network(images)
    return {name: feature.shape[1:] for name, feature in features.items()}
