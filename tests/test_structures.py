"""Nested structures: paths of elements, descriptions, and moves to a device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
from torch import Tensor

from srpkd.distill_loop import _images_and_target
from srpkd.structures import describe, element, parse_path, tensors_in, to_device

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Sample:
    image: Tensor
    caption: str = "a"
    size: int = dataclasses.field(default=1, init=False)


class Indexed(OrderedDict):
    """A dict with fields and indices, like the outputs of transformers and diffusers."""

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("down_blocks.0", ("down_blocks.0", ())),
        ("down_blocks.0[0]", ("down_blocks.0", (0,))),
        ("encoder[-1][sample]", ("encoder", (-1, "sample"))),
        ("encoder['0'][\"a b\"]", ("encoder", ("0", "a b"))),
        ("[0]", ("", (0,))),
        ("encoder[]", ("encoder[]", ())),
        ("encoder[0", ("encoder[0", ())),
    ],
)
def test_parse_path(path, parts):
    assert parse_path(path) == parts


@pytest.mark.parametrize(
    ("value", "keys", "expected"),
    [
        ((1, 2), (-1,), 2),
        (Pair(1, 2), ("second",), 2),
        (Pair(1, 2), (1,), 2),
        ({"a": [1, 2]}, ("a", 1), 2),
        ({"0": 2}, (0,), 2),
        ({0: 2}, (0,), 2),
        (Indexed(a=1, b=2), (1,), 2),
        (Indexed(a=1, b=2), ("b",), 2),
        (Sample(torch.ones(1), "b"), ("caption",), "b"),
        (3, (), 3),
    ],
)
def test_element(value, keys, expected):
    assert element(value, keys) == expected


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ((1, 2), 2, r"no element \[2\] in a tuple \(int, int\)"),
        (Pair(1, 2), "third", "a Pair with the fields 'first', 'second'"),
        ({"a": 1}, "b", "a dict with the keys 'a'"),
        ({}, "b", "a dict without keys"),
        (torch.ones(2, 3), 0, r"a Tensor of shape \(2, 3\)"),
        ("text", 0, "a str"),
        (Sample(torch.ones(1)), "__class__", "a Sample with the fields 'image', 'caption', 'size'"),
        (None, 0, "a NoneType"),
    ],
)
def test_missing_element(value, key, message):
    with pytest.raises(LookupError, match=message):
        element(value, (key,))
    with pytest.raises(LookupError, match=rf"no element \[{key}\] in \[0\]\[outer\], a {type(value).__name__}"):
        element(({"outer": value},), (0, "outer", key))


def test_tensors_in_order():
    a, b, c, d = (torch.ones(size) for size in range(1, 5))
    found = list(tensors_in(((a, {"images": [b, "text", None]}), {"sample": Sample(c), "batch": UserDict(d=d)})))
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (a, b, c, d)]


def test_every_tensor_moves():
    meta, x = torch.device("meta"), torch.ones(2)
    batch = {"list": [x, "text", None], "pair": Pair(x, 3), "ordered": OrderedDict(a=x), "sample": Sample(x, "b")}
    moved = to_device(batch, meta)
    tensors = [moved["list"][0], moved["pair"].first, moved["ordered"]["a"], moved["sample"].image]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved["list"][1:] == ["text", None] and moved["pair"].second == 3 and moved["sample"].caption == "b"
    assert [type(value) for value in moved.values()] == [list, Pair, OrderedDict, Sample]
    assert not x.is_meta and batch["list"][0] is x
    assert to_device(defaultdict(list, a=x), meta)["a"].is_meta
    assert to_device(UserDict(a=x), meta)["a"].is_meta
    assert to_device(Indexed(a=x), meta).a.is_meta
    assert to_device(torch.nn.utils.rnn.pack_sequence([x]), meta).data.is_meta  # part of it stays on the CPU
    assert describe(to_device(torch.Tensor, meta)) == "_TensorMeta"


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_copies_that_may_not_be_complete(device, expected):
    """From a GPU, a copy that does not block is in memory that the GPU has not written yet."""

    class Recorded(torch.Tensor):
        def to(self, device, **options):  # type: ignore[override]
            calls.append((device.type, options["non_blocking"]))
            return self

    calls: list[tuple[str, bool]] = []
    images = torch.ones(1, 3, 2, 2).as_subclass(Recorded)
    to_device({"images": images}, torch.device(device))
    _images_and_target((images, images), torch.device(device))
    assert calls == 3 * [(device, expected)]
