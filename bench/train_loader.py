"""The data loader against a training step: does a step ever wait for its images?"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from srpkd.data.batches import SeededDataset
from srpkd.training.datasets import make_loader, open_data
from srpkd.training.options import ResolvedConfig, TrainConfig

from .measure import seconds_of

IMAGES = 24  # files of a side
FILE_SIZE = 256  # pixels, as the public data sets have them


def report(config: ResolvedConfig, step: Callable[[], object], budget: float) -> str:
    """Return how many images per second the loader decodes, resizes and crops, and how many a step uses.

    Args:
        config: options of the step.
        step: a training step.
        budget: seconds, of which each measurement takes a quarter.
    """
    size = config.synthetic_size
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        options = vars(TrainConfig(device=config.device, batch_size=config.batch_size))
        options |= {"dataroot": folder, "load_size": size * 286 // 256, "crop_size": size}
        files = TrainConfig(**options).resolved()
        dataset, numbers = open_data(files, "train"), itertools.count()
        seeded = SeededDataset(dataset)
        one = images_per_second(lambda: seeded[next(numbers) % IMAGES, 0], 2, budget / 4)
        lines = [f"one process: {one:,.0f} images/s decoded, resized and cropped"]
        for workers in (0, files.num_threads):
            batches = iter(make_loader(dataset, replace(files, num_threads=workers), seed=0))
            next(batches)  # starts the processes
            rate = images_per_second(partial(next, batches), 2 * files.batch_size, budget / 4)
            lines.append(f"loader with --num_threads {workers}: {rate:,.0f} images/s")
    step()
    device = str(config.torch_device)
    seconds = min(seconds_of(step, device) for _ in range(3))
    used = 2 * config.batch_size / seconds
    lines.append(f"a training step uses {used:,.1f} images/s: the loader is {rate / used:,.1f} times as fast")
    return "\n".join(lines)


def write_images(folder: Path) -> None:
    """Write JPEG files of smooth noise, which compress like photographs."""
    rng = np.random.default_rng(0)
    for side, number in itertools.product("AB", range(IMAGES)):
        (folder / f"train{side}").mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        coarse.resize((FILE_SIZE, FILE_SIZE), Image.Resampling.BICUBIC).save(
            folder / f"train{side}" / f"{number:03}.jpg", quality=90
        )


def images_per_second(read: Callable[[], object], images: int, budget: float) -> float:
    """Return the rate of a function that reads a number of images per call."""
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < budget or calls < IMAGES:
        read()
        calls += 1
    return images * calls / elapsed
