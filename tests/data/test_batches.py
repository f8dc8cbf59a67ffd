"""Batch sampler and seeded datasets."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from srpkd.data.batches import ResumableBatchSampler, SeededDataset


def take(count: int, *arguments, **keywords) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(ResumableBatchSampler(*arguments, **keywords), count))


def indices(batches: list[list[tuple[int, int]]]) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in batches]


def test_each_pass_has_another_order():
    batches = take(9, 6, 2, seed=1, shuffle=True)
    passes = [list(itertools.chain(*indices(batches[i : i + 3]))) for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(6)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert len({seed for batch in batches for _, seed in batch}) == 18
    assert indices(take(3, 6, 2, seed=2, shuffle=True)) != indices(batches[:3])


def test_without_shuffling_only_the_seeds_change():
    batches = take(4, 4, 2, seed=1, shuffle=False)
    assert indices(batches) == [[0, 1], [2, 3]] * 2
    assert batches[0] != batches[2]


@pytest.mark.parametrize(
    ("length", "size", "batches", "full"), [(7, 2, 3, 2), (3, 5, 1, 3), (4, 4, 1, 4), (1, 1, 1, 1)]
)
def test_incomplete_batches_are_dropped(length, size, batches, full):
    assert len(ResumableBatchSampler(length, size, 0, True)) == batches
    assert {len(batch) for batch in take(20, length, size, seed=0, shuffle=True)} == {full}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", range(8))
def test_the_order_can_be_resumed_at_any_batch(shuffle, start):
    assert take(5, 7, 2, 3, shuffle, start=start) == take(start + 5, 7, 2, 3, shuffle)[start:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_every_batch(world_size):
    parts = [take(8, 13, 6, 5, True, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *shares in zip(take(8, 13, 6, 5, True), *parts):
        assert all(len(share) == 6 // world_size for share in shares)
        assert sorted(itertools.chain(*shares)) == sorted(whole)


class Noise(Dataset):
    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(2)


def test_random_numbers_of_an_item_depend_only_on_its_seed():
    before = torch.get_rng_state()
    first, again, other, elsewhere = (SeededDataset(Noise())[draw] for draw in ((1, 2), (1, 2), (1, 3), (4, 2)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(elsewhere - first, torch.full((2,), 3.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_workers_give_the_same_batches(workers):
    def batches(workers: int) -> list[torch.Tensor]:
        loader = DataLoader(
            SeededDataset(Noise()),
            batch_sampler=ResumableBatchSampler(5, 2, seed=1, shuffle=True),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # other processes cannot import Noise
        )
        return list(itertools.islice(loader, 5))

    assert all(torch.equal(a, b) for a, b in zip(batches(workers), batches(0), strict=True))
