"""Distil any generator from any other: ``distill(teacher, student, images, layers={...})``.

The whole trainer (GAN losses, schedules, checkpoints, a report) is ``python -m srpkd.train``. This is for networks
that it does not know, or a loop that needs no discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_number, check_type, check_whole
from .distiller import RelationDistiller
from .extras import require
from .loss import SRPLoss


def distill(
    teacher: nn.Module,
    student: nn.Module,
    data: Iterable[Tensor | tuple[Tensor, Tensor]],
    layers: Mapping[str, str],
    *,
    epochs: int = 1,
    lambda_kd: float = 10.0,
    lambda_srp: float = 180.0,
    lambda_target: float = 10.0,
    loss: nn.Module | None = None,
    weights: Mapping[str, float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 2e-4,
    on_step: Callable[[int, dict[str, float]], Any] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a student, in place, to do what its teacher does: in its output and in its pixels' relations.

    A step minimises lambda_kd * L1(student output, teacher output) + lambda_srp * relation loss at the layers
    + lambda_target * L1(student output, target), the last where the data have targets.

    Args:
        teacher: any network, image batch (B, C, H, W) -> (B, C', H', W'). It runs in eval mode without a gradient, and
            is in the end as it was. It may lie on another device: it is moved to the student's.
        student: the network to train, on its device; in eval mode afterwards.
        data: image batches (B, C, H, W), or (images, targets (B, C', H', W')); gone through once per epoch, so a
            DataLoader, a list, or anything else that can be iterated again.
        layers: student module name -> teacher module name, as ``named_modules()`` has them; see ``RelationDistiller``.
        epochs: passes over the data.
        loss: how two features are compared; by default, as in the trainer, ``SRPLoss("cosine", "l2")``.
        weights: student module name -> factor of that layer's loss; 1 where not given.
        optimizer: of the student's parameters; by default Adam with ``lr`` and the betas (0.5, 0.999) of GANs.
        on_step: called after each step with its number (from 1) and the weighted losses by name.
        progress: whether a progress bar is shown (by tqdm).

    Returns:
        Per epoch, the mean of each weighted loss: ``{"kd": ..., "srp": ..., "target": ...}``.

    Raises:
        TypeError: an argument, or what the data or a network gave, is none of the above.
        ValueError: a layer or a weight that does not fit, outputs of unlike shapes, no data in an epoch, or nothing to
            train.
        ImportError: a progress bar is wanted and tqdm is not installed.
        FloatingPointError: a loss is not finite; the student is as it was before that step.
    """
    check_type("teacher", teacher, nn.Module, "a torch.nn.Module")
    check_type("student", student, nn.Module, "a torch.nn.Module")
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        check_type("data", data, list, "batches, as in a DataLoader or a list: [images] for a single one")
    check_whole("epochs", epochs, least=1)
    for name, value in (("lambda_kd", lambda_kd), ("lambda_srp", lambda_srp), ("lambda_target", lambda_target)):
        check_number(name, value, least=0)
    if optimizer is not None:
        check_type("optimizer", optimizer, torch.optim.Optimizer, "one such as torch.optim.Adam(student.parameters())")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("no parameter of the student requires a gradient: nothing to train; student.requires_grad_()")
    if progress:
        tqdm = require("tqdm", "train", "the progress bar of distill (progress=False does without)").tqdm
    device = next(student.parameters()).device
    optimizer = optimizer or torch.optim.Adam(student.parameters(), lr=lr, betas=(0.5, 0.999))
    loss = SRPLoss("cosine", "l2") if loss is None else loss
    distiller = RelationDistiller(student, teacher.to(device), layers, loss, weights)
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval()
    student.train()
    history, step = [], 0
    try:
        for epoch in range(1, epochs + 1):
            sums: dict[str, float] = {}
            began = step
            bar = tqdm(data, desc=f"epoch {epoch}/{epochs}", unit="step") if progress else data
            for batch in bar:
                images, target = _images_and_target(batch, device)
                output, teacher_output, relation = distiller(images)
                losses = {"kd": lambda_kd * _l1(output, teacher_output, "teacher's output")} if lambda_kd else {}
                if lambda_srp:
                    losses["srp"] = lambda_srp * relation
                if target is not None and lambda_target:
                    losses["target"] = lambda_target * _l1(output, target, "target")
                if not losses:
                    raise ValueError("every weight (lambda_kd, lambda_srp, lambda_target) is 0: nothing to learn")
                if relation.ndim:
                    raise ValueError(
                        f"loss gave the shape {tuple(relation.shape)}: expected one number, as reduction='mean' gives"
                    )
                values = {name: value.item() for name, value in losses.items()}
                if wrong := {name: value for name, value in values.items() if not math.isfinite(value)}:
                    raise FloatingPointError(
                        f"step {step + 1}: the loss is not finite ({wrong}); the student is as it was before. Look at "
                        "the images of that step, or take a smaller lr or weight"
                    )
                optimizer.zero_grad(set_to_none=True)
                sum(losses.values()).backward()
                optimizer.step()
                step += 1
                sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
                if progress:
                    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                if on_step:
                    on_step(step, values)
            if step == began:
                raise ValueError(
                    f"the data gave nothing in epoch {epoch}: expected batches in every epoch, as from a DataLoader "
                    "or a list (a generator can be gone through once only)"
                )
            history.append({name: total / (step - began) for name, total in sums.items()})
    finally:
        distiller.close()
        for module, mode in modes.items():
            module.training = mode
        student.eval()
    return history


def _images_and_target(batch: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"the data gave a {type(batch).__name__}"
            + (f" of {', '.join(type(part).__name__ for part in parts)}" if isinstance(batch, tuple | list) else "")
            + "; expected image tensors (B, C, H, W), or pairs of tensors (images, targets)"
        )
    if not parts[0].is_floating_point():
        raise TypeError(f"the data gave images of {parts[0].dtype}: expected floats, such as images / 127.5 - 1")
    images, *target = (part.to(device, non_blocking=True) for part in parts)
    return images, target[0] if target else None


def _l1(output: Any, wanted: Tensor, what: str) -> Tensor:
    for value in (output, wanted):
        if not isinstance(value, Tensor):
            raise TypeError(f"a network gave a {type(value).__name__}; expected one image tensor (B, C, H, W)")
    if output.shape != wanted.shape:  # l1_loss would broadcast
        raise ValueError(
            f"the student's output is {tuple(output.shape)} and the {what} {tuple(wanted.shape)}: expected one shape"
        )
    return F.l1_loss(output, wanted)
