"""Sampled columns: which pairs of pixels an estimate of the loss relates.

The pixels of an image form sets of up to ROWS rows: set s of S has the rows s, s + S, s + 2 S and so on, spread over
the image. Each set draws m columns, and its rows are related to them and they to its rows. Every pair is drawn with the
same probability, independently of the features, so loss and gradient are unbiased. They vary less than with one draw
for all rows: the errors of the sets average out, and the sets that share a permutation have disjoint columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import Relation, has_float64

# More rows reuse the gathered columns more often, fewer rows average more draws.
ROWS = 128
# Random numbers that are sorted at a time: sorting holds 24 bytes for each.
SORTED_KEYS = 2**20
# The exact loss takes no longer than an estimate up to so many pixels, and up to this ratio of N to m, because it
# computes each Gram matrix up to the diagonal only.
EXACT_PIXELS, EXACT_RATIO = 256, 3
# From this ratio of m (3 C_s + C_t) to C (C + CLOSED_FORM_COPIES) on, with C = C_s + C_t, the exact l2 loss of
# closed_form takes no longer on a CPU: for each pixel it has C^2 products, and float64 copies of C channels.
CLOSED_FORM_OPERATIONS = {"row": 4, "cosine": 2.5, "none": 2.5}
CLOSED_FORM_COPIES = 100


def draw_columns(
    batch: int, pixels: int, columns: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Return the columns (B, S, m) of each set of rows, S = ceil(N / ROWS).

    N // m consecutive sets take their columns from one random permutation of the pixels, so these are disjoint.

    Args:
        batch, pixels: B, N.
        columns: m, at most N.
        generator: of ``device``; torch's default generator if None.

    Raises:
        ValueError: the generator is on another device.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device} and the features on {device}: expected "
            f"torch.Generator({device.type!r})"
        )
    sets = -(-pixels // ROWS)
    sets_per_permutation = pixels // columns
    permutations = -(-sets // sets_per_permutation)
    rows, length, part = batch * permutations, sets_per_permutation * columns, max(1, SORTED_KEYS // pixels)
    if rows <= part:  # without a loop, which torch.compile would unroll for each size of the batch
        order = _permutations(rows, pixels, device, generator)[:, :length]
    else:
        order = torch.empty(rows, length, dtype=torch.int64, device=device)
        for some in order.split(part):
            some.copy_(_permutations(len(some), pixels, device, generator)[:, :length])
    return order.reshape(batch, permutations * sets_per_permutation, columns)[:, :sets]


def _permutations(count: int, pixels: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return random permutations of the pixels (count, N)."""
    # in float64 ties, whose order would not be random, are improbable
    dtype = torch.float64 if has_float64(device) else torch.float32
    # torch.compile cannot trace torch.rand with a generator for symbolic sizes, nor torch.vmap uniform_
    if generator is None:
        keys = torch.rand(count, pixels, dtype=dtype, device=device)
    else:
        keys = torch.empty(count, pixels, dtype=dtype, device=device).uniform_(generator=generator)
    return keys.argsort(-1)


def exact_backend(
    backend: str, relation: Relation, device: torch.device, pixels: int, channels: tuple[int, int], columns: int
) -> str | None:
    """Return the backend that computes the exact loss in no more time than an estimate takes, or None.

    Args:
        backend: the requested one.
        pixels, channels: N, (C_s, C_t).
        columns: m.
    """
    norms_take_as_long = relation.normalize == "row" and pixels <= max(channels)  # those of rows
    if pixels <= EXACT_PIXELS or EXACT_RATIO * columns >= pixels or norms_take_as_long:
        return backend
    if backend != "auto" or relation.distance != "l2" or relation.rectify or not has_float64(device):
        return None
    operations = columns * (3 * channels[0] + channels[1])
    exact = CLOSED_FORM_OPERATIONS[relation.normalize] * sum(channels) * (sum(channels) + CLOSED_FORM_COPIES)
    return "closed_form" if operations >= exact else None
