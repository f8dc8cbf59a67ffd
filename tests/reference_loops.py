"""The relation loss by plain loops over NumPy arrays: an oracle that shares no code with srpkd.

The gradient is computed by central differences. Zero-norm pixels are found first: by convention
no gradient flows through the normalisation of a zero-norm pixel.
"""

from __future__ import annotations

from math import sqrt

import numpy as np


def zero_norm_pixels(features: np.ndarray, normalize: str, eps: float) -> list[bool]:
    """For each pixel of one image (N, C), whether its norm (cosine) or row norm (row) is at most eps."""
    if normalize == "none":
        return [False] * len(features)
    return [norm <= eps for norm in _norms(features, normalize)]


def relation_matrix(
    features: np.ndarray,
    normalize: str,
    zero_norm: list[bool],
    norms_of: np.ndarray | None = None,
    rectify: bool = False,
) -> list[list[float]]:
    """A_ij of one image (N, C); norms_of: the features whose norms divide, if they are others."""
    pixels = range(len(features))
    gram = [[_dot(features[i], features[j]) for j in pixels] for i in pixels]
    norm = _norms(features if norms_of is None else norms_of, normalize)
    for i in pixels:
        for j in pixels:
            if normalize != "none" and (zero_norm[i] or (normalize == "cosine" and zero_norm[j])):
                gram[i][j] = 0.0
            elif normalize != "none":
                gram[i][j] /= norm[i] * (norm[j] if normalize == "cosine" else 1.0)
            if rectify and gram[i][j] < 0:
                gram[i][j] = 0.0
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
    zero_norm: list[bool] | None = None,
    norms_of: np.ndarray | None = None,
    rectify: bool = False,
) -> float:
    """The loss of one image of features (N, C_s), (N, C_t).

    zero_norm: the student's zero-norm pixels, if given. norms_of: the features whose norms divide the student's, if
    they are others.
    """
    zero_norm = zero_norm_pixels(student, normalize, eps) if zero_norm is None else zero_norm
    ours = relation_matrix(student, normalize, zero_norm, norms_of, rectify)
    theirs = relation_matrix(teacher, normalize, zero_norm_pixels(teacher, normalize, eps), rectify=rectify)
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
    rectify: bool = False,
    detach_norms: bool = False,
) -> np.ndarray:
    """dL/dQ_s (N, C_s) by central differences."""
    norms_of = student if detach_norms else None
    zero_norm = zero_norm_pixels(student, normalize, eps)
    result = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        values = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            values.append(loss(moved, teacher, normalize, distance, delta, eps, zero_norm, norms_of, rectify))
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
