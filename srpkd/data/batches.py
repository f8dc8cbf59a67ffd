"""Batches of a dataset, in an order that can be resumed at any batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from .images import DataError

# advice for errors of the processes that load images
IN_MAIN_PROCESS = "load the images in the main process by --num_threads 0, which may also change with --resume"

SeededIndex = tuple[int, int]  # an item's index, and the seed of its random crop, flip and partner


class ResumableBatchSampler(Sampler[list[SeededIndex]]):
    """Infinite batch sampler: pass after pass over a dataset, each in another order.

    A batch depends only on the seed and on its number, not on the batches before it or on the process.

    Args:
        length: items of the dataset; each pass drops the last incomplete batch.
        batch_size: items per batch, at most `length`.
        seed: of the order, and of the items' random numbers.
        shuffle: False keeps the dataset's order.
        start: number of the first batch.
        rank, world_size: yield only the items of this process, out of `world_size` processes.

    ``len()`` is the number of batches per pass.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.seed, self.shuffle, self.start = seed, shuffle, start
        self.part = slice(rank, None, world_size)

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        first_pass, skipped = divmod(self.start, len(self))
        for number in itertools.count(first_pass):
            order = self.order(number)
            for batch in range(skipped if number == first_pass else 0, len(self)):
                indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(index, _hash_seed(self.seed, number, index)) for index in indices[self.part]]

    def order(self, number: int) -> list[int]:
        """Return the indices of pass `number`, in its order."""
        if not self.shuffle:
            return list(range(self.length))
        rng = torch.Generator().manual_seed(_hash_seed(self.seed, number))
        return torch.randperm(self.length, generator=rng).tolist()


class SeededDataset(Dataset):
    """Dataset indexed by `SeededIndex`: an item's random numbers follow from its seed alone.

    The state of torch's default generator is restored after each item.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: SeededIndex) -> Any:
        index, seed = draw
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            return self.dataset[index]


def _hash_seed(*numbers: int) -> int:
    """Return a 64-bit seed that differs strongly between neighbouring numbers, the same on every machine."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(64)


def collate(items: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack items {"A": (C, H, W), "B": (C, H, W), ...} to a batch {"A": (B, C, H, W), "B": (B, C, H, W)}.

    Raises:
        DataError: shared memory, through which a process that loads images hands them over, is too small.
    """
    batch = {side: torch.stack([item[side] for item in items]) for side in ("A", "B")}
    if get_worker_info() is not None:
        try:
            for images in batch.values():
                images.share_memory_()  # otherwise a thread would do it, drop the batch, and the run would wait forever
        except RuntimeError as error:
            raise DataError(
                f"shared memory is too small for the images of a batch ({str(error).rpartition(': ')[2]}): make it "
                f"larger, in Docker by --shm-size=1g, or {IN_MAIN_PROCESS}"
            ) from error
    return batch


def sides(direction: str) -> tuple[str, str]:
    """Return the keys of a batch that are the input and the target of a generator, "G_A" or "G_B"."""
    return ("B", "A") if direction == "G_B" else ("A", "B")
