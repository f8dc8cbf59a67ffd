"""An oracle that shares nothing with srpkd: the relation loss by plain loops over NumPy arrays, as it is defined.

Its gradient is that of central differences. Which pixels are dead is settled once, before any difference is taken: the
convention is that no gradient runs through a dead pixel's own normalisation.
"""

from __future__ import annotations

from math import sqrt

import numpy as np


def dead_pixels(features: np.ndarray, normalize: str, eps: float) -> list[bool]:
    """Which of the pixels of one image (N, C) have a norm (cosine) or a row norm (row) of at most eps."""
    if normalize == "none":
        return [False] * len(features)
    return [norm <= eps for norm in _norms(features, normalize)]


def relation_matrix(features: np.ndarray, normalize: str, dead: list[bool]) -> list[list[float]]:
    """A_ij of one image (N, C)."""
    pixels = range(len(features))
    gram = [[_dot(features[i], features[j]) for j in pixels] for i in pixels]
    if normalize == "none":
        return gram
    norm = _norms(features, normalize)
    for i in pixels:
        for j in pixels:
            if dead[i] or (normalize == "cosine" and dead[j]):
                gram[i][j] = 0.0
            else:
                gram[i][j] /= norm[i] * (norm[j] if normalize == "cosine" else 1.0)
    return gram


def distance_of(difference: float, distance: str, delta: float) -> float:
    """rho(d)."""
    if distance == "l1":
        return abs(difference)
    if distance == "l2":
        return difference * difference
    if abs(difference) <= delta:
        return difference * difference / 2
    return delta * (abs(difference) - delta / 2)


def loss(
    student: np.ndarray,
    teacher: np.ndarray,
    normalize: str,
    distance: str,
    delta: float = 1.0,
    eps: float = 1e-12,
    dead: list[bool] | None = None,
) -> float:
    """The loss of one image from features (N, C_s) and (N, C_t); ``dead``: the student's dead pixels, if settled."""
    dead = dead_pixels(student, normalize, eps) if dead is None else dead
    ours = relation_matrix(student, normalize, dead)
    theirs = relation_matrix(teacher, normalize, dead_pixels(teacher, normalize, eps))
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            if normalize == "cosine" and i == j:
                continue  # a tie by convention
            total += distance_of(ours[i][j] - theirs[i][j], distance, delta)
    return total / len(student) ** 2


def gradient(
    student: np.ndarray,
    teacher: np.ndarray,
    normalize: str,
    distance: str,
    delta: float = 1.0,
    eps: float = 1e-12,
    step: float = 1e-6,
) -> np.ndarray:
    """dL/dQ_s (N, C_s) by central differences."""
    dead = dead_pixels(student, normalize, eps)
    result = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        values = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            values.append(loss(moved, teacher, normalize, distance, delta, eps, dead))
        result[index] = (values[0] - values[1]) / (2 * step)
    return result


def _dot(left: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(left, right):
        total += float(a) * float(b)
    return total


def _norms(features: np.ndarray, normalize: str) -> list[float]:
    """The norm of every pixel (cosine), or of every row of the Gram matrix (row)."""
    if normalize == "cosine":
        return [sqrt(_dot(q, q)) for q in features]
    norms = []
    for q in features:
        square = 0.0
        for other in features:
            square += _dot(q, other) ** 2
        norms.append(sqrt(square))
    return norms
