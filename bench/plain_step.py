"""Training steps in plain PyTorch, in the order of the public trainer's: what the trainer's steps are compared with.

They share only the networks with ``srpkd.training``. They have no teacher, no mixed precision, and no guard against
losses that are not finite. The public trainer: https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srpkd.training.options import ResolvedConfig

Networks = Mapping[str, nn.Module]
Step = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def plain_step(config: ResolvedConfig, generators: Networks, discriminators: Networks) -> Step:
    """Return a function that takes a training step on {"A": images (B, C, H, W), "B": images} and returns its losses.

    Args:
        config: options of the stage.
        generators: direction -> generator, which the steps train.
        discriminators: name -> discriminator, which the steps train.
    """
    make = {"pix2pix": _pix2pix, "cycle_gan": _cycle_gan}[config.model]
    return make(config, generators, discriminators)


def with_inplace_activations(network: nn.Module) -> nn.Module:
    """Return the network with the public code's activations, changed in place: they always work in place."""
    for parent in network.modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.LeakyReLU):
                setattr(parent, name, nn.LeakyReLU(module.negative_slope, inplace=True))
            elif isinstance(module, nn.ReLU):
                setattr(parent, name, nn.ReLU(inplace=True))
    return network


def _pix2pix(config: ResolvedConfig, generators: Networks, discriminators: Networks) -> Step:
    G, D = generators["G"], discriminators["D"]
    update_G, update_D = _optimizer(config, [G]), _optimizer(config, [D])

    def step(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real_A, real_B, losses = batch["A"], batch["B"], {}
        fake_B = G(real_A)
        D.requires_grad_(True)
        update_D.zero_grad()
        losses["D_fake"] = _gan_loss(config, D(torch.cat((real_A, fake_B.detach()), 1)), 0.0)
        losses["D_real"] = _gan_loss(config, D(torch.cat((real_A, real_B), 1)), 1.0)
        ((losses["D_fake"] + losses["D_real"]) * 0.5).backward()
        update_D.step()
        D.requires_grad_(False)
        update_G.zero_grad()
        losses["G_GAN"] = _gan_loss(config, D(torch.cat((real_A, fake_B), 1)), 1.0)
        losses["G_L1"] = F.l1_loss(fake_B, real_B) * config.lambda_L1
        (losses["G_GAN"] + losses["G_L1"]).backward()
        update_G.step()
        return losses

    return step


def _cycle_gan(config: ResolvedConfig, generators: Networks, discriminators: Networks) -> Step:
    G_A, G_B, D_A, D_B = generators["G_A"], generators["G_B"], discriminators["D_A"], discriminators["D_B"]
    update_G, update_D = _optimizer(config, [G_A, G_B]), _optimizer(config, [D_A, D_B])
    pools: dict[str, list[Tensor]] = {"D_A": [], "D_B": []}

    def step(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real_A, real_B, losses = batch["A"], batch["B"], {}
        fake_B, fake_A = G_A(real_A), G_B(real_B)
        rec_A, rec_B = G_B(fake_B), G_A(fake_A)
        for D in (D_A, D_B):
            D.requires_grad_(False)
        update_G.zero_grad()
        if config.lambda_identity > 0:
            losses["idt_A"] = F.l1_loss(G_A(real_B), real_B) * config.lambda_B * config.lambda_identity
            losses["idt_B"] = F.l1_loss(G_B(real_A), real_A) * config.lambda_A * config.lambda_identity
        losses["G_A"] = _gan_loss(config, D_A(fake_B), 1.0)
        losses["G_B"] = _gan_loss(config, D_B(fake_A), 1.0)
        losses["cycle_A"] = F.l1_loss(rec_A, real_A) * config.lambda_A
        losses["cycle_B"] = F.l1_loss(rec_B, real_B) * config.lambda_B
        sum(losses.values(), torch.zeros((), device=real_A.device)).backward()
        update_G.step()
        for D in (D_A, D_B):
            D.requires_grad_(True)
        update_D.zero_grad()
        for name, D, real, fake in (("D_A", D_A, real_B, fake_B), ("D_B", D_B, real_A, fake_A)):
            shown = _query(pools[name], config.pool_size, fake.detach())
            losses[name] = (_gan_loss(config, D(real), 1.0) + _gan_loss(config, D(shown), 0.0)) * 0.5
            losses[name].backward()
        update_D.step()
        return losses

    return step


def _optimizer(config: ResolvedConfig, networks: Iterable[nn.Module]) -> torch.optim.Adam:
    parameters = chain.from_iterable(network.parameters() for network in networks)
    return torch.optim.Adam(parameters, lr=config.lr, betas=(config.beta1, 0.999))


def _gan_loss(config: ResolvedConfig, prediction: Tensor, label: float) -> Tensor:
    target = torch.full_like(prediction, label)
    if config.gan_mode == "lsgan":
        return F.mse_loss(prediction, target)
    return F.binary_cross_entropy_with_logits(prediction, target)


def _query(stored: list[Tensor], size: int, images: Tensor) -> Tensor:
    """Return images from the history of a discriminator: each is the new one or, half of the time, an old one."""
    if not size:
        return images
    chosen = []
    for image in images.unbind():
        if len(stored) < size:
            stored.append(image)
        elif random.random() < 0.5:
            index = random.randrange(size)
            image, stored[index] = stored[index], image
        chosen.append(image)
    return torch.stack(chosen)
