"""Histories of generated images for discriminators, which see old ones half of the time.

After Shrivastava et al., *Learning from Simulated and Unsupervised Images through Adversarial Training*, 2017. The host
draws the random numbers of a step before the step starts, and a pool of images of one size works without the host: a
CUDA graph can contain it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

KEEP_NEW = -1  # a draw for an image that a full pool neither stores nor replaces


def draw(size: int, count: int) -> list[int]:
    """Return a draw for each of `count` images: the index of the stored image to swap with, or KEEP_NEW.

    A pool that is not full ignores it, so that the host does not have to know whether it is.

    Args:
        size: size of the pool, at least 1.
    """
    return [random.randrange(size) if random.random() < 0.5 else KEEP_NEW for _ in range(count)]


class ImagePool(ABC):
    """A history of generated images.

    Args:
        size: number of images to store, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def query(self, images: Tensor, draws: Tensor, finite: Tensor) -> Tensor:
        """Return as many images (B, C, H, W): each is the new one, or an old one that the new one replaces.

        Args:
            images: new images; the pool stores them until it is full.
            draws: what ``draw`` returned, int64 of shape (B,) on the device of the images.
            finite: bool of shape (); if False, the pool does not change.
        """

    @property
    @abstractmethod
    def images(self) -> Sequence[Tensor] | Tensor:
        """The stored images, each (C, H, W)."""

    @abstractmethod
    def restore(self, images: list[Tensor]) -> None:
        """Replace the stored images; they are on the device of the run."""


class FixedSizePool(ImagePool):
    """A pool in one tensor, of images of one size; ``query`` does not synchronise with the device."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._buffer = torch.empty(0)  # (size, C, H, W) from the first query on
        self._filled = torch.zeros((), dtype=torch.int64)

    def query(self, images: Tensor, draws: Tensor, finite: Tensor) -> Tensor:
        images = images.detach()
        if not self._buffer.numel():
            self._allocate(images)
        position = self._filled + torch.arange(len(images), device=images.device)
        is_full, swaps = position >= self.size, draws >= 0
        slots = torch.where(is_full, draws, position).clamp_(min=0)
        gives_old, stores_new = is_full & swaps, (~is_full | swaps) & finite
        chosen = []
        for number, new in enumerate(images.split(1)):
            slot = slots[number : number + 1]
            old = self._buffer.index_select(0, slot)
            chosen.append(torch.where(gives_old[number], old, new))
            self._buffer.index_copy_(0, slot, torch.where(stores_new[number], new, old))
        self._filled.add_(len(images) * finite).clamp_(max=self.size)
        return torch.cat(chosen)

    @property
    def images(self) -> Tensor:
        return self._buffer[: int(self._filled)]

    def restore(self, images: list[Tensor]) -> None:
        stored = torch.stack(images)
        self._allocate(stored)
        self._buffer[: len(stored)] = stored
        self._filled.fill_(len(stored))

    def _allocate(self, images: Tensor) -> None:
        self._buffer = images.new_zeros((self.size, *images.shape[1:]))
        self._filled = torch.zeros((), dtype=torch.int64, device=images.device)


class AnySizePool(ImagePool):
    """A pool of images of different sizes; ``query`` waits for the device."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._images: list[Tensor] = []

    def query(self, images: Tensor, draws: Tensor, finite: Tensor) -> Tensor:
        images = images.detach()
        if not finite:
            return images
        chosen = []
        for image, index in zip(images, draws.tolist()):
            if len(self._images) < self.size:
                self._images.append(image.clone())
            elif index != KEEP_NEW:
                image, self._images[index] = self._images[index], image.clone()
            chosen.append(image)
        return torch.stack(chosen)

    @property
    def images(self) -> list[Tensor]:
        return self._images

    def restore(self, images: list[Tensor]) -> None:
        self._images = images
