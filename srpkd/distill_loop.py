"""Distil any generator from any other: ``distill(teacher, student, images, layers={...})``.

The trainer with GAN losses, schedules, checkpoints and a report is ``python -m srpkd.train``. Use ``distill`` for
networks that the trainer does not know, or for a loop without a discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_number, check_type, check_whole
from .defaults import KD_WEIGHT, SRP_WEIGHT
from .distiller import FeatureLoss, LayerLayout, RelationDistiller, check_gradient, preserved_modes, total
from .extras import require
from .structures import describe, element, parse_path, to_device

LEARNING_RATE = 2e-4  # of the public code
Output = str | int | Callable[[Any], Tensor]


def distill(
    teacher: nn.Module,
    student: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, str],
    *,
    epochs: int = 1,
    lambda_kd: float = KD_WEIGHT["distill"],
    lambda_srp: float = SRP_WEIGHT["distill"],
    lambda_target: float = 10.0,
    loss: FeatureLoss | Mapping[str, FeatureLoss] | None = None,
    weights: Mapping[str, float] | None = None,
    layout: LayerLayout | Mapping[str, LayerLayout] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    output: Output | None = None,
    target: Callable[[Any], Tensor | None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    on_step: Callable[[int, dict[str, float]], Any] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a student in place to match its teacher's output and the relations between the pixels of its features.

    A step minimises lambda_kd * L1(student output, teacher output) + lambda_srp * relation loss at the layers
    + lambda_target * L1(student output, target). A term with weight 0 is not computed, nor is the last one without
    targets.

    Args:
        teacher: any network that maps images (B, C, H, W) to images (B, C', H', W'), or what ``forward`` runs. It runs
            in eval mode without gradients, on the student's device, to which it is moved; its modes and weights are
            unchanged afterwards.
        student: network to train, on its device; in eval mode afterwards. It is trained in train mode, but a module
            in eval mode whose parameters are all frozen, such as a batch norm with fixed statistics or a pretrained
            encoder, stays as it is.
        data: image batches (B, C, H, W), or pairs (images, targets (B, C', H', W')); with ``forward``, batches of any
            structure. Each epoch iterates over it once, so pass a DataLoader, a list, or anything else that can be
            iterated again.
        layers: student module name -> teacher module name, as in ``named_modules()``; see ``RelationDistiller``.
        epochs: passes over the data.
        lambda_kd: weight of the distance between the outputs, 10 by default.
        lambda_srp: weight of the relation loss, 180 by default, which suits the default loss.
        lambda_target: weight of the distance to the targets.
        loss: loss of two features, or student module name -> loss; by default ``SRPLoss()``, as in the trainer.
        weights: student module name -> weight of the layer's loss; by default 1.
        layout: layout of the features, or student module name -> layout; see ``RelationDistiller``.
        forward: how a network processes a batch, ``forward(network, batch)``, for networks with several inputs; by
            default ``network(images)``. Tensors in the batch are moved to the student's device before. It is called for
            the teacher, then for the student: random numbers that both need must be part of the batch.
        output: the tensor to compare, where a network returns a tuple, a dict or an object with fields: an index, a
            field, a path such as ``"[0][sample]"``, or a function of the output. If a network returns a tensor, an
            index or a path does not apply to it.
        target: function of a batch (its tensors moved) that returns its target or None; only with ``forward``.
        optimizer: optimizer of the student's parameters; by default Adam with ``lr`` and the betas (0.5, 0.999) that
            are usual for GANs.
        lr: learning rate of the default optimizer; by default 2e-4.
        on_step: called after each step with its number (from 1) and the weighted losses by name.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        For each epoch, the mean of each weighted loss over the steps that have it: ``{"kd": ..., "srp": ..., "target":
        ...}``. Steps of small batches count as much as others.

    Raises:
        TypeError: an argument, a batch or an output has the wrong type.
        ValueError: a layer or weight does not fit, outputs differ in shape, an epoch has no data, there is nothing to
            train, ``lr`` is given together with ``optimizer``, or the optimizer has a parameter of the teacher.
        ImportError: ``progress`` is set and tqdm is not installed.
        RuntimeError: gradients are disabled, the student's output or a tapped feature requires no gradient, or a tapped
            layer did not run, or ran twice, in a pass.
        BackendUnavailable: ``loss`` names a backend that cannot run here.
        FloatingPointError: a loss is not finite; the student keeps the weights and buffers from before that step.
    """
    _check_networks(teacher, student)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        check_type("data", data, list, "batches, as in a DataLoader or a list: [images] for a single one")
    check_whole("epochs", epochs, least=1)
    for name, value in (("lambda_kd", lambda_kd), ("lambda_srp", lambda_srp), ("lambda_target", lambda_target)):
        check_number(name, value, least=0)
    if target is not None and (forward is None or not callable(target)):
        raise TypeError("target: expected a function of a batch, together with forward=")
    if output is not None and not callable(output):
        check_type("output", output, (str, int), "a field such as 'sample', an index, or a function of the output")
    if on_step is not None and not callable(on_step):
        check_type("on_step", on_step, Callable, "a function of a step's number and its losses")
    optimizer = _student_optimizer(student, teacher, optimizer, lr)
    if progress:
        require("tqdm", "train", "the progress bar of distill (or pass progress=False)")
        from .progress import ProgressBar
    device = next(student.parameters()).device
    distiller = RelationDistiller(student, teacher.to(device), layers, loss, weights, layout, forward)
    history: list[dict[str, float]] = []
    buffers: list[Tensor] = []  # before a step: a non-finite feature would stay in a running mean
    step = 0
    with preserved_modes(teacher):
        teacher.eval()
        _train_unless_frozen(student)
        try:
            for epoch in range(1, epochs + 1):
                collected: dict[str, list[float]] = {}
                first = step + 1
                bar = ProgressBar(data, desc=f"epoch {epoch}/{epochs}", unit="step") if progress else None
                for batch in data if bar is None else bar:
                    step += 1
                    if forward is None:
                        inputs, expected = _images_and_target(batch, device)
                    else:
                        inputs = to_device(batch, device)
                        expected = None if target is None else target(inputs)
                    buffers = _copied(student.buffers(), buffers)
                    losses = _losses(distiller, inputs, expected, output, lambda_kd, lambda_srp, lambda_target)
                    values = {name: value.item() for name, value in losses.items()}
                    if nonfinite := {name: value for name, value in values.items() if not math.isfinite(value)}:
                        _copied(buffers, list(student.buffers()))
                        raise FloatingPointError(
                            f"step {step}: the loss is not finite ({nonfinite}); the student keeps the weights from "
                            "before this step. Check the images of this step, or use a lower lr or weight"
                        )
                    optimizer.zero_grad()
                    total(losses.values()).backward()
                    optimizer.step()
                    for name, value in values.items():
                        collected.setdefault(name, []).append(value)
                    if bar is not None:
                        bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                    if on_step:
                        on_step(step, values)
                if step < first:
                    raise ValueError(
                        f"the data gave no batch in epoch {epoch}: expected batches in every epoch, as from a "
                        "DataLoader or a list (a generator can be iterated only once)"
                    )
                history.append({name: fmean(own) for name, own in collected.items()})
        finally:
            distiller.close()
            student.eval()
    return history


@torch.no_grad()
def _copied(tensors: Iterable[Tensor], copies: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in the memory of ``copies`` if these have the same shapes."""
    tensors = list(tensors)
    if [tensor.shape for tensor in tensors] != [copy.shape for copy in copies]:
        return [tensor.clone() for tensor in tensors]
    if tensors:
        torch._foreach_copy_(copies, tensors)
    return copies


def _check_networks(teacher: nn.Module, student: nn.Module) -> None:
    """Raise an error unless both are networks and the student can be trained here."""
    check_type("teacher", teacher, nn.Module, "a torch.nn.Module")
    check_type("student", student, nn.Module, "a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("no parameter of the student requires a gradient: nothing to train; student.requires_grad_()")
    if not torch.is_grad_enabled():
        raise RuntimeError("gradients are disabled: call distill outside torch.no_grad() and torch.inference_mode()")


def _train_unless_frozen(student: nn.Module) -> None:
    """Set a student to train mode, except the modules in eval mode whose parameters are all frozen.

    What these contain keeps its mode too, such as dropout and norms without parameters.
    """
    modes: dict[nn.Module, bool] = {}
    for module in student.modules():
        parameters = list(module.parameters())
        if not module.training and parameters and not any(parameter.requires_grad for parameter in parameters):
            modes |= {inner: inner.training for inner in module.modules()}
    student.train()
    for module, mode in modes.items():
        module.training = mode


def _student_optimizer(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer | None, lr: float | None
) -> torch.optim.Optimizer:
    """Return the optimizer, or the default one; raise a ValueError unless it trains the student and not the teacher."""
    if lr is not None:
        check_number("lr", lr, least=0)
    if optimizer is None:
        optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE if lr is None else lr, betas=(0.5, 0.999))
    elif lr is not None:
        raise ValueError(f"lr={lr} is that of the default optimizer: set it in optimizer, or leave out one of them")
    check_type("optimizer", optimizer, torch.optim.Optimizer, "one such as torch.optim.Adam(student.parameters())")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in trained for parameter in student.parameters()):
        raise ValueError(
            "optimizer has no parameter of the student that requires a gradient, perhaps those of a copy: create it "
            "from student.parameters()"
        )
    shared = [name for name, value in teacher.named_parameters() if value.requires_grad and id(value) in trained]
    if shared:
        raise ValueError(
            f"training would change the teacher, of which the optimizer has {len(shared)} parameters, such as "
            f"{shared[0]!r}: give the student copies (copy.deepcopy), or freeze them with requires_grad_(False)"
        )
    return optimizer


def _losses(
    distiller: RelationDistiller,
    inputs: Any,
    target: Tensor | None,
    output: Output | None,
    lambda_kd: float,
    lambda_srp: float,
    lambda_target: float,
) -> dict[str, Tensor]:
    """Run both networks and return the weighted losses that have a weight."""
    passes = distiller.run(inputs, record_features=lambda_srp > 0)
    losses, has_target = {}, target is not None and lambda_target > 0
    if lambda_kd or has_target:
        student_output = _select(passes.student_output, output, "student")
        check_gradient(distiller.student, student_output, "the student's output")
    if lambda_kd:
        teacher_output = _select(passes.teacher_output, output, "teacher")
        losses["kd"] = lambda_kd * _l1(student_output, teacher_output, "teacher's output")
    if lambda_srp:
        relation = distiller.compare(passes.student_features, passes.teacher_features)
        if relation.ndim:
            raise ValueError(
                f"loss returned the shape {tuple(relation.shape)}: expected one number, as reduction='mean' gives"
            )
        losses["srp"] = lambda_srp * relation
    if has_target:
        losses["target"] = lambda_target * _l1(student_output, target, "target")
    if not losses:
        raise ValueError(
            "every weight (lambda_kd, lambda_srp, and lambda_target if the data have targets) is 0: set one of them"
        )
    return losses


def _images_and_target(batch: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Move the images (B, C, H, W) of a batch, and its targets if it has any, to the device."""
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"the data gave a {type(batch).__name__}"
            + (f" of {', '.join(type(part).__name__ for part in parts)}" if isinstance(batch, tuple | list) else "")
            + "; expected image tensors (B, C, H, W), or pairs of tensors (images, targets); for other batches pass "
            "forward=, a function (network, batch) that runs a network on one"
        )
    if not parts[0].is_floating_point():
        raise TypeError(f"the data gave images of {parts[0].dtype}: expected floats, such as images / 127.5 - 1")
    images, *target = (to_device(part, device) for part in parts)
    return images, target[0] if target else None


def _select(value: Any, output: Output | None, network: str) -> Tensor:
    """Return the tensor that ``output`` selects in the output of a network; ``network`` names it in errors."""
    selected = value
    if isinstance(output, int):
        output = f"[{output}]"
    if isinstance(output, str):
        name, keys = parse_path(output)
        try:
            selected = value if isinstance(value, Tensor) else element(value, (name, *keys) if name else keys)
        except LookupError as error:
            raise ValueError(f"output={output!r}: the {network}'s output has {error}") from error
    elif output is not None:
        selected = output(value)
    if isinstance(selected, Tensor):
        return selected
    received = f"the {network} gave a {describe(value)}"
    if output is not None:
        received += f", of which output= selects a {describe(selected)}"
    raise TypeError(
        f"{received}; expected one image tensor (B, C, H, W): pass output=, the index or field of the tensor to "
        "compare, or a function of the output"
    )


def _l1(output: Tensor, expected: Any, role: str) -> Tensor:
    """Return the mean absolute difference of two outputs of the same shape; ``role`` names the second in errors."""
    if not isinstance(expected, Tensor):
        raise TypeError(f"the {role} is a {describe(expected)}; expected one tensor, such as an image (B, C, H, W)")
    if output.shape != expected.shape:  # l1_loss would broadcast
        raise ValueError(
            f"the student's output is {tuple(output.shape)} and the {role} {tuple(expected.shape)}: expected the same "
            "shape; for another loss than L1, such as that of class labels, use RelationDistiller in your own loop"
        )
    return F.l1_loss(output, expected)
