"""From losses to steps of the optimizers: mixed precision, gradient clipping, and no step on what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .options import TrainConfig

Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GuardedOptimizers:
    """An Adam for each group of networks, and how many steps were left out because a loss was not finite.

    Args:
        config: lr, beta1, precision, clip_grad_norm, device.
        groups: name -> the networks that its Adam trains.
    """

    def __init__(self, config: TrainConfig, groups: Mapping[str, Iterable[nn.Module]]) -> None:
        self.groups = {name: list(networks) for name, networks in groups.items()}
        self.optimizers = {
            name: torch.optim.Adam(self._parameters(name), lr=config.lr, betas=(config.beta1, 0.999))
            for name in self.groups
        }
        self.device, self.dtype = config.torch_device, PRECISIONS[config.precision]
        # bfloat16 has float32's range: only float16's gradients have to be kept from underflow
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.clip_grad_norm = config.clip_grad_norm
        self.skipped = self.consecutive_skips = 0
        self.nonfinite_loss = ""  # the loss that was first not finite, of the steps in a row
        self._applied = 0

    def autocast(self) -> torch.autocast:
        """The context for forward passes and losses; in fp32 it does nothing."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def apply(self, name: str, losses: Losses) -> bool:
        """A group's step on the sum of the losses; False, and no step, where that is not finite in every process."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        total = sum(losses.values())
        is_finite = _item_later(distributed.all_reduce_and(total.detach().isfinite()))
        self.scaler.scale(total).backward()
        if not is_finite():
            self._leave_out(optimizer, losses)
            return False
        if self.clip_grad_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters(name), self.clip_grad_norm)
        self.scaler.step(optimizer)
        self._applied += 1
        return True

    def finish(self, losses: Losses) -> Losses:
        """The end of a training step, in which every group was updated or one was left out: its losses, detached."""
        if self._applied:
            self.scaler.update()
        if self._applied == len(self.groups):
            self.consecutive_skips, self.nonfinite_loss = 0, ""
        else:
            self.consecutive_skips, self.skipped = self.consecutive_skips + 1, self.skipped + 1
        self._applied = 0
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def _parameters(self, name: str) -> Iterable[nn.Parameter]:
        return chain.from_iterable(network.parameters() for network in self.groups[name])

    def _leave_out(self, optimizer: torch.optim.Optimizer, losses: Losses) -> None:
        optimizer.zero_grad(set_to_none=True)
        here = next((name for name, loss in losses.items() if not loss.isfinite()), "")
        self.nonfinite_loss = self.nonfinite_loss or next(
            filter(None, distributed.all_gather_object(here)), "the sum of " + ", ".join(losses)
        )
        for module in chain.from_iterable(net.modules() for nets in self.groups.values() for net in nets):
            if isinstance(module, nn.BatchNorm2d) and not module.running_var.isfinite().all():
                module.reset_running_stats()  # they took it in, and would never get rid of it


def _item_later(condition: Tensor) -> Callable[[], bool]:
    """Whether a condition on the device holds, asked for now and waited for when called: what is launched in
    between keeps a GPU busy meanwhile."""
    if condition.device.type != "cuda":
        return condition.item
    answer, copied = condition.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def wait() -> bool:
        copied.synchronize()
        return bool(answer)

    return wait
