"""The machine code of the wgmma tiles in the installed extension: registers, spills and products. Needs no GPU."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import pytest
from compiled_kernels import Kernel, extension_with_cuda, kernels_in
from kernel_registers import highest_registers, unfenced_products, unordered_accesses

from srpkd.kernels import build

SOURCES = tuple(sorted(path.stem for path in (build.CSRC / "cuda" / "sm90").glob("*.cu")))
CONFIG = re.compile(r"ConfigINS0_\d+(\w+?)ELb(\d)ELb(\d)ELb(\d)ELb(\d)ELi(\d)E")
# bytes per thread: with a gradient, the elementwise part needs a few registers more than 208 per consumer. They spill
# outside the products, which stay asynchronous
MAX_SPILL = 40

pytestmark = pytest.mark.slow


class Config(NamedTuple):
    element: str
    pixels_adjacent: int
    symmetric: int
    l1: int
    grad: int
    terms: int


def configuration(symbol: str) -> Config:
    match = CONFIG.search(symbol)
    assert match, symbol
    return Config(match[1], *map(int, match.groups()[1:]))


def built(source: str) -> list[Kernel]:
    """Return the kernels for sm_90a; those for other architectures are empty."""
    found = [kernel for kernel in kernels_in(extension_with_cuda(), source) if kernel.architecture == "sm_90a"]
    if not found:
        pytest.skip("the extension is not built for 9.0a")
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.core(2)
def test_registers(source: str) -> None:
    """The launch has the registers that setmaxnreg hands out, and a warpgroup does not spill those of its role."""
    for kernel in built(source):
        config = configuration(kernel.symbol)
        assert kernel.stack <= MAX_SPILL * config.grad, config
        threads = 512 if config.grad else 384
        # with fewer, setmaxnreg.inc would wait forever; they are allocated in units of 8
        assert kernel.registers == 65536 // threads // 8 * 8, config
        limits = {0: kernel.registers} | {most: most for most in ((32, 208, 64) if config.grad else (24, 240))}
        found = highest_registers(kernel.listing)
        assert found.keys() == limits.keys(), config
        assert all(found[limit] < most for limit, most in limits.items()), (config, found)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.core(2)
def test_products(source: str) -> None:
    """The machine code has each product once, and waits for none before the next of the same sum is issued."""
    for kernel in built(source):
        config = configuration(kernel.symbol)
        words = Counter(kernel.words)
        type_ = "F32" if config.element == "Half" else "F32.BF16"
        # of two terms, all pairs but the product of both second terms
        pairs = config.terms * (config.terms + 1) // 2
        # groups of 64 channels: in two loops over the teacher's and two over the student's, and the last one
        assert words[f"HGMMA.64x128x16.{type_}"] == 5 * 4 * pairs
        # U of the rows, and of two halves of the columns, over 128 pixels
        assert words[f"HGMMA.64x64x16.{type_}"] == 3 * 8 * pairs * config.grad
        assert words["UTMALDG.3D"] > 0
        # ptxas serializes products (C7510) by waiting after each
        waits = "".join("w" if word.startswith("WARPGROUP.DEPBAR") else "p" for word in kernel.words if is_wgmma(word))
        assert all(len(products) >= 4 for products in re.findall("p+", waits)), config


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.core(2)
def test_registers_of_products(source: str) -> None:
    """Nothing accesses the registers of products between the fence before them and the wait for them."""
    for kernel in built(source):
        config = configuration(kernel.symbol)
        assert unordered_accesses(kernel.listing) == [], config
        assert unfenced_products(kernel.listing) == [], config


def is_wgmma(word: str) -> bool:
    return word.startswith(("HGMMA", "WARPGROUP.DEPBAR"))
