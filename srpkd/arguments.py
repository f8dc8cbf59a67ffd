"""Checks of arguments, and the parts of a command line that the commands share."""

from __future__ import annotations

import argparse
import errno
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .devices import gpu_count, is_out_of_memory
from .kernels.dispatch import check_choice as check_choice  # defined there because kernels import nothing of srpkd


def check_type(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError that says what was expected, unless value is an instance of `kind`."""
    if not isinstance(value, kind):
        received = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, received {received}")


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False, received {type(value).__name__}")


def check_number(name: str, value: Any, least: float | None = None, above: float | None = None) -> None:
    """Raise a TypeError unless value is a number, a ValueError unless it is finite, >= least and > above."""
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: expected a number{bound}, received {type(value).__name__}")
    # comparisons only: torch.compile can trace them, but not math.isfinite
    if (
        not -math.inf < value < math.inf
        or (least is not None and value < least)
        or (above is not None and value <= above)
    ):
        raise ValueError(f"{name}={value!r}: expected a finite number{bound}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise a TypeError unless value is an integer, a ValueError unless it is >= least."""
    bound = "" if least is None else f" >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an integer{bound}, received {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}={value!r}: expected an integer{bound}")


def check_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: the name is not a device, or this machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected cpu, cuda, cuda:1, ...") from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no data: expected cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= gpu_count():
        raise ValueError(f"device={name!r}: torch sees {gpu_count()} GPUs; or use --device cpu")
    if device.type not in ("cpu", "cuda"):
        check_usable(device)
    return device


def check_usable(device: torch.device) -> None:
    """Raise a ValueError if nothing runs on a device, such as a full GPU, or one that is too old for this torch."""
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # of many types: each kind of device has its own
        reason = first_line(error).partition(". ")[0]  # torch's own message lists all of its backends
        raise ValueError(f"device={str(device)!r}: torch cannot use it here ({reason}); use --device cpu") from error


# --- types for argparse ---


def device(text: str) -> str:
    """Return the name of a device that this machine has."""
    try:
        return str(check_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """Return an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def number(text: str) -> float:
    """Return a finite number >= 0."""
    try:
        check_number("number", value := float(text), least=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number of at least 0") from error
    return value


def json_file(text: str) -> str:
    """Return the name of an output file; the suffix protects images and weights from being overwritten."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file name that ends in .json")
    return text


# --- parts of a command ---


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Refuse ``--option=--``, from which argparse in Python 3.11 makes an empty list."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        if word.startswith("--") and word.endswith("=--"):
            parser.error(f"argument {word[:-3]}: expected a value, received '--'")
    return parser.parse_args(arguments)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device: by default the GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help="cpu, cuda, cuda:1, ... (default here: %(default)s)"
    )


def add_train_mode_norm(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the flag --train_mode_norm of commands that run a generator; ``default`` is the end of its help text."""
    parser.add_argument(
        "--train_mode_norm",
        action="store_true",
        help="let batch norms normalise each image by its own statistics, as pix2pix does, not by the running ones"
        + default,
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the next after a colon; or its type if it has none."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    following = next((line.strip() for line in others if line.strip()), "")
    return f"{first} {following}".strip() if first.endswith(":") else first


def system_reason(error: BaseException) -> str:
    """Return why the operating system did not let a file be read, or "" if the error is about the file's content.

    Damaged files make their readers raise an OSError without a number, or EINVAL for a position before the start.
    """
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
        return error.strerror
    return "it needs more memory than is free, or is damaged" if is_out_of_memory(error) else ""


def memory_message(error: BaseException, advice: str) -> str:
    """Return how a command ends whose memory does not suffice."""
    return f"error: {first_line(error)}\nThe memory does not suffice: {advice}"


def shorten(names: Sequence[str], limit: int = 10) -> str:
    """Return names as a list, at most `limit` of them."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def command_line(words: Sequence[str]) -> str:
    """Return a command as text that can be pasted into a terminal."""
    # in cmd.exe, which has no quotes but ", a path with a backslash must not be quoted as for a POSIX shell
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with status 1 and a short message if the block fails for a reason that a user can fix."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            sys.exit(memory_message(error, "free memory, or use smaller images or batches"))
        sys.exit(f"error: {error}")
