"""Optimizer steps with mixed precision and gradient clipping; steps with a non-finite loss are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..distiller import total
from . import distributed
from .options import ResolvedConfig

Losses = dict[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GuardedOptimizers(Mapping[str, torch.optim.Adam]):
    """One Adam optimizer per group of networks, by name of the group; no step is taken on a non-finite loss.

    A training step calls ``step`` once for each group, until one returns False, and then ``update``.

    Args:
        config: options lr, beta1, precision, clip_grad_norm and device.
        groups: name -> networks that the optimizer trains.

    Attributes:
        skipped: number of training steps with a non-finite loss.
        consecutive_skips: number of such steps since the last complete step.
        nonfinite_loss: name of the first non-finite loss of these, or "".
    """

    def __init__(self, config: ResolvedConfig, groups: Mapping[str, Iterable[nn.Module]]) -> None:
        self._groups = {name: list(networks) for name, networks in groups.items()}
        self._optimizers = {
            name: torch.optim.Adam(self._parameters(name), lr=config.lr, betas=(config.beta1, 0.999))
            for name in self._groups
        }
        self.device, self.dtype = config.torch_device, PRECISIONS[config.precision]
        # bfloat16 has the range of float32: only float16 gradients can underflow
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.clip_grad_norm = config.clip_grad_norm
        self.skipped = self.consecutive_skips = 0
        self.nonfinite_loss = ""
        self._stepped = 0  # groups in this training step

    def __getitem__(self, name: str) -> torch.optim.Adam:
        return self._optimizers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)

    def autocast(self) -> torch.autocast:
        """Return the context for forward passes and losses; it has no effect in fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def step(self, name: str, losses: Losses) -> bool:
        """Step a group's optimizer on the sum of the losses.

        Returns:
            False if the sum is not finite on some rank: no rank then takes a step.
        """
        optimizer = self[name]
        optimizer.zero_grad(set_to_none=True)
        loss = total(losses.values())
        is_finite = _read_later(distributed.all_reduce_and(loss.detach().isfinite()))
        self.scaler.scale(loss).backward()
        if not is_finite():
            optimizer.zero_grad(set_to_none=True)
            self._record_skip(losses)
            return False
        if self.clip_grad_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters(name), self.clip_grad_norm)
        self.scaler.step(optimizer)
        self._stepped += 1
        return True

    def update(self) -> None:
        """Update the loss scale and the counts of skipped steps at the end of a training step."""
        if self._stepped:
            self.scaler.update()
        if self._stepped == len(self):
            self.consecutive_skips, self.nonfinite_loss = 0, ""
        else:
            self.consecutive_skips, self.skipped = self.consecutive_skips + 1, self.skipped + 1
        self._stepped = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizers and the loss scale, and the number of skipped steps."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.items()},
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        for name, optimizer in self.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def _parameters(self, name: str) -> Iterator[nn.Parameter]:
        return chain.from_iterable(network.parameters() for network in self._groups[name])

    def _record_skip(self, losses: Losses) -> None:
        """Record the first non-finite loss, and reset batch-norm statistics that the forward pass made non-finite."""
        local = next((name for name, loss in losses.items() if not loss.isfinite()), "")
        self.nonfinite_loss = self.nonfinite_loss or next(
            filter(None, distributed.all_gather_object(local)), "the sum of " + ", ".join(losses)
        )
        for network in chain.from_iterable(self._groups.values()):
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d) and not _is_finite(module.running_var):
                    module.reset_running_stats()  # a running average never recovers from NaN


def _is_finite(values: Tensor | None) -> bool:
    return values is None or bool(values.isfinite().all())


def _read_later(condition: Tensor) -> Callable[[], bool]:
    """Start to copy a condition from the device, and return a function that waits for it.

    What is launched in between keeps a GPU busy during the wait.
    """
    if condition.device.type != "cuda":
        return lambda: bool(condition)
    copy, copied = condition.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def wait() -> bool:
        copied.synchronize()
        return bool(copy)

    return wait
