"""Levels of 8-bit and deeper images on common scales."""

import torch

from srpkd.data.levels import byte_levels, levels_to_255, unit_levels

BYTES = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)


def test_scales():
    deep = BYTES.double() * 257 / 65535
    assert torch.equal(unit_levels(BYTES), BYTES.double() / 255) and torch.equal(unit_levels(deep), deep)
    assert levels_to_255(BYTES) is BYTES and torch.allclose(levels_to_255(deep), BYTES.double())
    assert byte_levels(BYTES) is BYTES and torch.equal(byte_levels(deep), BYTES)
