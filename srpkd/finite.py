"""Checks that weights, features and outputs have no NaN and no infinite values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class NonFiniteError(ValueError):
    """An output of a network is NaN or infinite; the message says of what network and for which image."""


def describe_nonfinite(values: Tensor) -> str:
    """Return how many values of a tensor are NaN or infinite, such as "2 of 9 values are nan", or "" if none is."""
    if not (values.is_floating_point() or values.is_complex()):
        return ""
    values = values.detach()
    values = values.float() if values.element_size() < 2 else values  # isfinite of 8 bits is not implemented
    finite = values.isfinite()
    if finite.all():
        return ""
    bad = values[~finite]
    kinds = [kind for kind, found in (("nan", bad.isnan()), ("infinite", bad.isinf())) if found.any()]
    return f"{len(bad):,} of {values.numel():,} values are {' or '.join(kinds)}"


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Return the first tensor that is not finite, as "name (2 of 9 values are nan)", or "" if all are finite."""
    problems = ((name, describe_nonfinite(values)) for name, values in tensors.items())
    return next((f"{name} ({problem})" for name, problem in problems if problem), "")


def check_finite(output: Tensor, what: str, advice: str) -> None:
    """Raise a NonFiniteError if a network's output has a NaN or an infinite value.

    Args:
        output: of any shape.
        what: the output in words, the subject of the message.
        advice: what to do.
    """
    if problem := describe_nonfinite(output):
        raise NonFiniteError(f"{what} is not finite ({problem}): {advice}")
