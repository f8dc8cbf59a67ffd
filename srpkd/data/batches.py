"""Which images make up which batch, in an order that can be taken up again at any batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Draw = tuple[int, int]  # an item's index, and the seed of its random crop, flip and partner


class Batches(Sampler[list[Draw]]):
    """Batches without end, pass after pass over a data set, each pass in an order of its own.

    A batch follows from the seed and from its number alone: whatever came before it, in whichever process.

    Args:
        length: items of the data set; what does not fill a batch is left out of a pass.
        batch_size: items in a batch; of a smaller data set, all.
        seed: of the order, and of the items' own random numbers.
        shuffle: False keeps to the data set's order.
        start: the number of the first batch.
        rank, ranks: give the part of each batch that is process number `rank`'s, of `ranks`.

    ``len()`` is the number of batches in a pass.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, shuffle: bool, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.seed, self.shuffle, self.start = seed, shuffle, start
        self.part = slice(rank, None, ranks)

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        first, skipped = divmod(self.start, len(self))
        for number in itertools.count(first):
            order = self.order(number)
            for batch in range(skipped if number == first else 0, len(self)):
                indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(index, _seed(self.seed, number, index)) for index in indices[self.part]]

    def order(self, number: int) -> list[int]:
        """The items of a pass, in its order."""
        if not self.shuffle:
            return list(range(self.length))
        rng = torch.Generator().manual_seed(_seed(self.seed, number))
        return torch.randperm(self.length, generator=rng).tolist()


class Seeded(Dataset):
    """A data set by `Draw`: an item's random numbers come from its own seed, and leave torch's generator as it is."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Any:
        index, seed = draw
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(before)


def _seed(*numbers: int) -> int:
    """Numbers to one of 64 bits that is unlike that of their neighbours, on every machine."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(64)


def collate(items: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items {"A": (C, H, W), "B": ..., paths} -> {"A": (B, C, H, W), "B": ...}."""
    return {side: torch.stack([item[side] for item in items]) for side in ("A", "B")}


def sides(direction: str) -> tuple[str, str]:
    """Which side of a pair is a direction's input, and which its target."""
    return ("B", "A") if direction == "G_B" else ("A", "B")
