"""Photographs that come inside packages, and the two tasks on crops of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from srpkd.data.images import read_image
from srpkd.data.picture import image_to_tensor
from srpkd.extras import require
from srpkd.reporting.pictures import save_image

# name -> (package, file): all colour photographs of scikit-image, scikit-learn and matplotlib, one per scene
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "officer": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
SHORT_SIDE = 256  # of the photographs, in pixels, before they are cropped
TESTED = 3  # photographs of a partition that are only tested on


def read_photographs(names: Sequence[str] = tuple(PHOTOGRAPHS)) -> dict[str, Tensor]:
    """Return the photographs as (3, H, W) float32 in [-1, 1], scaled to a shorter side of ``SHORT_SIDE`` pixels.

    Raises:
        ImportError: a package is missing; the message says what to install.
    """
    found = {}
    for name in names:
        package, file = PHOTOGRAPHS[name]
        require(package, "study", f"the photograph {name!r}")
        picture = read_image(str(resources.files(package).joinpath(file)))
        assert isinstance(picture, Image.Image)  # all of them have 8 bits per channel
        scale = SHORT_SIDE / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        found[name] = image_to_tensor(picture.resize((width, height), Image.Resampling.LANCZOS))
    return found


def partition(number: int) -> tuple[list[str], list[str]]:
    """Return the names of a partition's training and test photographs, which are disjoint.

    The test photographs of consecutive partitions are consecutive in a fixed random order, so that after 11 partitions
    each photograph has been tested on three times.
    """
    names = sorted(PHOTOGRAPHS)
    random.Random(0).shuffle(names)
    start = number * TESTED
    tested = [names[(start + i) % len(names)] for i in range(TESTED)]
    return [name for name in names if name not in tested], tested


# --- tasks: from a photograph (3, H, W) in [-1, 1] to the input of the generator --------------------------------------


def degraded(photograph: Tensor, generator: torch.Generator) -> Tensor:
    """Return the photograph blurred (sigma 1.5 pixels), then with noise (sigma 50 of 255 levels): to be restored."""
    blurred = F.gaussian_blur(photograph, [9, 9], [1.5, 1.5])
    return (blurred + 50 / 127.5 * torch.randn(photograph.shape, generator=generator)).clamp(-1, 1)


def halftone(photograph: Tensor, generator: torch.Generator) -> Tensor:
    """Return one bit per channel, by error diffusion (Floyd and Steinberg): to be converted to continuous tones."""
    levels = ((photograph + 1) * 127.5).round().to(torch.uint8)
    bits = [np.array(Image.fromarray(channel.numpy()).convert("1")) for channel in levels]
    return torch.from_numpy(np.stack(bits)).float() * 2 - 1


class Task(NamedTuple):
    """A task: how the input is made from the photograph, and the task in words."""

    make_input: Callable[[Tensor, torch.Generator], Tensor]
    words: str


TASKS: dict[str, Task] = {
    "restore": Task(degraded, "from a blurred and noisy to a clean image"),
    "halftone": Task(halftone, "from a halftone of one bit per channel to continuous tones"),
}


# --- crops ------------------------------------------------------------------------------------------------------------


def random_crops(photographs: Mapping[str, Tensor], count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return crops of size x size pixels at random places, the photographs in turn."""
    crops = []
    for number in range(count):
        photograph = list(photographs.values())[number % len(photographs)]
        top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in photograph.shape[1:])
        crops.append(photograph[:, top : top + size, left : left + size])
    return crops


def grid_crops(photographs: Mapping[str, Tensor], size: int) -> list[Tensor]:
    """Return the crops of a centred grid that covers each photograph without overlap."""
    crops = []
    for photograph in photographs.values():
        starts = [[(side % size) // 2 + size * i for i in range(side // size)] for side in photograph.shape[1:]]
        crops += [photograph[:, y : y + size, x : x + size] for y in starts[0] for x in starts[1]]
    return crops


def write_dataset(folder: Path, task: str, number: int, pairs: int, size: int) -> None:
    """Write a partition's pairs as the public code stores them: ``train/`` and ``test/``, input and target side by
    side.

    Args:
        folder: folder to write to; an existing one with the file ``complete`` is left as it is.
        task: a name of ``TASKS``.
        number: of the partition; it also determines crops and noise.
        pairs: training pairs.
        size: side of the crops in pixels.
    """
    if (folder / "complete").exists():
        return
    generator = torch.Generator().manual_seed(number)
    trained, tested = partition(number)
    photographs = read_photographs()
    crops = {
        "train": random_crops({name: photographs[name] for name in trained}, pairs, size, generator),
        "test": grid_crops({name: photographs[name] for name in tested}, size),
    }
    for phase, targets in crops.items():
        for index, target in enumerate(targets):
            source = TASKS[task].make_input(target, generator)
            save_image(torch.cat([source, target], 2), folder / phase / f"{index:04d}.png")
    (folder / "complete").touch()


def read_pairs(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets (P, 3, H, W) in [-1, 1] of a folder that ``write_dataset`` wrote."""
    images = [np.asarray(read_image(str(path))) for path in sorted(folder.glob("*.png"))]
    pairs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    source, target = pairs.chunk(2, 3)
    return source, target
