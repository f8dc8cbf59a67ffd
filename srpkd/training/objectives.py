"""The two tasks: pix2pix (Isola et al. 2017) on pairs and CycleGAN (Zhu et al. 2017) on unpaired images.

Losses, weights and the order of generator and discriminator updates are those of the public code,
https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix. A *direction* of a task is one generator: "G" for pix2pix,
"G_A" (A to B) and "G_B" (B to A) for CycleGAN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..devices import may_copy_ahead
from ..finite import first_nonfinite
from ..models.networks import define_discriminator
from ..taps import remove_hooks, unwrap
from . import distributed
from .datasets import has_one_size
from .distributed import wrap
from .optimizers import GuardedOptimizers, Losses
from .options import ResolvedConfig
from .pools import AnySizePool, FixedSizePool, ImagePool, draw
from .student_teacher import StudentTeacher

GAN_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsgan": F.mse_loss,
    "vanilla": F.binary_cross_entropy_with_logits,
}


def gan_loss(prediction: Tensor, is_real: bool, mode: str) -> Tensor:
    """Return the GAN loss of a discriminator's patch logits (B, 1, H, W) for the target "real" or "fake"."""
    target = torch.ones_like if is_real else torch.zeros_like
    return GAN_MODES[mode](prediction, target(prediction))


class Objective(ABC):
    """Networks, losses and optimizers of a task.

    Args:
        config: options of the stage.
        generators: direction -> generator, as ``distributed.wrap`` returns it.
        student_teachers: direction -> the same generator with its teacher; directions without a teacher are missing.

    Attributes:
        networks: name -> generator or discriminator, as ``distributed.wrap`` returns it: use these for training.
        generators: direction -> the generator inside the wrappers.
        discriminators: name -> the discriminator inside the wrappers.
        optimizers: one optimizer "G" for all generators and adapters, one "D" for all discriminators.
        averages: direction -> moving average of the generator; {} unless the option `ema` is set.
        pools: name -> image pool of the discriminator; {} for pix2pix, which has none.
        nonfinite_source: after a skipped step, what was not finite before the first such loss, in words, or "".
        run_step: a ``StaticStep`` of ``take_step``, to use in its place, or None.
    """

    directions: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        config: ResolvedConfig,
        generators: Mapping[str, nn.Module],
        student_teachers: Mapping[str, StudentTeacher],
    ) -> None:
        self.config = config
        self.student_teachers = dict(student_teachers)
        discriminators = {
            name: wrap(_make_discriminator(config, channels), config.compile, dynamic=dynamic_shapes(config))
            for name, channels in self.discriminator_channels(config).items()
        }
        self.networks = {**generators, **discriminators}
        self.generators = {name: unwrap(network) for name, network in generators.items()}
        self.discriminators = {name: unwrap(network) for name, network in discriminators.items()}
        adapters = [pair.adapters for pair in self.student_teachers.values()]
        self.optimizers = GuardedOptimizers(
            config, {"G": [*self.generators.values(), *adapters], "D": self.discriminators.values()}
        )
        self.nonfinite_source = ""
        self.run_step: Callable[[Mapping[str, Tensor]], Losses] | None = None
        self._inputs: Mapping[str, Tensor] = {}  # of the last step
        self._outputs: dict[str, Tensor] = {}  # direction -> output of the generator in the last step
        self.pools: dict[str, ImagePool] = {}
        self.averages: dict[str, AveragedModel] = {}
        if config.ema is not None:
            self.averages = {
                name: AveragedModel(network, config.torch_device) for name, network in self.generators.items()
            }
        for copied in self.averages.values():
            remove_hooks(copied)  # the copies include the feature taps

    @classmethod
    @abstractmethod
    def discriminator_channels(cls, config: ResolvedConfig) -> dict[str, int]:
        """Return name -> number of input channels of each discriminator."""

    @abstractmethod
    def update_networks(self, inputs: Mapping[str, Tensor]) -> Losses:
        """Compute the losses and step the optimizers; return the losses.

        Args:
            inputs: the batch, and what ``draw`` returned, on the device of the run.
        """

    def draw(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the random numbers that the host draws for a step, as CPU tensors by name."""
        return {}

    def step(self, batch: Mapping[str, Tensor]) -> Losses:
        """Take a training step on {"A": images (B, C, H, W), "B": images (B, C', H, W)}.

        On a GPU, the host does not wait for it.

        Returns:
            The weighted losses by name, detached. The next step may overwrite them.
        """
        device, drawn = self.config.torch_device, self.draw(batch)
        ahead = may_copy_ahead(device)
        if ahead:  # a copy from pageable memory may wait for the GPU
            drawn = {name: values.pin_memory() for name, values in drawn.items()}
        drawn = {name: values.to(device, non_blocking=ahead) for name, values in drawn.items()}
        return (self.run_step or self.take_step)({**batch, **drawn})

    def take_step(self, inputs: Mapping[str, Tensor]) -> Losses:
        """Take a training step without waiting for the device: a CUDA graph can contain it.

        Args:
            inputs: the batch, and what ``draw`` returned, on the device of the run.
        """
        self._inputs = inputs
        self.optimizers.begin()
        losses = self.update_networks(inputs)
        self.optimizers.finish()
        self._update_averages()
        return {name: loss.detach() for name, loss in losses.items()}

    def references(self) -> Callable[[], None]:
        """Return a function that assigns again what the last step assigned for ``find_nonfinite``."""
        inputs, outputs, losses = self._inputs, dict(self._outputs), self.optimizers.losses
        passes = [(pair, pair.last_pass) for pair in self.student_teachers.values()]

        def assign() -> None:
            self._inputs, self._outputs, self.optimizers.losses = inputs, dict(outputs), losses
            for pair, last_pass in passes:
                pair.last_pass = last_pass

        return assign

    def find_nonfinite(self) -> None:
        """If the last step was skipped, find its first non-finite loss, and what was not finite before it.

        Call it between steps, on all ranks together. It waits for the device. The first result remains until a step is
        complete.
        """
        known = self.optimizers.nonfinite_loss
        self.optimizers.find_nonfinite_loss()
        if self.optimizers.nonfinite_loss and not known:
            sources = distributed.all_gather_object(self._find_nonfinite_source())
            self.nonfinite_source = next(filter(None, sources), "")

    @torch.no_grad()
    def _update_averages(self) -> None:
        """Move the averages towards the generators, unless the step was skipped. The first step replaces them."""
        if self.config.ema is None:
            return
        finite = self.optimizers.finite
        for name, average in self.averages.items():
            generator, is_first = self.generators[name], average.n_averaged == 0
            weight = torch.where(is_first, 1.0, 1.0 - self.config.ema) * finite
            kept, live = (
                [value for value in chain(network.parameters(), network.buffers()) if value.is_floating_point()]
                for network in (average.module, generator)
            )
            differences = torch._foreach_sub(live, kept)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(kept, differences)
            for kept_count, count in zip(average.module.buffers(), generator.buffers(), strict=True):
                if not count.is_floating_point():
                    kept_count.copy_(count)
            average.n_averaged.add_(finite)

    def ema_or_live(self) -> dict[str, nn.Module]:
        """Return the generators that a stage saves and evaluates: the moving averages if there are any."""
        return self.generators | {name: average.module for name, average in self.averages.items()}

    def adapter_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return direction -> ``StudentTeacher.adapter_weights``, without directions that have none."""
        weights = {direction: pair.adapter_weights() for direction, pair in self.student_teachers.items()}
        return {direction: adapters for direction, adapters in weights.items() if adapters}

    def can_resume(self) -> bool:
        """Return whether training can continue from here: the last step was complete, all weights are finite."""
        return not (self.optimizers.consecutive_skips or self.nonfinite_weights())

    def nonfinite_weights(self) -> str:
        """Return the first parameter of the networks that is not finite, in words, or "" if all are finite."""
        return first_nonfinite(
            {
                f"the weights {key} of {name}": value
                for name, network in self.networks.items()
                for key, value in unwrap(network).named_parameters()
            }
        )

    def _find_nonfinite_source(self) -> str:
        """Return what was not finite first on this rank in the last step, in words, or "" if only a loss was not."""
        pairs = self.student_teachers.items()
        found = (
            first_nonfinite({f"the images of {side}": self._inputs[side] for side in "AB"}),
            self.nonfinite_weights(),
            *(f"{source} of {direction}" for direction, pair in pairs if (source := pair.nonfinite_source())),
            first_nonfinite({f"the output of {direction}": output for direction, output in self._outputs.items()}),
        )
        return next(filter(None, found), "")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all ranks share: networks, adapters, averages and optimizers."""
        return {
            "networks": {name: unwrap(network).state_dict() for name, network in self.networks.items()},
            "adapters": {
                name: [unwrap(adapter).state_dict() for adapter in pair.adapters]
                for name, pair in self.student_teachers.items()
            },
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "updates": self.optimizers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        for name, network in self.networks.items():
            unwrap(network).load_state_dict(state["networks"][name])
        for name, pair in self.student_teachers.items():
            for adapter, weights in zip(pair.adapters, state["adapters"][name]):
                unwrap(adapter).load_state_dict(weights)
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.optimizers.load_state_dict(state["updates"])

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the state of this rank alone: the image pools."""
        # copies: a view would be saved with all of its storage
        pools = {name: [image.cpu().clone() for image in pool.images] for name, pool in self.pools.items()}
        return {"pools": {name: images for name, images in pools.items() if images}}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``rank_state_dict`` returned on this rank."""
        for name, images in state["pools"].items():
            self.pools[name].restore([image.to(self.config.torch_device) for image in images])

    def close(self) -> None:
        """Remove the hooks from the generators and their teachers, and free a CUDA graph."""
        self.run_step = None
        for pair in self.student_teachers.values():
            pair.close()

    def generate(self, direction: str, images: Tensor, others: Tensor | None = None) -> tuple[list[Tensor], Losses]:
        """Run a generator, and its teacher if there is one.

        Args:
            images: inputs (B, C, H, W) of generator and teacher.
            others: inputs (B, C, H, W) of the generator alone.

        Returns:
            The generator's outputs for both inputs, in float32 at least, and the distillation losses for the first.
        """
        network, losses = self.networks[direction], {}
        joined = others if others is not None and self._can_join(images, others) else None
        if direction in self.student_teachers:
            output, losses = self.student_teachers[direction](images, joined)
        else:
            output = network(images if joined is None else torch.cat((images, joined)))
        outputs = list(output.split(len(images)))
        if others is not None and joined is None:
            outputs.append(network(others))
        self._outputs[direction] = outputs[0].detach()
        return [output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs], losses

    def judge(self, name: str, *groups: Tensor) -> list[Tensor]:
        """Return a discriminator's logits for each group of images (B, C, H, W)."""
        network = self.networks[name]
        if self._can_join(*groups):
            return list(network(torch.cat(groups)).split(len(groups[0])))
        return [network(images) for images in groups]

    def _can_join(self, *groups: Tensor) -> bool:
        """Return whether one pass on all images is that of each group: batch norm would use statistics of all."""
        return self.config.norm == "instance" and len({images.shape for images in groups}) == 1


class Pix2Pix(Objective):
    """GAN + lambda_L1 * L1 on pairs. The discriminator judges A and B concatenated, and is updated first."""

    directions = ("G",)

    @classmethod
    def discriminator_channels(cls, config: ResolvedConfig) -> dict[str, int]:
        return {"D": config.input_nc + config.output_nc}

    def update_networks(self, inputs: Mapping[str, Tensor]) -> Losses:
        config, optimizers, D = self.config, self.optimizers, self.networks["D"]
        real_A, real_B = inputs["A"], inputs["B"]
        with optimizers.autocast():
            (fake_B,), distillation_losses = self.generate("G", real_A)
            require_grad([D], True)
            prediction_fake, prediction_real = self.judge(
                "D", torch.cat((real_A, fake_B.detach()), 1), torch.cat((real_A, real_B), 1)
            )
            losses_D = {
                "D_fake": gan_loss(prediction_fake, False, config.gan_mode),
                "D_real": gan_loss(prediction_real, True, config.gan_mode),
            }
        optimizers.step("D", {name: loss / 2 for name, loss in losses_D.items()})

        with optimizers.autocast():
            require_grad([D], False)
            losses_G = {
                "G_GAN": gan_loss(D(torch.cat((real_A, fake_B), 1)), True, config.gan_mode),
                "G_L1": config.lambda_L1 * F.l1_loss(fake_B, real_B),
                **distillation_losses,
            }
        optimizers.step("G", losses_G)
        return losses_G | losses_D


class CycleGAN(Objective):
    """GAN + cycle consistency + identity on unpaired images in both directions. The generators are updated first.

    Raises:
        ValueError: the identity loss has a weight, and the two sides differ in channels.
    """

    directions = ("G_A", "G_B")

    def __init__(
        self,
        config: ResolvedConfig,
        generators: Mapping[str, nn.Module],
        student_teachers: Mapping[str, StudentTeacher],
    ) -> None:
        if config.lambda_identity > 0 and config.input_nc != config.output_nc:
            raise ValueError(
                f"lambda_identity={config.lambda_identity} needs images of equal channels on both sides, "
                f"not input_nc={config.input_nc} and output_nc={config.output_nc}: set lambda_identity to 0"
            )
        super().__init__(config, generators, student_teachers)
        pool = FixedSizePool if has_one_size(config) else AnySizePool
        self.pools = {name: pool(config.pool_size) for name in self.discriminators}

    @classmethod
    def discriminator_channels(cls, config: ResolvedConfig) -> dict[str, int]:
        # as in the public code, D_A judges the outputs of G_A: images of B
        return {"D_A": config.output_nc, "D_B": config.input_nc}

    def draw(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not (size := self.config.pool_size):
            return {}
        return {"draws": torch.tensor([draw(size, len(batch["A"])) for _ in self.pools], dtype=torch.int64)}

    def update_networks(self, inputs: Mapping[str, Tensor]) -> Losses:
        config, optimizers = self.config, self.optimizers
        G_A, G_B, D_A, D_B = (self.networks[name] for name in ("G_A", "G_B", "D_A", "D_B"))
        real_A, real_B = inputs["A"], inputs["B"]
        keeps_identity = config.lambda_identity > 0
        with optimizers.autocast():
            # G_A maps to B, so it should not change an image of B
            outputs_A, distillation_losses_A = self.generate("G_A", real_A, real_B if keeps_identity else None)
            outputs_B, distillation_losses_B = self.generate("G_B", real_B, real_A if keeps_identity else None)
            fake_B, fake_A = outputs_A[0], outputs_B[0]

            require_grad((D_A, D_B), False)
            losses_G = {
                "G_A": gan_loss(D_A(fake_B), True, config.gan_mode),
                "G_B": gan_loss(D_B(fake_A), True, config.gan_mode),
                "cycle_A": config.lambda_A * F.l1_loss(G_B(fake_B), real_A),
                "cycle_B": config.lambda_B * F.l1_loss(G_A(fake_A), real_B),
            }
            if keeps_identity:
                weight_A, weight_B = config.lambda_B * config.lambda_identity, config.lambda_A * config.lambda_identity
                losses_G["idt_A"] = weight_A * F.l1_loss(outputs_A[1], real_B)
                losses_G["idt_B"] = weight_B * F.l1_loss(outputs_B[1], real_A)
            losses_G |= {f"{name}_A": loss for name, loss in distillation_losses_A.items()}
            losses_G |= {f"{name}_B": loss for name, loss in distillation_losses_B.items()}
        optimizers.step("G", losses_G)

        with optimizers.autocast():
            require_grad((D_A, D_B), True)
            losses_D = {}
            sides = (("D_A", real_B, fake_B), ("D_B", real_A, fake_A))
            for number, (name, real, fake) in enumerate(sides):
                shown = fake.detach()
                if "draws" in inputs:
                    shown = self.pools[name].query(fake, inputs["draws"][number], optimizers.finite)
                prediction_real, prediction_fake = self.judge(name, real, shown)
                losses_D[name] = 0.5 * (
                    gan_loss(prediction_real, True, config.gan_mode) + gan_loss(prediction_fake, False, config.gan_mode)
                )
        optimizers.step("D", losses_D)
        return losses_G | losses_D


OBJECTIVES: dict[str, type[Objective]] = {"pix2pix": Pix2Pix, "cycle_gan": CycleGAN}


def lr_factor(epoch: int, n_epochs: int, n_epochs_decay: int) -> float:
    """Return the learning rate factor of epoch 1, 2, ...: 1 for n_epochs, then linear decay over n_epochs_decay.

    It is that of the public code, where the learning rate changes at the end of an epoch. In later versions of it, it
    changes at the start: each factor comes an epoch earlier, and the last epoch has the factor 0.
    """
    return 1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)


def require_grad(networks: Iterable[nn.Module], value: bool) -> None:
    """Set whether the parameters of several networks require gradients."""
    for network in networks:
        network.requires_grad_(value)


def dynamic_shapes(config: ResolvedConfig) -> bool | None:
    """Return what torch.compile should assume of shapes: images of one size come in two sizes of batches."""
    return False if has_one_size(config) else None


def to_device(network: nn.Module, config: ResolvedConfig) -> nn.Module:
    """Move a network to the device and memory format of the run."""
    return network.to(config.torch_device).to(memory_format=config.memory_format)


def _make_discriminator(config: ResolvedConfig, input_nc: int) -> nn.Module:
    network = define_discriminator(
        config.netD,
        input_nc,
        config.ndf,
        config.n_layers_D,
        config.norm,
        init_type=config.init_type,
        init_gain=config.init_gain,
    )
    return to_device(network, config).train()
