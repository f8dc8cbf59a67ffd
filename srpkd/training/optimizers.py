"""Optimizer steps with mixed precision and gradient clipping; steps with a non-finite loss are skipped.

Nothing in a step waits for the device. Whether a loss is finite, the learning rate and the counters are tensors on the
device, and the host reads them between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .options import ResolvedConfig

Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# options of a saved optimizer that those of this run replace: they do not change what is computed
OWN_OPTIONS = ("lr", "fused", "foreach", "capturable")


class GuardedOptimizers:
    """One Adam optimizer per group of networks; no step is taken on a non-finite loss.

    A training step calls ``begin``, then ``step`` once for each group, then ``finish``. After a non-finite loss, its
    group's and all later groups' calls of ``step`` change nothing.

    Args:
        config: options lr, beta1, precision, clip_grad_norm and device.
        groups: name -> networks that the optimizer trains.

    Attributes:
        by_group: name of a group -> its optimizer.
        lr: learning rate, float32 of shape ().
        finite: whether the losses of the training step so far are finite on all ranks, bool of shape ().
        nonfinite_loss: name of the first non-finite loss since the last complete step, as ``find_nonfinite_loss``
            found it, or "".
        losses: the losses of each group in the last training step.
    """

    def __init__(self, config: ResolvedConfig, groups: Mapping[str, Iterable[nn.Module]]) -> None:
        self._groups = {name: list(networks) for name, networks in groups.items()}
        self.device, self.dtype = config.torch_device, PRECISIONS[config.precision]
        # the fused one skips a step on the device; on others, such as "meta", the host decides
        self._is_fused = self.device.type in ("cpu", "cuda")
        scalars = torch.device("cpu") if self.device.type == "meta" else self.device
        self.lr = torch.tensor(config.lr, dtype=torch.float32, device=scalars)
        self.by_group = {
            name: torch.optim.Adam(
                self._parameters(name),
                lr=self.lr,
                betas=(config.beta1, 0.999),
                fused=self._is_fused,
                capturable=self.device.type == "cuda",
            )
            for name in self._groups
        }
        for optimizer in self.by_group.values():
            optimizer.register_step_pre_hook(self._skip_if_nonfinite)
        # bfloat16 has the range of float32: only float16 gradients can underflow
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.clip_grad_norm = config.clip_grad_norm
        self.finite = torch.ones((), dtype=torch.bool, device=scalars)
        self.nonfinite_loss = ""
        self.losses: dict[str, Losses] = {}
        self._counts = torch.zeros(2, dtype=torch.int64, device=scalars)  # skipped, consecutive_skips
        self._batch_norms = [
            module
            for network in chain.from_iterable(self._groups.values())
            for module in network.modules()
            if isinstance(module, nn.BatchNorm2d)
        ]

    @property
    def skipped(self) -> int:
        """Number of training steps with a non-finite loss. Waits for the device."""
        return int(self._counts[0])

    @property
    def consecutive_skips(self) -> int:
        """Number of such steps since the last complete step. Waits for the device."""
        return int(self._counts[1])

    def set_lr(self, value: float) -> None:
        """Set the learning rate of all optimizers."""
        self.lr.fill_(value)

    def autocast(self) -> torch.autocast:
        """Return the context for forward passes and losses; it has no effect in fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def begin(self) -> None:
        """Start a training step."""
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.losses = {}

    def step(self, name: str, losses: Losses) -> None:
        """Step a group's optimizer on the sum of the losses, unless ``finite`` is or becomes False."""
        optimizer = self.by_group[name]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(list(losses.values())).sum()
        self.losses[name] = {key: value.detach() for key, value in losses.items()}
        self.finite = self.finite & distributed.all_reduce_and(loss.detach().isfinite())
        self.scaler.scale(loss).backward()
        if not self._is_fused and not self.finite:
            return
        if self.clip_grad_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters(name), self.clip_grad_norm)
        self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            # the loss scale is not the cause of a loss that is not finite
            for found_inf in self.scaler._found_inf_per_device(optimizer).values():
                found_inf.mul_(self.finite)

    def finish(self) -> None:
        """Update the loss scale and the counts of skipped steps at the end of a training step."""
        if self._is_fused or self.finite:
            self.scaler.update()
        skip = ~self.finite
        self._counts.add_(skip)
        self._counts[1].mul_(skip)
        for module in self._batch_norms:
            if module.running_mean is not None and module.running_var is not None:
                # the forward pass of a skipped step may have spoiled them, and a running average keeps a NaN forever
                module.running_mean.nan_to_num_(0.0, 0.0, 0.0)
                module.running_var.nan_to_num_(1.0, 1.0, 1.0)

    def find_nonfinite_loss(self) -> None:
        """Update ``nonfinite_loss`` after a training step. All ranks call it together; it waits for the device."""
        if not self.consecutive_skips:
            self.nonfinite_loss = ""
        elif not self.nonfinite_loss:
            found = distributed.all_gather_object(self._first_nonfinite())
            # by group, because the losses of later groups may be NaN only because of the first one's
            self.nonfinite_loss = next(filter(None, chain.from_iterable(zip(*found))), "the sum of all losses")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizers and the loss scale, and the number of skipped steps."""
        states = {name: optimizer.state_dict() for name, optimizer in self.by_group.items()}
        for group in chain.from_iterable(state["param_groups"] for state in states.values()):
            group["lr"] = float(group["lr"])
        return {"optimizers": states, "scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, except the learning rate."""
        for name, optimizer in self.by_group.items():
            saved = state["optimizers"][name]
            groups = [
                group | {option: own[option] for option in OWN_OPTIONS}
                for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
            ]
            optimizer.load_state_dict({**saved, "param_groups": groups})
            for group in optimizer.param_groups:
                group["lr"] = self.lr  # load_state_dict copies tensors
        self.scaler.load_state_dict(state["scaler"])
        self._counts[0] = state["skipped"]

    def _parameters(self, name: str) -> Iterator[nn.Parameter]:
        return chain.from_iterable(network.parameters() for network in self._groups[name])

    def _skip_if_nonfinite(self, optimizer: torch.optim.Optimizer, args: Any, keywords: Any) -> None:
        """Make a fused optimizer's step change nothing if a loss is not finite; called before the step."""
        if not self._is_fused:
            return
        skip = (~self.finite).float()
        if self.scaler.is_enabled():  # the scaler has set found_inf, for gradients that overflowed
            skip = torch.maximum(skip, optimizer.found_inf)  # type: ignore[attr-defined]
        optimizer.found_inf = skip  # type: ignore[attr-defined]

    def _first_nonfinite(self) -> list[str]:
        """Return, for each group of the last step in order, the first non-finite loss on this rank or ""."""
        names = []
        for losses in self.losses.values():
            values = torch.stack(list(losses.values()))
            bad = [name for name, is_finite in zip(losses, values.isfinite().tolist()) if not is_finite]
            overflow = "" if values.sum().isfinite() else f"the sum of {', '.join(losses)}"
            names.append(next(iter(bad), overflow))
        return names
