"""The two tasks: pix2pix (Isola et al. 2017) on pairs and CycleGAN (Zhu et al. 2017) on unpaired images.

Losses, their weights, and the order in which generators and discriminators are updated are those of the
public code, https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix. A *direction* of a task is a generator
to be distilled: "G" for pix2pix, "G_A" (A to B) and "G_B" (B to A) for CycleGAN.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..distiller import unwrapped
from ..models.networks import define_discriminator
from .distributed import wrap
from .optimizers import GuardedOptimizers, Losses
from .options import TrainConfig
from .student_teacher import StudentTeacher

GAN_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsgan": F.mse_loss,
    "vanilla": F.binary_cross_entropy_with_logits,
}


def gan_loss(prediction: Tensor, is_real: bool, mode: str) -> Tensor:
    """How far a discriminator's patch logits (B, 1, H, W) are from all real or all fake."""
    target = torch.ones_like if is_real else torch.zeros_like
    return GAN_MODES[mode](prediction, target(prediction))


class ImagePool:
    """A history of generated images: the discriminator sees an old one half of the time (Shrivastava et al. 2017).

    Args:
        size: how many images are kept; 0 gives every image back as it came.
    """

    def __init__(self, size: int) -> None:
        self.size, self.images = size, []

    def query(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> as many, each the new one or, swapped for it, one from the history."""
        chosen = []
        for image in images.detach() if self.size else ():
            if len(self.images) < self.size:
                self.images.append(image)
            elif random.random() < 0.5:
                place = random.randrange(self.size)
                image, self.images[place] = self.images[place], image
            chosen.append(image)
        return torch.stack(chosen) if chosen else images.detach()


def require_grad(networks: Iterable[nn.Module], value: bool) -> None:
    """Let the networks' parameters take gradients, or not."""
    for network in networks:
        network.requires_grad_(value)


class Pix2Pix:
    """GAN + lambda_L1 * L1 on pairs; the discriminator judges A and B joined, and is updated first.

    Args:
        config: options of the task.
        generators: {"G": module}, as ``parallel.wrap`` gave it.
        distillations: {"G": Distillation} of the same generator, or {} without a teacher.
    """

    directions = ("G",)

    def __init__(
        self, config: TrainConfig, generators: Mapping[str, nn.Module], distillations: Mapping[str, StudentTeacher]
    ) -> None:
        discriminators = {"D": config.input_nc + config.output_nc}
        _prepare(self, config, generators, distillations, discriminators)

    def step(self, batch: Mapping[str, Tensor]) -> Losses:
        """One update of D, then of G, on pairs {"A": (B, C, H, W), "B": ...}: the losses, detached."""
        config, updates, D = self.config, self.updates, self.networks["D"]
        real_A, real_B = batch["A"], batch["B"]
        with updates.autocast():
            fake_B, distilled = _generate(self, "G", real_A)
            require_grad([D], True)
            judged_fake = D(torch.cat((real_A, fake_B.detach()), 1))
            judged_real = D(torch.cat((real_A, real_B), 1))
            losses_D = {
                "D_fake": gan_loss(judged_fake, False, config.gan_mode),
                "D_real": gan_loss(judged_real, True, config.gan_mode),
            }
        if not updates.apply("D", {name: loss / 2 for name, loss in losses_D.items()}):
            return updates.finish(losses_D)

        with updates.autocast():
            require_grad([D], False)
            losses_G = {
                "G_GAN": gan_loss(D(torch.cat((real_A, fake_B), 1)), True, config.gan_mode),
                "G_L1": config.lambda_L1 * F.l1_loss(fake_B, real_B),
                **distilled,
            }
        updates.apply("G", losses_G)
        return updates.finish(losses_G | losses_D)


class CycleGAN:
    """GAN + cycle consistency + identity on unpaired images, both ways; the generators are updated first.

    Args:
        config: options of the task.
        generators: {"G_A": A to B, "G_B": B to A}, as ``parallel.wrap`` gave them.
        distillations: {"G_A": Distillation, "G_B": Distillation}: those directions that have a teacher.
    """

    directions = ("G_A", "G_B")

    def __init__(
        self, config: TrainConfig, generators: Mapping[str, nn.Module], distillations: Mapping[str, StudentTeacher]
    ) -> None:
        if config.lambda_identity > 0 and config.input_nc != config.output_nc:
            raise ValueError(
                f"lambda_identity={config.lambda_identity} needs images of equal channels on both sides, "
                f"not input_nc={config.input_nc} and output_nc={config.output_nc}: set lambda_identity to 0"
            )
        # as in the public code, D_A judges what G_A makes: images of B
        discriminators = {"D_A": config.output_nc, "D_B": config.input_nc}
        _prepare(self, config, generators, distillations, discriminators)
        self.pools = {name: ImagePool(config.pool_size) for name in discriminators}

    def step(self, batch: Mapping[str, Tensor]) -> Losses:
        """One update of both G, then of both D, on {"A": (B, C, H, W), "B": ...}: the losses, detached."""
        config, updates = self.config, self.updates
        G_A, G_B, D_A, D_B = (self.networks[name] for name in ("G_A", "G_B", "D_A", "D_B"))
        real_A, real_B = batch["A"], batch["B"]
        with updates.autocast():
            fake_B, distilled_A = _generate(self, "G_A", real_A)
            fake_A, distilled_B = _generate(self, "G_B", real_B)

            require_grad((D_A, D_B), False)
            losses_G = {
                "G_A": gan_loss(D_A(fake_B), True, config.gan_mode),
                "G_B": gan_loss(D_B(fake_A), True, config.gan_mode),
                "cycle_A": config.lambda_A * F.l1_loss(G_B(fake_B), real_A),
                "cycle_B": config.lambda_B * F.l1_loss(G_A(fake_A), real_B),
            }
            if config.lambda_identity > 0:
                # G_A maps into B, so it should leave an image of B as it is
                weight_A, weight_B = config.lambda_B * config.lambda_identity, config.lambda_A * config.lambda_identity
                losses_G["idt_A"] = weight_A * F.l1_loss(G_A(real_B), real_B)
                losses_G["idt_B"] = weight_B * F.l1_loss(G_B(real_A), real_A)
            losses_G |= {f"{name}_A": loss for name, loss in distilled_A.items()}
            losses_G |= {f"{name}_B": loss for name, loss in distilled_B.items()}
        if not updates.apply("G", losses_G):
            return updates.finish(losses_G)  # the pools shall not remember what came of it

        with updates.autocast():
            require_grad((D_A, D_B), True)
            losses_D = {}
            for name, D, real, fake in (("D_A", D_A, real_B, fake_B), ("D_B", D_B, real_A, fake_A)):
                judged_real, judged_fake = D(real), D(self.pools[name].query(fake))
                losses_D[name] = 0.5 * (
                    gan_loss(judged_real, True, config.gan_mode) + gan_loss(judged_fake, False, config.gan_mode)
                )
        updates.apply("D", losses_D)
        return updates.finish(losses_G | losses_D)


Objective = Pix2Pix | CycleGAN
OBJECTIVES: dict[str, type[Objective]] = {"pix2pix": Pix2Pix, "cycle_gan": CycleGAN}


def learning_rate_law(epoch: int, n_epochs: int, n_epochs_decay: int) -> float:
    """The factor of epoch 1, 2, ...: 1 for n_epochs epochs, then linearly towards 0 over n_epochs_decay more."""
    return 1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)


def state_of(objective: Objective) -> dict[str, Any]:
    """Networks, adapters, averages and optimizers: what all processes have alike."""
    return {
        "networks": {name: unwrapped(network).state_dict() for name, network in objective.networks.items()},
        "adapters": {name: _adapters(entry) for name, entry in objective.distillations.items()},
        "averages": {name: average.state_dict() for name, average in objective.averages.items()},
        "updates": objective.updates.state_dict(),
    }


def restore(objective: Objective, state: Mapping[str, Any]) -> None:
    """Undo ``state_of``."""
    for name, network in objective.networks.items():
        unwrapped(network).load_state_dict(state["networks"][name])
    for name, entry in objective.distillations.items():
        for adapter, weights in zip(entry.adapters, state["adapters"][name]):
            unwrapped(adapter).load_state_dict(weights)
    for name, average in objective.averages.items():
        average.load_state_dict(state["averages"][name])
    objective.updates.load_state_dict(state["updates"])


def _adapters(distillation: StudentTeacher) -> list[dict[str, Tensor]]:
    return [unwrapped(adapter).state_dict() for adapter in distillation.adapters]


def _prepare(
    objective: Objective,
    config: TrainConfig,
    generators: Mapping[str, nn.Module],
    distillations: Mapping[str, StudentTeacher],
    discriminators: Mapping[str, int],
) -> None:
    """What both tasks consist of: `networks` as training calls them, `generators` and `discriminators` themselves.

    Args:
        discriminators: name -> channels of the images that it judges.
    """
    objective.config, objective.distillations = config, dict(distillations)
    objective.networks = dict(generators) | {
        name: wrap(_discriminator(config, channels), config.compile) for name, channels in discriminators.items()
    }
    objective.generators = {name: unwrapped(objective.networks[name]) for name in generators}
    objective.discriminators = {name: unwrapped(objective.networks[name]) for name in discriminators}
    # one Adam for all generators (and their distillations' adapters), one for all discriminators
    adapters = [entry.adapters for entry in objective.distillations.values()]
    objective.updates = GuardedOptimizers(
        config,
        {"G": [*objective.generators.values(), *adapters], "D": objective.discriminators.values()},
    )
    objective.optimizers = objective.updates.optimizers
    objective.averages = {}
    if config.ema is not None:
        average = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        objective.averages = {name: average(network) for name, network in objective.generators.items()}
        for module in chain.from_iterable(network.modules() for network in objective.averages.values()):
            module._forward_hooks.clear()  # the taps are not for the copy


def _discriminator(config: TrainConfig, input_nc: int) -> nn.Module:
    network = define_discriminator(
        config.netD,
        input_nc,
        config.ndf,
        config.n_layers_D,
        config.norm,
        init_type=config.init_type,
        init_gain=config.init_gain,
    )
    return network.to(config.torch_device, memory_format=config.memory_format).train()


def _generate(objective: Objective, direction: str, images: Tensor) -> tuple[Tensor, Losses]:
    """The direction's output in float32, and what sets it apart from its teacher, if it has one."""
    distillation = objective.distillations.get(direction)
    if distillation is None:
        return objective.networks[direction](images).float(), {}
    output, losses = distillation(images)
    return output.float(), losses
