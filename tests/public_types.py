"""The types of the public API as users' type checkers see them. mypy checks this script; it is not run."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

from srpkd import RelationDistiller, SRPLoss, distill, relation_loss

student, teacher, images = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), torch.ones(1, 3, 8, 8)
assert_type(relation_loss(images, images), Tensor)
assert_type(SRPLoss()(images, images), Tensor)
distiller = RelationDistiller(student, teacher, {"0": "0"}, loss={"0": SRPLoss()})
assert_type(distiller(images), tuple[Any, Any, Tensor])
assert_type(distiller.run(images).student_features, dict[str, Tensor])
assert_type(distiller.weights, dict[str, float])
assert_type(distill(teacher, student, [images], {"0": "0"}), list[dict[str, float]])
