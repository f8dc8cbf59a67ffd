"""Checks that functions and commands share: an error says what was received, what was expected, and what to do."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch


def check_type(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError that says what was expected, unless value is of that kind."""
    if not isinstance(value, kind):
        received = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, received {received}")


def check_number(name: str, value: Any, least: float | None = None, above: float | None = None) -> None:
    """Raise a TypeError unless value is a number, a ValueError unless it is finite and not too small."""
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: expected a number{bound}, received {type(value).__name__}")
    # in comparisons alone, which torch.compile traces
    if (
        not -math.inf < value < math.inf
        or (least is not None and value < least)
        or (above is not None and value <= above)
    ):
        raise ValueError(f"{name}={value!r}: expected a finite number{bound}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise a TypeError unless value is a whole number, a ValueError unless it is large enough."""
    bound = "" if least is None else f" >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an integer{bound}, received {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value!r}: expected an integer{bound}")


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected cpu, cuda, cuda:1, ...") from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no data: expected cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs; --device cpu does without")
    return device


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# types of argparse


def device(text: str) -> str:
    """The name of a device that there is."""
    try:
        return str(check_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def number(text: str) -> float:
    """A finite number that is not negative."""
    try:
        check_number("number", value := float(text), least=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number of at least 0") from error
    return value


def json_file(text: str) -> str:
    """The name of a file of results: by its suffix it is none of the images or weights that a command reads."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a file that ends in .json")
    return text
