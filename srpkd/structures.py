"""Nested structures of tensors: elements by path, descriptions for error messages, moves to a device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .devices import may_copy_ahead

Keys = tuple[int | str, ...]
PATH = re.compile(r"(?P<name>.*?)(?P<keys>(\[[^\[\]]+\])+)")


def parse_path(path: str) -> tuple[str, Keys]:
    """Split a path such as "down_blocks.0[0]" into its name and keys: ("down_blocks.0", (0,)).

    A key is an index, or the name of a field or of a dict's entry, with or without quotes.
    """
    match = PATH.fullmatch(path)
    if match is None:
        return path, ()
    keys = re.findall(r"\[([^\[\]]+)\]", match["keys"])
    return match["name"], tuple(int(key) if re.fullmatch(r"-?\d+", key) else key.strip("\"'") for key in keys)


def element(value: Any, keys: Keys) -> Any:
    """Return an element of a nested structure of tuples, lists, dicts and objects with fields.

    Raises:
        LookupError: there is no such element; the message describes what is there.
    """
    for count, key in enumerate(keys):
        try:
            value = _element(value, key)
        except LookupError as error:
            outer = "".join(f"[{other}]" for other in keys[:count])
            raise LookupError(f"no element [{key}] in {outer and outer + ', '}a {describe(value)}") from error
    return value


def _element(value: Any, key: int | str) -> Any:
    """Return the element of one key; raise a LookupError if there is none."""
    if not isinstance(value, Tensor | str):
        # a dict may have the key "0"; transformers' ModelOutput has fields as keys, but indices too
        for candidate in (str(key), key) if isinstance(value, Mapping) else (key,):
            try:
                return value[candidate]
            except (LookupError, TypeError):
                pass
        if isinstance(key, str) and not key.startswith("_") and hasattr(value, key):
            return getattr(value, key)
    raise LookupError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested structure of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for part in value.values() for tensor in tensors_in(part))
    elif isinstance(value, tuple | list):
        yield from (tensor for part in value for tensor in tensors_in(part))
    else:
        yield from (tensor for field in _fields(value) for tensor in tensors_in(getattr(value, field.name, None)))


def describe(value: Any) -> str:
    """Return the type and the content of a structure in a few words: "tuple (Tensor, NoneType)"."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, value))}" if value else f"{kind} without keys"
    if isinstance(value, Tensor):
        return f"{kind} of shape {tuple(value.shape)}"
    fields = getattr(value, "_fields", None) or [field.name for field in _fields(value)]
    if fields:
        return f"{kind} with the fields {', '.join(map(repr, fields))}"
    if isinstance(value, tuple | list):
        return f"{kind} ({', '.join(type(part).__name__ for part in value)})"
    return kind


def to_device(value: Any, device: torch.device) -> Any:
    """Return a structure whose tensors are on a device; what is not a tensor stays as it is.

    Tuples, named tuples, lists, dicts and dataclasses are copied. An object with a method ``to``, such as the batch of
    a tokenizer, is moved by it.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=may_copy_ahead(device))
    if isinstance(value, type):
        return value
    if callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: to_device(part, device) for key, part in value.items()}
        return moved if type(value) is dict else _like(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    if fields := [field for field in _fields(value) if field.init]:
        return dataclasses.replace(
            value, **{field.name: to_device(getattr(value, field.name), device) for field in fields}
        )
    return value


def _like(mapping: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """Return the entries as a mapping of the same type, or as a dict if that type is not made from a dict."""
    try:
        return type(mapping)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else ()
