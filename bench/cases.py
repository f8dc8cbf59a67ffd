"""Benchmark cases: a sweep is a list of cases."""

from __future__ import annotations

import argparse
import itertools

import torch

from srpkd.arguments import number, positive
from srpkd.checking.cases import DTYPES, MODES, PRECISIONS, Case
from srpkd.kernels import DISTANCES, NORMALIZATIONS

PIXELS = (256, 1024, 4096, 16384, 65536)
CHANNELS = ((16, 64), (64, 256), (128, 256), (256, 256))
# each block is a product of axes around the defaults of Case; the most important blocks come first, for --minutes
SWEEPS: dict[str, list[dict[str, tuple]]] = {
    "quick": [{"pixels": (256, 1024, 2048, 4096)}],
    "table": [  # what the GPU check measures for the README's table, and more: twelve cases
        {"dtype": ("bfloat16",), "batch": (16, 1)},
        {"dtype": ("bfloat16",), "normalize": ("cosine",), "distance": ("l2",), "batch": (16, 1)},
        {"precision": ("high", "highest"), "batch": (16,)},
        {"pixels": (16384,), "dtype": ("bfloat16",)},
        {"dtype": ("bfloat16",), "normalize": ("cosine",), "batch": (16,)},
        {"precision": ("high",), "normalize": ("cosine",), "distance": ("l2",)},
        {"dtype": ("float16",), "batch": (16,)},
        {"precision": ("high",)},
        {"pixels": (65536,), "channels": ((64, 64),), "dtype": ("bfloat16",)},
    ],
    "full": [
        {"pixels": PIXELS[:4]},
        {"pixels": (65536,), "channels": ((64, 64),)},
        {"dtype": ("bfloat16", "float16", "float64")},
        {"precision": ("high", "medium")},
        {"channels": CHANNELS},
        {"normalize": NORMALIZATIONS, "distance": DISTANCES},
        {"batch": (1, 4, 16)},
        {"pixels": PIXELS[:4], "mode": ("forward",)},
        {"pixels": (65536,)},
        {"pixels": PIXELS[:4], "dtype": ("bfloat16",)},
        {"pixels": (65536,), "dtype": ("bfloat16",)},
        {"pixels": (1024,), "channels": CHANNELS},
        {"pixels": (1024,), "batch": (1, 4, 16)},
        {"pixels": PIXELS[:3], "batch": (4, 16), "normalize": ("cosine",), "distance": ("l2",)},
        # around the sizes from which on the O(N C^2) algorithm of l2 is faster
        {"pixels": PIXELS[:3], "channels": CHANNELS, "normalize": ("row", "cosine"), "distance": ("l2",)},
    ],
}


def sweep(name: str, device: str, overrides: dict[str, tuple]) -> list[Case]:
    """Return the cases of a named sweep without duplicates; ``overrides`` replaces the values of an axis."""
    cases = []
    for block in SWEEPS[name]:
        axes = block | overrides
        cases += [Case(**dict(zip(axes, values)), device=device) for values in itertools.product(*axes.values())]
    if device == "cpu":  # float32 precision only affects GPUs
        cases = [case for case in cases if case.precision == "highest" or "precision" in overrides]
    return list(dict.fromkeys(cases))


def matrix_bytes(case: Case) -> int:
    """Return the bytes of one N x N array per image, for all images."""
    return case.batch * case.pixels**2 * case.torch_dtype.itemsize


def operations(case: Case) -> int:
    """Return the minimum number of floating-point operations in matrix products, over all known algorithms.

    Tiles, the only way for l1 and huber: half of each Gram matrix, which is symmetric, and for the gradient the product
    of K with the student's features. l2 also has the C x C moments of both networks' channels together, of which one
    half is enough, and for the gradient two products with them. That is less if there are more pixels than channels.
    """
    (student, teacher), pixels = case.channels, case.pixels
    tiles = pixels**2 * (student + teacher + case.need_grad * 2 * student)
    if case.distance != "l2":
        return case.batch * tiles
    moments = pixels * (student + teacher) ** 2 + case.need_grad * 2 * pixels * student * (student + teacher)
    return case.batch * min(tiles, moments)


def bytes_moved(case: Case) -> int:
    """Return the minimum memory traffic: features are read once and the gradient is written once."""
    student, teacher = case.channels
    return case.batch * case.pixels * (student * (1 + case.need_grad) + teacher) * case.torch_dtype.itemsize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select cases."""
    parser.add_argument("--sweep", choices=SWEEPS, default="quick", help="set of cases (default: %(default)s)")
    add_device(parser)
    axes = parser.add_argument_group("axes", "values that replace those of the sweep")
    axes.add_argument("--pixels", type=positive, nargs="+", metavar="N")
    axes.add_argument("--channels", type=parse_channels, nargs="+", metavar="C_s/C_t")
    axes.add_argument("--batch", type=positive, nargs="+", metavar="B")
    axes.add_argument("--dtype", choices=DTYPES, nargs="+")
    axes.add_argument("--precision", choices=PRECISIONS, nargs="+")
    axes.add_argument("--normalize", choices=NORMALIZATIONS, nargs="+")
    axes.add_argument("--distance", choices=DISTANCES, nargs="+")
    axes.add_argument("--mode", choices=MODES, nargs="+")
    axes.add_argument("--threads", type=positive, nargs="+", metavar="T", help="CPU threads (default: as torch)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device, for ``device_of``."""
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")


def add_budget(parser: argparse.ArgumentParser, default: float, description: str) -> None:
    """Add the option --budget, for ``measure.interleaved``."""
    description += " (default: %(default)s)"
    parser.add_argument("--budget", type=number, default=default, metavar="SECONDS", help=description)


def selected(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select; raises as ``device_of``."""
    axes = ("pixels", "channels", "batch", "dtype", "precision", "normalize", "distance", "mode", "threads")
    overrides = {axis: tuple(values) for axis in axes if (values := getattr(options, axis))}
    overrides.setdefault("threads", (torch.get_num_threads(),))
    return sweep(options.sweep, device_of(options), overrides)


def device_of(options: argparse.Namespace) -> str:
    """Return the device of --device, by default the GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: expected cpu, or cuda if torch sees a GPU")
    return device


def parse_channels(text: str) -> tuple[int, int]:
    """Return (C_s, C_t) of a text such as 64/256."""
    student, slash, teacher = text.partition("/")
    if not (slash and student.isdecimal() and teacher.isdecimal() and int(student) and int(teacher)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the channels of student and teacher, such as 64/256")
    return int(student), int(teacher)
