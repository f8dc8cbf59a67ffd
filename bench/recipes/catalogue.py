"""What is measured for each recipe: the public code of a method, srpkd's loss of its page, and sizes of features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from srpkd.checking.gate import Result

from . import pages, published
from .pages import Loss


@dataclass(frozen=True)
class RecipeCase:
    """Features of given shapes, for the loss of a recipe.

    Large features contain copies of smaller ones, in random order. The mean over all pairs of copies is the mean over
    the pairs of the smaller features, so the loss and the gradient of these, which the public code computes in float64,
    give those of all copies.

    Attributes:
        recipe: a name from ``RECIPES``.
        words: what the features are.
        student, teacher: shapes, tokens (B, N, C) or maps (B, C, H, W).
        image_copies, pixel_copies: how often the features contain each image, and each pixel.
    """

    recipe: str
    words: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    image_copies: int = 1
    pixel_copies: int = 1

    @property
    def key(self) -> str:
        """The shapes as text, which identifies the case among those of its recipe."""
        return " / ".join("x".join(map(str, shape)) for shape in (self.student, self.teacher))

    @property
    def pixels(self) -> int:
        return self.student[1] if len(self.student) == 3 else math.prod(self.student[2:])

    def losses(self) -> dict[str, Loss]:
        """Return the public code's loss, and that of srpkd's page."""
        return {"usual": RECIPES[self.recipe].published, "srpkd": pages.loss_of(self.recipe)}

    def needed_bytes(self, provider: str) -> int:
        """Return the least size of the arrays that a provider stores at once, in float32."""
        return 4 * RECIPES[self.recipe].stored(self) if provider == "usual" else 0

    def features(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return random features of the student and the teacher, float32."""
        images, pixels = self._order()
        student, teacher = (
            self._shaped(distinct[images][:, pixels], shape).to(device)
            for distinct, shape in zip(self._distinct(), (self.student, self.teacher))
        )
        return student, teacher

    def expected(self) -> Result:
        """Return the loss of ``features`` in float64 and the gradient of the student's as (B, N, C), on the CPU."""
        student, teacher = (tokens.double() for tokens in self._distinct())
        if len(self.student) == 4:  # as maps that are one pixel wide
            student, teacher = student.mT.unsqueeze(3), teacher.mT.unsqueeze(3)
        value, gradient = value_and_gradient(RECIPES[self.recipe].published, student, teacher)
        images, pixels = self._order()
        return Result(value, as_tokens(gradient)[images][:, pixels] / (self.image_copies * self.pixel_copies))

    def _distinct(self) -> tuple[Tensor, Tensor]:
        """Return the features without copies, as tokens (B, N, C)."""
        generator = torch.Generator().manual_seed(0)
        images, pixels = self.student[0] // self.image_copies, self.pixels // self.pixel_copies
        channels = (shape[2] if len(shape) == 3 else shape[1] for shape in (self.student, self.teacher))
        student, teacher = (torch.randn(images, pixels, count, generator=generator) for count in channels)
        return student, teacher

    def _order(self) -> tuple[Tensor, Tensor]:
        """Return which distinct image, and which distinct pixel, each image and pixel is a copy of."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randperm(self.student[0], generator=generator) % (self.student[0] // self.image_copies)
        return images, torch.randperm(self.pixels, generator=generator) % (self.pixels // self.pixel_copies)

    @staticmethod
    def _shaped(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
        return tokens if len(shape) == 3 else tokens.mT.reshape(shape)


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a loss and the gradient of the student's features: the timed work."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def as_tokens(gradient: Tensor) -> Tensor:
    """Return the gradient of features (B, C, H, W) as (B, N, C); tokens are unchanged."""
    return gradient.flatten(2).mT if gradient.ndim == 4 else gradient


def matrices(number: int) -> Callable[[RecipeCase], int]:
    """Return the function that counts the elements of a number of N x N matrices per image."""
    return lambda case: number * case.student[0] * case.pixels**2


def products_of_channels(case: RecipeCase) -> int:
    """Return the elements of B x C x C x N products of patterns, and of their gradient."""
    return 2 * case.student[0] * max(case.student[1], case.teacher[1]) ** 2 * case.pixels


class Recipe(NamedTuple):
    """The loss as the public code of a method computes it, and the elements that it stores at once, as measured."""

    published: Loss
    stored: Callable[[RecipeCase], int]


RECIPES = {  # by the names of their pages
    "gram-anchoring": Recipe(published.gram_loss, matrices(3)),
    "batch-similarity": Recipe(published.similarity_preserving, lambda case: 3 * case.student[0] ** 2),
    "pairwise-segmentation": Recipe(published.pairwise, matrices(5)),
    "diffusion": Recipe(published.relations, matrices(3)),
    "super-resolution": Recipe(published.spatial_affinity, matrices(4)),
    "semantic-synthesis": Recipe(published.relations, matrices(3)),
    "nst": Recipe(published.neuron_selectivity_transfer, products_of_channels),
}
CASES = [
    RecipeCase("gram-anchoring", "ViT-S, patches of 16, 2 images of 512 px", (2, 1024, 384), (2, 1024, 384)),
    RecipeCase("gram-anchoring", "ViT-L, patches of 16, 1,024 px", (1, 4096, 1024), (1, 4096, 1024), 1, 4),
    RecipeCase("batch-similarity", "64 images, maps of 8 x 8", (64, 64, 8, 8), (64, 256, 8, 8)),
    RecipeCase("pairwise-segmentation", "maps of 64 x 64, 2 images", (2, 128, 64, 64), (2, 512, 64, 64), 1, 4),
    RecipeCase("diffusion", "UNet, latents of 64 x 64", (1, 160, 64, 64), (1, 320, 64, 64), 1, 4),
    RecipeCase("diffusion", "autoencoder, first block, 256 px", (1, 64, 256, 256), (1, 128, 256, 256), 1, 32),
    RecipeCase("super-resolution", "maps of 64 x 64", (1, 64, 64, 64), (1, 64, 64, 64), 1, 4),
    RecipeCase("super-resolution", "maps of 256 x 256", (1, 64, 256, 256), (1, 64, 256, 256), 1, 32),
    RecipeCase("semantic-synthesis", "pix2pixHD, last residual block", (1, 256, 32, 64), (1, 1024, 32, 64)),
    RecipeCase("semantic-synthesis", "SPADE, up_0", (1, 128, 64, 128), (1, 512, 64, 128), 1, 4),
    RecipeCase("nst", "maps of 16 x 16, 16 images", (16, 128, 16, 16), (16, 128, 16, 16), 8),
    RecipeCase("nst", "maps of 32 x 32, 64 images", (64, 256, 32, 32), (64, 256, 32, 32), 64),
]
