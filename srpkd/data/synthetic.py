"""Synthetic scenes: a small paired dataset that needs no download.

A scene is a patchwork of six classes, rendered twice: as a *label map* (one palette colour per class) and as a
*photo*. In the photo there are six classes in three pairs; the two of a pair have the same mean colour and contrast
and differ only in texture. Light, tint and noise change from image to image. A pixel's colour therefore does not
determine its class (at best it leaves two candidates): a generator has to relate the pixel to its neighbourhood.

    python -m srpkd.data.synthetic OUT --layout aligned      # write scenes as folders of PNG files
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import check_choice, check_type, check_whole, exit_on_error, parse, positive
from ..files import atomic_write, expand_user
from . import Direction
from .layouts import DatasetMode
from .picture import nearest_colour, tensor_to_bytes

# (6, 3) uint8, RGB: the colour of each class in a label map; any two are at least 100 levels apart
PALETTE = torch.tensor(
    [[220, 50, 47], [60, 170, 75], [40, 90, 200], [250, 215, 60], [70, 205, 225], [200, 80, 205]],
    dtype=torch.uint8,
)
CLASSES = len(PALETTE)


@dataclass(frozen=True)
class SyntheticScenes:
    """P scenes. `scenes[:12]` are the first twelve.

    photos: (P, 3, H, W) float32 in [-1, 1]
    classes: (P, H, W) int64 in 0..5
    labels: (P, 3, H, W) float32 in [-1, 1], the label maps: the classes in the colours of `PALETTE`
    """

    photos: Tensor
    classes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, part: slice) -> SyntheticScenes:
        if not isinstance(part, slice):
            raise TypeError(f"scenes[{part!r}]: expected a slice, such as scenes[:12]")
        return SyntheticScenes(self.photos[part], self.classes[part], self.labels[part])


class Texture(NamedTuple):
    """A zero-mean pattern of unit variance: `waves` plane waves in evenly spaced directions with random phases.

    One wave gives stripes, two give checks, seven give speckle.
    """

    waves: int
    angle: float  # of the first wave's crests, in degrees: 0 = horizontal stripes
    wavelength: float  # in pixels


# The textures of two classes with the same mean colour. Mirroring an image never swaps the two of a pair.
_TEXTURE_PAIRS = (
    (Texture(1, 0, 4.5), Texture(1, 90, 4.5)),  # horizontal and vertical stripes
    (Texture(2, 45, 4.5), Texture(7, 0, 4.5)),  # checks and speckle
    (Texture(1, 30, 4.0), Texture(1, 30, 7.5)),  # fine and coarse stripes
    (Texture(7, 0, 4.0), Texture(7, 0, 8.0)),  # fine and coarse speckle
    (Texture(2, 0, 6.0), Texture(1, 60, 6.0)),  # checks and stripes
)
# RGB in [0, 1] of meadow, ochre, slate, brick, plum; dark enough that bright stripes are rarely clipped
_COLOURS = ((0.34, 0.47, 0.26), (0.56, 0.46, 0.26), (0.32, 0.42, 0.54), (0.55, 0.32, 0.28), (0.46, 0.33, 0.50))


def _style(variant: int) -> tuple[Tensor, list[Texture]]:
    """Return the mean colours (6, 3) and the textures of the six classes of a variant."""
    colours, pairs, order = list(range(3)), list(range(3)), list(range(CLASSES))
    rotation, stretch = 0.0, 1.0
    if variant != 0:
        rng = torch.Generator().manual_seed(variant)
        colours = torch.randperm(len(_COLOURS), generator=rng)[:3].tolist()
        pairs = torch.randperm(len(_TEXTURE_PAIRS), generator=rng)[:3].tolist()
        order = torch.randperm(CLASSES, generator=rng).tolist()  # which classes form a pair
        rotation = -10 + 20 * torch.rand((), generator=rng).item()
        stretch = 0.9 + 0.3 * torch.rand((), generator=rng).item()
    members = [
        (_COLOURS[c], texture._replace(angle=texture.angle + rotation, wavelength=texture.wavelength * stretch))
        for c, pair in zip(colours, pairs)
        for texture in _TEXTURE_PAIRS[pair]
    ]
    return torch.tensor([members[i][0] for i in order]), [members[i][1] for i in order]


def generate_scenes(count: int, size: int = 64, seed: int = 0, variant: int = 0) -> SyntheticScenes:
    """Generate `count` scenes of size x size pixels.

    The result depends only on the arguments, not on torch's global generator. Textures have a fixed scale
    in pixels; patches scale with the size.

    Args:
        count: number of scenes.
        size: side in pixels.
        seed: of layout, light, phases and noise.
        variant: style of the scenes. Another variant has other textures, other mean colours and other pairs of classes:
            settings that were tuned on one can be tested on another.

    Raises:
        ValueError: count < 1, size < 16, or a seed or variant of more than 40 bits.
        TypeError: an argument is not an integer.
    """
    check_whole("count", count, least=1)
    check_whole("size", size, least=16)
    check_whole("seed", seed)
    check_whole("variant", variant)
    if max(abs(seed), abs(variant)) >= 2**40:
        raise ValueError(f"seed={seed}, variant={variant}: expected integers of at most 40 bits")
    rng = torch.Generator().manual_seed(seed + 1_000_003 * variant)
    pixel = torch.arange(size, dtype=torch.float32)
    # (P, 2, H, W): a smooth random displacement, with a length scale of one cell of the 4 x 4 grid
    warp = F.interpolate(
        torch.randn(count, 2, 4, 4, generator=rng), size=(size, size), mode="bicubic", align_corners=True
    )
    classes = _layout(pixel / size + 0.05 * warp[:, 0], pixel[:, None] / size + 0.05 * warp[:, 1], rng)
    photos = _render(classes, pixel + warp[:, 0], pixel[:, None] + warp[:, 1], _style(variant), rng)
    return SyntheticScenes(photos, classes, paint(classes))


def _uniform(rng: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """Draw one number per image: (P, 1, 1)."""
    return low + (high - low) * torch.rand(count, 1, 1, generator=rng)


def _layout(x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """Return classes (P, H, W) int64: a Voronoi diagram of eight sites, with three discs or boxes on top.

    x, y: (P, H, W), coordinates of about [0, 1].
    """
    count = len(x)
    # the first six sites have all six classes, so that most scenes contain each of them
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


def _render(classes: Tensor, x: Tensor, y: Tensor, style: tuple[Tensor, list[Texture]], rng: torch.Generator) -> Tensor:
    """Render classes (P, H, W) as photos (P, 3, H, W) in [-1, 1]. x, y: (P, H, W), warped coordinates in pixels."""
    count, height, width = classes.shape
    colours, textures = style
    pattern = torch.zeros_like(x)
    for kind, texture in enumerate(textures):
        inside = classes == kind
        angle = torch.deg2rad(texture.angle + _uniform(rng, count, -8, 8))
        wave_number = 2 * math.pi / (texture.wavelength * _uniform(rng, count, 0.9, 1.1))
        field = torch.zeros_like(x)
        for wave in range(texture.waves):
            direction = angle + math.pi * wave / texture.waves
            phase = _uniform(rng, count, 0, 2 * math.pi)
            field += (wave_number * direction.sin() * x + wave_number * direction.cos() * y + phase).sin_()
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
    """Return the label maps of classes: (P, H, W) int64 -> (P, 3, H, W) float32 in [-1, 1]."""
    return _colour(classes, PALETTE.to(classes.device) / 127.5 - 1)


def _colour(classes: Tensor, table: Tensor) -> Tensor:
    """Look up the colours of classes: (P, H, W) and a table (6, 3) -> (P, 3, H, W), contiguous."""
    return torch.stack([channel[classes] for channel in table.unbind(1)], 1)


def classes_of(images: Tensor) -> Tensor:
    """Return the class of the nearest palette colour: (P, 3, H, W) in [-1, 1] -> (P, H, W) int64. Inverts `paint`."""
    return nearest_colour(images, PALETTE.to(images.device) / 127.5 - 1)


class SyntheticDataset(Dataset[dict[str, Tensor | str]]):
    """Dataset of scenes, with the items of `srpkd.data.folders.open_dataset`.

    "A" (3, H, W) is the generator's input, "B" (3, H, W) its target; "A_path" and "B_path" name the scenes.

    Args:
        scenes: from `generate_scenes`.
        direction: "AtoB" maps photos to label maps, "BtoA" label maps to photos.
        aligned: pairs. False gives the unpaired task: the photos of the first half of the scenes and the label maps of
            the second half, with "B" drawn at random from torch's default generator.
        flip: mirror half of the items at random.
        serial_batches: unpaired, do not draw "B" at random.

    Raises:
        ValueError: an unknown direction, or one scene for the unpaired task.
        TypeError: `scenes` is something else.
    """

    def __init__(
        self,
        scenes: SyntheticScenes,
        direction: Direction = "AtoB",
        aligned: bool = True,
        flip: bool = False,
        serial_batches: bool = False,
    ) -> None:
        check_type("scenes", scenes, SyntheticScenes, "SyntheticScenes, as from generate_scenes(600)")
        check_choice("direction", direction, get_args(Direction))
        if not aligned and len(scenes) < 2:
            raise ValueError(f"{len(scenes)} scene: an unpaired task needs two scenes or more, one for each side")
        half = len(scenes) if aligned else len(scenes) // 2
        photos, labels = scenes.photos[:half], scenes.labels[:half] if aligned else scenes.labels[half:]
        self.sides = (photos, labels) if direction == "AtoB" else (labels, photos)
        self.names = ("photo", "label") if direction == "AtoB" else ("label", "photo")
        self.aligned, self.flip, self.serial_batches = aligned, flip, serial_batches

    def __len__(self) -> int:
        return max(map(len, self.sides))

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: the dataset has {len(self)} items")
        a, b = (index % len(side) for side in self.sides)
        if not self.aligned and not self.serial_batches:
            b = int(torch.randint(len(self.sides[1]), ()))
        # the two images of a pair are mirrored together, to show the same scene
        flip_a, flip_b = (torch.rand(2) < 0.5).tolist() if self.flip else (False, False)
        images = [
            side[i].flip(-1) if flip else side[i]
            for side, i, flip in zip(self.sides, (a, b), (flip_a, flip_a if self.aligned else flip_b))
        ]
        paths = [f"{name}/{i:05d}" for name, i in zip(self.names, (a, b))]
        return {"A": images[0], "B": images[1], "A_path": paths[0], "B_path": paths[1]}


def write_synthetic(
    folder: str | Path,
    count_train: int = 400,
    count_test: int = 100,
    size: int = 64,
    seed: int = 0,
    layout: DatasetMode = "aligned",
    variant: int = 0,
) -> Path:
    """Write scenes as PNG files in a layout of `srpkd.data.folders`. A is the photo, B the label map.

    Args:
        folder: the dataset's root; created if it does not exist.
        count_train, count_test: number of scenes; for `unaligned`, `count_train` is the number for each side.
        size, seed, variant: see `generate_scenes`.
        layout: "aligned" writes train/ and test/, with the photo on the left and the label map on the right.
            "unaligned" writes trainA/ trainB/ testA/ testB/. trainA and trainB show different scenes; testA and testB
            show the same ones under the same names, so that outputs can be compared with the truth.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown layout, a number below 1, or the errors of `generate_scenes`.
        FileExistsError: the dataset's folders exist and are not empty.
        WriteError: a file cannot be written.
    """
    check_whole("count_train", count_train, least=1)
    check_whole("count_test", count_test, least=1)
    check_choice("layout", layout, get_args(DatasetMode))
    unaligned = layout == "unaligned"
    root = expand_user(folder)
    names = [phase + side for phase in ("train", "test") for side in (("A", "B") if unaligned else ("",))]
    if existing := [name for name in names if (root / name).is_dir() and any((root / name).iterdir())]:
        raise FileExistsError(f"{root} already has {' and '.join(existing)} with files in them: use another folder")
    scenes = generate_scenes(count_test + count_train * (1 + unaligned), size, seed, variant)
    test, train = scenes[:count_test], scenes[count_test : count_test + count_train]
    other = scenes[count_test + count_train :] if unaligned else train

    def save(images: Tensor, name: str) -> None:
        pixels = tensor_to_bytes(images).permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(pixels):
            with atomic_write(root / name / f"{i:05d}.png", "content") as file:
                Image.fromarray(image).save(file, "PNG")

    for phase, photos, labels in (("train", train.photos, other.labels), ("test", test.photos, test.labels)):
        if unaligned:
            save(photos, f"{phase}A")
            save(labels, f"{phase}B")
        else:
            save(torch.cat([photos, labels], 3), phase)
    return root


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m srpkd.data.synthetic",
        description="Write synthetic scenes, photos and their label maps, as PNG files.",
        epilog="example: python -m srpkd.data.synthetic datasets/synthetic --layout unaligned",
    )
    add = result.add_argument
    add("out", help="folder to write to")
    add("--layout", choices=get_args(DatasetMode), default="aligned", help="of the folders (default: %(default)s)")
    add("--train", type=positive, default=400, help="number of training pairs (default: %(default)s)")
    add("--test", type=positive, default=100, help="number of test pairs (default: %(default)s)")
    add("--size", type=positive, default=64, help="pixels per side (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    add("--variant", type=int, default=0, help="textures and colours of the scenes (default: %(default)s)")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(parser(), arguments)
    with exit_on_error():
        root = write_synthetic(
            options.out, options.train, options.test, options.size, options.seed, options.layout, options.variant
        )
    print(
        f"{root}: {options.train} training and {options.test} test scenes, {options.layout}, "
        f"{options.size} x {options.size}"
    )


if __name__ == "__main__":
    main()
