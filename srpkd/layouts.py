"""Layouts of features: their names, conversions between them, and the check for a layout that looks wrong."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Layout = Literal["nchw", "nlc", "nhwc"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# layout -> shape of a batch, shape without a batch
SHAPES: dict[Layout, tuple[str, str]] = {
    "nchw": ("(B, C, H, W)", "(C, H, W)"),
    "nlc": ("(B, N, C)", "(N, C)"),
    "nhwc": ("(B, H, W, C)", "(H, W, C)"),
}
NDIM: dict[Layout, int] = {"nchw": 4, "nlc": 3, "nhwc": 4}  # with a batch

# tokens of a vision transformer that are no patches: one class token, two (DeiT), four registers, or both (DINOv2)
EXTRA_TOKENS = (0, 1, 2, 4, 5)

EQUAL_TOKENS = (
    "tap layers of equal size; if there are class tokens, or if these are sequences (B, C, N), pass as loss a function "
    "that leaves them out or transposes them, and no layout, so that it receives the features as they are"
)


def channel_dim(layout: Layout) -> int:
    """Return the dimension of the channels, counted from the end."""
    return -3 if layout == "nchw" else -1


def pixel_count(shape: Sequence[int], layout: Layout) -> int:
    """Return N, the number of pixels or tokens of an image."""
    return shape[-2] if layout == "nlc" else shape[-1] * shape[-2] if layout == "nchw" else shape[-2] * shape[-3]


def check_dense(name: str, features: Tensor) -> None:
    """Raise a TypeError unless features are a plain dense tensor."""
    if type(features) is not Tensor and hasattr(features, "full_tensor"):  # without an import of torch's DTensor
        raise TypeError(
            f"{name} features are a DTensor: expected a plain tensor; call .full_tensor(), or .to_local() if the batch "
            "is sharded"
        )
    if features.is_nested:
        raise TypeError(
            f"{name} features are nested: expected a dense tensor; call .to_padded_tensor(0.0), or create the "
            "nn.TransformerEncoder with enable_nested_tensor=False"
        )
    if features.layout is not torch.strided:
        raise TypeError(f"{name} features are sparse or packed: expected a dense tensor; call .to_dense()")


def check_dimensions(student: Tensor, teacher: Tensor, layouts: tuple[Layout, Layout]) -> None:
    """Raise a ValueError unless both features have the number of dimensions of their layouts.

    Args:
        layouts: stated layouts of student and teacher.
    """
    if student.ndim != teacher.ndim and layouts[0] == layouts[1] and {student.ndim, teacher.ndim} == {3, 4}:
        of_map, flatten = ("nhwc", "flatten(1, 2)") if layouts[0] == "nhwc" else ("nchw", "flatten(2).mT")
        pair = tuple("nlc" if features.ndim == 3 else of_map for features in (student, teacher))
        tokens, image = ("student", "teacher") if student.ndim == 3 else ("teacher", "student")
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in the number of dimensions. If "
            f"the {tokens} has tokens (B, N, C), give RelationDistiller layout={pair}, or convert the {image}'s map "
            f"to tokens with features.{flatten}, for layout='nlc'"
        )
    for name, features, layout in zip(("student", "teacher"), (student, teacher), layouts):
        _check_ndim(name, features, layout)


def _check_ndim(name: str, features: Tensor, layout: Layout) -> None:
    """Raise a ValueError unless features have the number of dimensions of a layout, with or without a batch."""
    if features.ndim in (NDIM[layout], NDIM[layout] - 1):
        return
    fitting = [repr(other) for other in LAYOUTS if NDIM[other] == features.ndim]
    expected, single = SHAPES[layout]
    hint = f"; for this shape use layout={' or '.join(fitting)}" if fitting else ""
    if features.ndim == 2:
        hint = (
            "; vectors (B, C) have no pixels: tap a layer before the pixels are pooled, or relate the images of the "
            "batch with features.unsqueeze(1), layout='nlc' and scope='batch'"
        )
    if features.ndim > max(NDIM.values()):  # a video or a volume
        first = 2 if layout == "nchw" else 1
        hint = f"; for more dimensions flatten the positions with .flatten({first}, {first + features.ndim - 4})"
    raise ValueError(
        f"{name} features have shape {tuple(features.shape)}: layout={layout!r} expects {expected} or {single}{hint}"
    )


def convert(features: Tensor, layout: Layout, target: Layout, partner: Tensor, partner_layout: Layout) -> Tensor:
    """Return a view of features in another layout.

    Args:
        features: features in ``layout``, with or without a batch.
        layout: layout of the features.
        target: layout of the result.
        partner: the features that these are compared with. Their height and width are those of tokens that become a
            map; if they are tokens too, the map is one pixel wide.
        partner_layout: layout of the partner.

    Raises:
        ValueError: the tokens are not as many as the tokens of the partner, or the pixels of its map.
    """
    if layout == target:
        return features
    if layout == "nhwc":
        features = features.movedim(-1, -3)
    elif layout == "nlc":
        tokens = features.shape[-2]
        height, width = tokens, 1
        if partner_layout != "nlc":
            height, width = partner.shape[-2:] if partner_layout == "nchw" else partner.shape[-3:-1]
        elif partner.shape[-2] != tokens:
            raise ValueError(
                f"features of shape {tuple(features.shape)} and {tuple(partner.shape)} have {tokens} and "
                f"{partner.shape[-2]} tokens: {EQUAL_TOKENS}"
            )
        if height * width != tokens:
            raise ValueError(
                f"features of shape {tuple(features.shape)} have {tokens} tokens and a map {tuple(partner.shape)} has "
                f"{height} x {width} pixels: {EQUAL_TOKENS}"
            )
        features = features.transpose(-1, -2).unflatten(-1, (height, width))
    if target == "nhwc":
        return features.movedim(-3, -1)
    return features if target == "nchw" else features.flatten(-2).transpose(-1, -2)


def likely_layout(features: Tensor, layout: Layout, images: Sequence[int] | None = None) -> Layout | None:
    """Return another layout that the shape of features suggests, or None.

    A map has the aspect ratio of the images, or is taken to be square if these are not known. A number of channels is
    taken to be a multiple of 4 and at least 16. Tokens are as many as the pixels of a square map, with or without class
    and register tokens, or belong to a batch whose size is no usual number of channels.

    Args:
        images: shape (B, C, H, W) of the images from which a network computed the features.
    """
    if layout == "nlc" or features.ndim not in (3, 4):
        return None
    if images is not None and features.ndim == 4:
        other: Layout = "nhwc" if layout == "nchw" else "nchw"
        if _has_aspect(features, layout, images):
            return None
        if _has_aspect(features, other, images):
            return other if _is_usual_width(features.shape[channel_dim(other)]) else None
    if images is not None and features.ndim == 3 and features.shape[0] == images[0]:
        return "nlc"  # they have the batch of the images
    first, second, third = features.shape[-3:]
    if layout == "nchw" and first == second != third and _is_usual_width(third):
        return "nhwc"
    if layout == "nhwc" and second == third != first and _is_usual_width(first):
        return "nchw"
    if features.ndim == 4 or first == second or second == third or not _is_usual_width(third):
        return None
    return "nlc" if _is_token_count(second) or (layout == "nchw" and not _is_usual_width(first)) else None


def warn_if_unlikely(
    student: Tensor,
    teacher: Tensor,
    layouts: tuple[Layout, Layout],
    where: str = "",
    images: Sequence[int] | None = None,
) -> bool:
    """Warn if the features of both networks look like another layout than the one that is stated.

    Args:
        layouts: stated layouts of student and teacher.
        where: start of the warning, such as the names of the layers.
        images: shape (B, C, H, W) of the images from which the networks computed the features, if it is known.

    Returns:
        Whether it warned.
    """
    likely, *others = {_likely_shape(features, layout, images) for features, layout in zip((student, teacher), layouts)}
    if likely is None or others:
        return False
    stated = " and ".join(dict.fromkeys(SHAPES[layout][NDIM[layout] - student.ndim] for layout in layouts))
    warnings.warn(
        f"{where}features of shape {tuple(student.shape)} and {tuple(teacher.shape)} are read as {stated}, but look "
        f"like {likely}",
        stacklevel=3,
    )
    return True


def _likely_shape(features: Tensor, layout: Layout, images: Sequence[int] | None) -> str | None:
    """Return what features look like, if it is not the stated layout, and what to do."""
    if likely := likely_layout(features, layout, images):
        return f"{SHAPES[likely][NDIM[likely] - features.ndim]}: if they are, pass layout={likely!r}"
    if layout != "nlc" or images is None:
        return None
    if features.ndim == 2 and features.shape[0] == images[0]:
        return "(B, C), a vector for each image: if they are, tap a layer before the pixels are pooled"
    if features.ndim == 3 and features.shape[0] != images[0] == features.shape[1]:
        return "(N, B, C): if they are, pass a loss that transposes them with features.transpose(0, 1)"
    if features.ndim == 3 and (extra := _extra_tokens(features.shape[1], *images[-2:])):
        return (
            f"{features.shape[1] - extra} patches behind {extra} class or register tokens: if they are, pass a loss "
            f"that leaves these out with features[:, {extra}:]"
        )
    return None


@functools.lru_cache
def _extra_tokens(tokens: int, height: int, width: int) -> int:
    """Return the number of tokens before the patches of an image, if there are as many patches as fit into it, or 0."""
    grids = {(height // patch) * (width // patch) for patch in range(1, min(height, width) + 1)}
    return next((extra for extra in EXTRA_TOKENS if tokens - extra in grids), 0)


def _has_aspect(features: Tensor, layout: Layout, images: Sequence[int]) -> bool:
    """Return whether a map (B, C, H, W) or (B, H, W, C) has the images' aspect ratio, up to one pixel per side."""
    height, width = features.shape[2:] if layout == "nchw" else features.shape[1:3]
    return abs(height * images[-1] - width * images[-2]) <= images[-1] + images[-2]


def _is_usual_width(channels: int) -> bool:
    return channels >= 16 and channels % 4 == 0


def _is_token_count(count: int) -> bool:
    return count >= 49 and any(math.isqrt(count - extra) ** 2 == count - extra for extra in EXTRA_TOKENS)
