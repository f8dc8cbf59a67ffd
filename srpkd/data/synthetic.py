"""Generated worlds: small paired data sets that need no download.

A scene is a patchwork of six classes, seen twice: as a *label map* (one palette colour per class) and as a
*photo*. In the photo the classes form three pairs of twins: the two of a pair have the same mean colour and
the same contrast and differ only in their texture, under a light, a tint and a noise that change from image
to image. So the colour of a pixel cannot tell its class (at best it leaves two to choose from): a generator
has to relate the pixel to those around it.

    python -m srpkd.data.synthetic OUT --layout aligned      # the same as folders of PNG files
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import check_type, check_whole, positive
from ..metrics.pixels import nearest_colour

# (6, 3) uint8, RGB: what each class is painted with in a label map; no two are closer than 100 levels
PALETTE = torch.tensor(
    [[220, 50, 47], [60, 170, 75], [40, 90, 200], [250, 215, 60], [70, 205, 225], [200, 80, 205]],
    dtype=torch.uint8,
)
CLASSES = len(PALETTE)


@dataclass(frozen=True)
class SyntheticScenes:
    """P scenes. `world[:12]` is a world of its first twelve.

    photos: (P, 3, H, W) float32 in [-1, 1]
    classes: (P, H, W) int64 in 0..5
    labels: (P, 3, H, W) float32 in [-1, 1], the classes in the colours of `PALETTE`
    """

    photos: Tensor
    classes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, part: slice) -> SyntheticScenes:
        if not isinstance(part, slice):
            raise TypeError(f"SyntheticScenes take slices, such as scenes[:12]; received {part!r}")
        return SyntheticScenes(self.photos[part], self.classes[part], self.labels[part])


class Texture(NamedTuple):
    """A zero-mean pattern of unit variance: `waves` plane waves in evenly spread directions, each with a
    phase of its own. One wave makes stripes, two make a weave of checks, seven make speckle."""

    waves: int
    angle: float  # of the first wave's crests, in degrees: 0 = horizontal stripes
    wavelength: float  # in pixels


# What can tell two twins apart. No pair is told apart by the sense of a slant: a mirror image keeps its classes.
_TWINS = (
    (Texture(1, 0, 4.5), Texture(1, 90, 4.5)),  # lying and standing stripes
    (Texture(2, 45, 4.5), Texture(7, 0, 4.5)),  # checks and speckle
    (Texture(1, 30, 4.0), Texture(1, 30, 7.5)),  # fine and coarse stripes
    (Texture(7, 0, 4.0), Texture(7, 0, 8.0)),  # fine and coarse speckle
    (Texture(2, 0, 6.0), Texture(1, 60, 6.0)),  # checks and stripes
)
# RGB in [0, 1] of meadow, ochre, slate, brick, plum; dark enough that a bright stripe is rarely cut off
_COLOURS = ((0.34, 0.47, 0.26), (0.56, 0.46, 0.26), (0.32, 0.42, 0.54), (0.55, 0.32, 0.28), (0.46, 0.33, 0.50))


def _style(variant: int) -> tuple[Tensor, list[Texture]]:
    """(mean colours (6, 3), six textures) of a world's classes; variant 0 is the plain one."""
    if variant == 0:
        colours, twins, order = range(3), range(3), range(CLASSES)
        turn, stretch = 0.0, 1.0
    else:
        rng = torch.Generator().manual_seed(variant)
        colours = torch.randperm(len(_COLOURS), generator=rng)[:3].tolist()
        twins = torch.randperm(len(_TWINS), generator=rng)[:3].tolist()
        order = torch.randperm(CLASSES, generator=rng).tolist()  # which palette colours are twins
        turn = -10 + 20 * torch.rand((), generator=rng).item()
        stretch = 0.9 + 0.3 * torch.rand((), generator=rng).item()
    members = [
        (_COLOURS[c], texture._replace(angle=texture.angle + turn, wavelength=texture.wavelength * stretch))
        for c, t in zip(colours, twins)
        for texture in _TWINS[t]
    ]
    return torch.tensor([members[i][0] for i in order]), [members[i][1] for i in order]


def generate_scenes(count: int, size: int = 64, seed: int = 0, variant: int = 0) -> SyntheticScenes:
    """`count` scenes of size x size pixels; see `World` for the shapes.

    `seed` draws the scenes: layout, light, phases, noise. `variant` is the world they are scenes of: another
    one has other textures, other mean colours and other palette colours as twins, so that what was tuned on
    one world can be judged on another. The result depends on the arguments alone, not on torch's global
    generator. Textures are measured in pixels, whatever the size; patches grow with the size.

    Raises ValueError if count < 1, size < 16 or a seed has more than 40 bits, TypeError for what is no integer.
    """
    for name, value in (("count", count), ("size", size), ("seed", seed), ("variant", variant)):
        check_whole(name, value)
    if max(abs(seed), abs(variant)) >= 2**40:
        raise ValueError(f"seed={seed}, variant={variant}: expected integers of at most 40 bits")
    if count < 1 or size < 16:
        raise ValueError(f"a world needs count >= 1 and size >= 16; received count={count}, size={size}")
    rng = torch.Generator().manual_seed(seed + 1_000_003 * variant)
    pixel = torch.arange(size, dtype=torch.float32)
    # (P, 2, H, W): a smooth bend of the plane, about one cell of the 4 x 4 grid long
    bend = F.interpolate(
        torch.randn(count, 2, 4, 4, generator=rng), size=(size, size), mode="bicubic", align_corners=True
    )
    classes = _layout(pixel / size + 0.05 * bend[:, 0], pixel[:, None] / size + 0.05 * bend[:, 1], rng)
    photos = _photograph(classes, pixel + bend[:, 0], pixel[:, None] + bend[:, 1], _style(variant), rng)
    return SyntheticScenes(photos, classes, paint(classes))


def _uniform(rng: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """(P, 1, 1): one number per image."""
    return low + (high - low) * torch.rand(count, 1, 1, generator=rng)


def _layout(x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """(P, H, W) int64: nearest of a few sites, and three discs or boxes on top. x, y: (P, H, W) in about [0, 1]."""
    count = len(x)
    # the first six sites have all six classes, so that each is seen in most of the scenes
    kinds = torch.rand(count, CLASSES, generator=rng).argsort(1)
    kinds = torch.cat([kinds, torch.randint(CLASSES, (count, 5), generator=rng)], 1)[..., None, None]
    nearest = torch.full_like(x, math.inf)
    classes = torch.zeros(x.shape, dtype=torch.int64)
    for kind in kinds[:, :-3].unbind(1):
        distance = (x - _uniform(rng, count, 0, 1)).square_() + (y - _uniform(rng, count, 0, 1)).square_()
        classes = torch.where(distance < nearest, kind, classes)
        nearest = torch.minimum(nearest, distance)
    for kind in kinds[:, -3:].unbind(1):
        dx = (x - _uniform(rng, count, 0, 1)).abs_() / _uniform(rng, count, 0.08, 0.2)
        dy = (y - _uniform(rng, count, 0, 1)).abs_() / _uniform(rng, count, 0.08, 0.2)
        box = torch.rand(count, 1, 1, generator=rng) < 0.5
        classes = torch.where(torch.where(box, torch.maximum(dx, dy), dx.hypot(dy)) < 1, kind, classes)
    return classes


def _photograph(
    classes: Tensor, x: Tensor, y: Tensor, style: tuple[Tensor, list[Texture]], rng: torch.Generator
) -> Tensor:
    """(P, 3, H, W) in [-1, 1] of classes (P, H, W); x, y: (P, H, W) in pixels, bent."""
    count, height, width = classes.shape
    colours, textures = style
    pattern = torch.zeros_like(x)
    for kind, texture in enumerate(textures):
        inside = classes == kind
        angle = torch.deg2rad(texture.angle + _uniform(rng, count, -8, 8))
        number = 2 * math.pi / (texture.wavelength * _uniform(rng, count, 0.9, 1.1))
        field = torch.zeros_like(x)
        for wave in range(texture.waves):
            turned = angle + math.pi * wave / texture.waves
            phase = _uniform(rng, count, 0, 2 * math.pi)
            field += (number * turned.sin() * x + number * turned.cos() * y + phase).sin_()
        pattern = torch.where(inside, field * math.sqrt(2 / texture.waves), pattern)

    heading = _uniform(rng, count, 0, 2 * math.pi)
    across = heading.cos() * (x / width - 0.5) + heading.sin() * (y / height - 0.5)
    light = _uniform(rng, count, 0.8, 1.1) * (1 + _uniform(rng, count, 0, 0.5) * across)
    shade = light * (1 + _uniform(rng, count, 0.18, 0.3) * pattern)
    tint = 1 + 0.08 * torch.randn(count, 3, 1, 1, generator=rng).clamp_(-2, 2)
    photo = _colour(classes, colours).mul_(shade[:, None]).mul_(tint)
    noise = torch.randn(photo.shape, generator=rng) * _uniform(rng, count, 0.02, 0.05)[:, None]
    return photo.add_(noise).clamp_(0, 1).mul_(2).sub_(1)


def paint(classes: Tensor) -> Tensor:
    """The label map of classes: (P, H, W) int64 to (P, 3, H, W) float32 in [-1, 1]."""
    return _colour(classes, PALETTE.to(classes.device) / 127.5 - 1)


def _colour(classes: Tensor, table: Tensor) -> Tensor:
    """table (6, 3) looked up for classes (P, H, W): (P, 3, H, W), contiguous."""
    return torch.stack([channel[classes] for channel in table.unbind(1)], 1)


def classes_of(images: Tensor) -> Tensor:
    """The class whose palette colour is nearest: (P, 3, H, W) in [-1, 1] to (P, H, W) int64. Undoes `paint`."""
    return nearest_colour(images, PALETTE.to(images.device) / 127.5 - 1)


class SyntheticDataset(Dataset):
    """See `open_synthetic`."""

    def __init__(self, world: SyntheticScenes, direction: str, aligned: bool, flip: bool, serial_batches: bool):
        check_type("world", world, SyntheticScenes, "SyntheticScenes, as from generate_scenes(600)")
        if direction not in ("AtoB", "BtoA"):
            raise ValueError(f'direction is "AtoB" or "BtoA"; received {direction!r}')
        if not aligned and len(world) < 2:
            raise ValueError("an unpaired task needs two scenes at least: one for each side")
        half = len(world) if aligned else len(world) // 2
        photos, labels = world.photos[:half], world.labels[:half] if aligned else world.labels[half:]
        self.sides = (photos, labels) if direction == "AtoB" else (labels, photos)
        self.names = ("photo", "label") if direction == "AtoB" else ("label", "photo")
        self.aligned, self.flip, self.serial_batches = aligned, flip, serial_batches

    def __len__(self) -> int:
        return max(map(len, self.sides))

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        a, b = (index % len(side) for side in self.sides)
        if not self.aligned and not self.serial_batches:
            b = int(torch.randint(len(self.sides[1]), ()))
        # a pair is mirrored together, or the two halves would no longer show one scene
        flip_a, flip_b = (torch.rand(2) < 0.5).tolist() if self.flip else (False, False)
        images = [
            side[i].flip(-1) if flip else side[i]
            for side, i, flip in zip(self.sides, (a, b), (flip_a, flip_a if self.aligned else flip_b))
        ]
        paths = [f"{name}/{i:05d}" for name, i in zip(self.names, (a, b))]
        return {"A": images[0], "B": images[1], "A_path": paths[0], "B_path": paths[1]}


def open_synthetic(
    world: SyntheticScenes,
    direction: str = "AtoB",
    aligned: bool = True,
    flip: bool = False,
    serial_batches: bool = False,
) -> SyntheticDataset:
    """A world as a data set with the items of `open_dataset`: "A" (3, H, W) is the generator's input, "B"
    (3, H, W) its target, "A_path" and "B_path" name the scenes. "AtoB" goes from photo to label map.

    aligned=False is the unpaired task: photos of the first half of the scenes, label maps of the other half,
    and a "B" drawn at random from torch's default generator unless `serial_batches`. `flip` mirrors half of
    the items. Raises ValueError for an unknown direction, or an unpaired world of one scene.
    """
    return SyntheticDataset(world, direction, aligned, flip, serial_batches)


def write_synthetic(
    folder: str | Path,
    count_train: int = 400,
    count_test: int = 100,
    size: int = 64,
    seed: int = 0,
    layout: str = "aligned",
    variant: int = 0,
) -> Path:
    """Writes a world as PNG files in the layouts of `srpkd.data.folders`, and returns the folder. A is the photo.

    "aligned":   train/ and test/, photo on the left, label map on the right.
    "unaligned": trainA/ trainB/ testA/ testB/. trainA and trainB show different scenes; testA and testB the
                 same ones under the same names, so that a test can compare with the truth.
    Raises ValueError for an unknown layout or numbers below 1, FileExistsError where there are files already,
    WriteError for what cannot be written.
    """
    from PIL import Image  # only here: a world in memory does without pillow

    from ..files import atomic_write

    check_whole("count_train", count_train, least=1)
    check_whole("count_test", count_test, least=1)
    if layout not in ("aligned", "unaligned"):
        raise ValueError(f'layout is "aligned" or "unaligned"; received {layout!r}')
    unaligned = layout == "unaligned"
    root = Path(folder)
    names = [phase + side for phase in ("train", "test") for side in ("AB" if unaligned else ("",))]
    if there := [name for name in names if (root / name).is_dir() and any((root / name).iterdir())]:
        raise FileExistsError(f"{root} has {' and '.join(there)} already, with files in them: give another folder")
    world = generate_scenes(count_test + count_train * (1 + unaligned), size, seed, variant)
    test, train = world[:count_test], world[count_test : count_test + count_train]
    other = world[count_test + count_train :] if unaligned else train

    def save(images: Tensor, name: str) -> None:
        pixels = images.add(1).mul_(127.5).round_().byte().permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(pixels):
            with atomic_write(root / name / f"{i:05d}.png") as file:
                Image.fromarray(image).save(file, "PNG")

    for phase, photos, labels in (("train", train.photos, other.labels), ("test", test.photos, test.labels)):
        if unaligned:
            save(photos, f"{phase}A")
            save(labels, f"{phase}B")
        else:
            save(torch.cat([photos, labels], 3), phase)
    return root


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m srpkd.data.synthetic", description="Write a world as PNG files.")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--layout", choices=("aligned", "unaligned"), default="aligned")
    parser.add_argument("--train", type=positive, default=400, help="training pairs (default: %(default)s)")
    parser.add_argument("--test", type=positive, default=100, help="test pairs (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=64, help="pixels per side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default: %(default)s)")
    parser.add_argument("--variant", type=int, default=0, help="which world (default: %(default)s)")
    o = parser.parse_args(args)
    try:
        root = write_synthetic(o.out, o.train, o.test, o.size, o.seed, o.layout, o.variant)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{root}: {o.train} training and {o.test} test scenes, {o.layout}, {o.size} x {o.size}")


if __name__ == "__main__":
    main()
