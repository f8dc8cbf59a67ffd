"""Histories of generated images."""

import math
import random

import pytest
import torch
from torch import Tensor

from srpkd.training.pools import KEEP_NEW, AnySizePool, FixedSizePool, ImagePool, draw

POOLS = (FixedSizePool, AnySizePool)


def numbered(first: int, count: int = 1) -> Tensor:
    """Images first, first + 1, ...: every pixel of an image is its number."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


def number(batch: Tensor) -> list[int]:
    return batch[:, 0, 0, 0].int().tolist()


def stored(pool: ImagePool) -> list[int]:
    return [int(image[0, 0, 0]) for image in pool.images]


def query(pool: ImagePool, images: Tensor, draws: list[int] | None = None, finite: bool = True) -> list[int]:
    draws = draw(pool.size, len(images)) if draws is None else draws
    return number(pool.query(images, torch.tensor(draws, dtype=torch.int64), torch.tensor(finite)))


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_first_stores_images(kind):
    pool = kind(3)
    assert [query(pool, numbered(i)) for i in range(3)] == [[0], [1], [2]]
    assert stored(pool) == [0, 1, 2]


@pytest.mark.parametrize("kind", POOLS)
def test_a_full_pool_swaps_the_drawn_image(kind):
    pool = kind(2)
    query(pool, numbered(0, 2))
    assert query(pool, numbered(2), [KEEP_NEW]) == [2]  # returned, not stored
    assert stored(pool) == [0, 1]
    assert query(pool, numbered(3), [1]) == [1]
    assert stored(pool) == [0, 3]
    assert query(pool, numbered(4, 2), [1, 1]) == [3, 4]  # the second image replaces the first
    assert stored(pool) == [0, 5]
    assert query(pool, numbered(6, 2), [0, KEEP_NEW]) == [0, 7]
    assert stored(pool) == [6, 5]


def test_draws_are_uniform_and_do_not_depend_on_the_pool():
    random.seed(0)
    draws = draw(3, 3000)
    assert len(draws) == 3000 and set(draws) == {KEEP_NEW, 0, 1, 2}
    assert abs(draws.count(KEEP_NEW) / 3000 - 1 / 2) < 4 * math.sqrt(1 / 4 / 3000)
    for index in range(3):
        assert abs(draws.count(index) / 3000 - 1 / 6) < 4 * math.sqrt(5 / 36 / 3000)


@pytest.mark.parametrize("kind", POOLS)
def test_a_batch_larger_than_the_pool(kind):
    pool = kind(2)
    assert query(pool, numbered(0, 5), [0, 0, 1, KEEP_NEW, 0]) == [0, 1, 1, 3, 0]
    assert stored(pool) == [4, 2]


@pytest.mark.parametrize("kind", POOLS)
def test_a_skipped_step_does_not_change_a_pool(kind):
    """Neither one that is being filled nor a full one."""
    pool, bad = kind(3), numbered(9, 2) * math.nan
    for draws in ([0, 1], [2, KEEP_NEW]):
        query(pool, numbered(0, 2), draws)
        before = stored(pool)
        query(pool, bad, [1, 2], finite=False)
        assert stored(pool) == before
    assert len(before) == 3


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("size", [1, 5])
def test_a_pool_detaches_and_keeps_its_images(kind, size):
    pool, batch = kind(size), numbered(0, 2).requires_grad_()
    made = batch * 1
    given = pool.query(made, torch.tensor(draw(size, 2), dtype=torch.int64), torch.tensor(True))
    assert not given.requires_grad
    given.add_(100)  # must not change the stored images
    assert set(stored(pool)) <= {0, 1}


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("count", [2, 4])
def test_restored_pools_continue_alike(kind, count):
    first, second = kind(4), kind(4)
    query(first, numbered(0, count))
    second.restore([image.clone() for image in first.images])
    for i in range(10, 40, 2):
        draws = draw(4, 2)
        assert query(first, numbered(i, 2), draws) == query(second, numbered(i, 2), draws)
    assert stored(first) == stored(second)


def test_images_of_different_sizes():
    pool = AnySizePool(1)
    large, small = torch.ones(1, 3, 4, 6), torch.zeros(1, 3, 2, 2)
    finite, swap = torch.tensor(True), torch.tensor([0])
    assert torch.equal(pool.query(large, swap, finite), large)
    assert torch.equal(pool.query(small, swap, finite), large)
    assert torch.equal(pool.query(large, swap, finite), small)
