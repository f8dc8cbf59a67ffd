"""The data sets and data loaders of a run."""

from __future__ import annotations

import functools
import math
import os
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..arguments import shorten
from ..data.batches import IN_MAIN_PROCESS, ResumableBatchSampler, SeededDataset, collate, sides
from ..data.folders import FolderDataset, open_dataset
from ..data.images import DataError
from ..data.layout_hints import subfolders
from ..data.layouts import FolderLayout, expected_folders, find_layout
from ..data.synthetic import SyntheticDataset, generate_scenes
from ..data.validate import DatasetReport, validate_dataset
from ..models.networks import define_generator, size_multiple
from . import distributed
from .options import ResolvedConfig
from .stop_signals import Stopped, leave_to_parent, received

ImageDataset = FolderDataset | SyntheticDataset
TRAIN_SEED, TEST_SEED = 0, 1_000_003  # of the generated scenes

cached_scenes = functools.cache(generate_scenes)


def open_data(config: ResolvedConfig, phase: str, layout: FolderLayout | None = None) -> ImageDataset:
    """Open the images of a phase, "train" or "test". Generated test images are always pairs.

    Args:
        layout: the folders of the phase; by default they are found and listed here.
    """
    testing = phase == "test"
    limit = None if testing else config.max_dataset_size
    if config.is_synthetic:
        scenes = cached_scenes(
            config.synthetic_test_pairs if testing else config.synthetic_pairs,
            config.synthetic_size,
            TEST_SEED if testing else TRAIN_SEED,
            config.synthetic_variant,
        )
        paired = testing or config.dataset_mode == "aligned"
        if limit is not None and not paired:
            limit *= 2  # half of the scenes become photos, the other half label maps
        return SyntheticDataset(
            scenes[:limit],
            config.direction,
            aligned=paired,
            flip=not (testing or config.no_flip),
            serial_batches=config.serial_batches,
        )
    return open_dataset(
        config.dataroot,
        config.dataset_mode,
        phase,
        config.direction,
        preprocess=config.preprocess,
        load_size=config.load_size,
        crop_size=config.crop_size,
        no_flip=config.no_flip,
        serial_batches=config.serial_batches,
        max_dataset_size=limit,
        input_nc=config.input_nc,
        output_nc=config.output_nc,
        layout=layout,
    )


class DataSummary(NamedTuple):
    """What is known of valid images.

    Attributes:
        text: one line for the training and one for the test images.
        train_sizes: (H, W) of the smallest training images, as the networks get them.
        test_sizes: (H, W) of the smallest test images; [] if there are none.
        train, test: reports on the image files; None if the images are generated or, for test, if there are none.
    """

    text: str
    train_sizes: list[tuple[int, int]]
    test_sizes: list[tuple[int, int]]
    train: DatasetReport | None = None
    test: DatasetReport | None = None

    @property
    def train_layout(self) -> FolderLayout | None:
        """The folders of the training images, for ``open_data``: they are listed once in a run."""
        return self.train.layout if self.train else None

    def open_test_data(self, config: ResolvedConfig) -> ImageDataset | None:
        """Open the test images; None if there are none, since training does not need any."""
        if not self.test_sizes:
            return None
        return open_data(config, "test", self.test.layout if self.test else None)


def validate_data(
    config: ResolvedConfig, stages: Iterable[ResolvedConfig], teachers: Mapping[str, nn.Module]
) -> DataSummary:
    """Check the images of all stages.

    Args:
        config: options of the run.
        stages: options of every stage, in which networks, batch sizes and numbers of images may differ.
        teachers: teachers that were loaded from files, by direction.

    Raises:
        DataError: Images are missing, damaged or do not fit the networks; the message lists all problems.
    """
    stages = list(stages)
    with torch.device("meta"):
        networks = [define_generator(netG) for netG in {stage.netG for stage in stages}]
    multiple = max(size_multiple(network) for network in [*networks, *teachers.values()])
    if config.is_synthetic:
        if config.synthetic_size % multiple:
            raise DataError(
                f"synthetic_size={config.synthetic_size}: expected a multiple of {multiple} for these generators"
            )
        text = (
            f"generated scenes of {config.synthetic_size} x {config.synthetic_size} pixels: "
            f"{config.synthetic_pairs} for training, {config.synthetic_test_pairs} for testing"
        )
        size = config.synthetic_size, config.synthetic_size
        return DataSummary(text, [size], [size])
    layouts = [find_layout(config.dataroot, config.dataset_mode, phase) for phase in ("train", "test")]
    train, *tests = [
        validate_dataset(
            config.dataroot,
            config.dataset_mode,
            layout.phase,
            preprocess=config.preprocess,
            load_size=config.load_size,
            crop_size=config.crop_size,
            direction=config.direction,
            max_dataset_size=train_limit(stages) if layout.phase == "train" else None,
            batch_size=max(stage.batch_size for stage in stages) if layout.phase == "train" else 1,
            size_multiple=multiple,
            layout=layout,
            progress=distributed.rank() == 0,
        )
        for layout in (layouts if layouts[1].has_images else layouts[:1])
    ]
    test = tests[0] if tests else None
    test_text = str(test) if test else _no_test_images(config)
    test_sizes = _smallest(test.network_sizes) if test else []
    return DataSummary(f"{train}\n{test_text}", _smallest(train.network_sizes), test_sizes, train, test)


def _smallest(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (H, W) of the smallest, the lowest and the narrowest image, of (W, H) of all."""
    swapped = [(height, width) for width, height in sizes]
    return list(dict.fromkeys((min(swapped, key=math.prod), min(swapped), min(swapped, key=lambda size: size[::-1]))))


def train_limit(stages: Iterable[ResolvedConfig]) -> int | None:
    """Return how many training images of a folder the stages read at most; None if all."""
    limits = [stage.max_dataset_size for stage in stages]
    return None if None in limits else max(filter(None, limits))


def _no_test_images(config: ResolvedConfig) -> str:
    root = Path(config.dataroot)
    return (
        f"no test images: validation is skipped, and the report has no sample images (expected "
        f"{expected_folders(config.dataset_mode, 'test')} in {root}, which has {shorten(subfolders(root))})"
    )


def batch_sampler(dataset: ImageDataset, config: ResolvedConfig, seed: int, start: int = 0) -> ResumableBatchSampler:
    """Return the sampler of the training images of this process; see ``make_loader``.

    Raises:
        DataError: The images are fewer than a batch and cannot be divided evenly among the processes.
    """
    batches = ResumableBatchSampler(
        len(dataset),
        config.batch_size,
        seed,
        not config.serial_batches,
        start,
        distributed.rank(),
        distributed.world_size(),
    )
    if batches.batch_size % distributed.world_size():
        raise DataError(
            f"{batches.batch_size} images cannot be divided evenly among {distributed.world_size()} processes: use "
            "fewer processes"
        )
    return batches


def check_batches(stages: Iterable[ResolvedConfig], layout: FolderLayout | None = None) -> list[str]:
    """Return a line for each batch size with which a pass over the training images has other batches than expected.

    Args:
        stages: options of every stage.
        layout: as for ``open_data``.

    Raises:
        DataError: as ``batch_sampler`` raises.
    """
    found = []
    for config in stages:
        sampler = batch_sampler(open_data(config, "train", layout), config, 0)
        size, length = sampler.batch_size, sampler.length
        if size < config.batch_size:
            found.append(f"batch_size={config.batch_size}: batches have all {size} training images")
        if config.serial_batches and length % size:
            left_out = f"the last {length % size} of {length} training images are never read"
            found.append(f"serial_batches=True with batch_size={size}: {left_out}")
    return list(dict.fromkeys(found))


def make_loader(dataset: ImageDataset, config: ResolvedConfig, seed: int, start: int = 0) -> DataLoader:
    """Return a loader of endless batches {"A": (B, C, H, W), "B": (B, C, H, W)}.

    Batch `number` depends only on the seed and its number. ``len(loader.batch_sampler)`` is the number of batches in
    one pass over the images.

    Args:
        seed: determines the order of the images and their random crops and flips.
        start: number of the first batch.

    Raises:
        DataError: as ``batch_sampler`` raises.
    """
    workers = 0 if config.is_synthetic else config.num_threads
    return DataLoader(
        SeededDataset(dataset),
        batch_sampler=batch_sampler(dataset, config, seed, start),
        num_workers=workers,
        # Python 3.14 by default starts processes through a server: each would import torch, and all would end with the
        # server, which does not ignore the signals that all processes of a group get
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=collate,
        pin_memory=config.torch_device.type == "cuda",
        generator=torch.Generator(),  # without one the loader draws from torch's default generator
    )


def iterate(loader: DataLoader) -> Generator[dict[str, torch.Tensor], None, None]:
    """Yield the batches of a loader. Use this in ``plain_loader_errors``, and close it: this ends the processes."""
    loader.worker_init_fn = _prepare_process
    batches = None
    try:
        batches = iter(loader)
        yield from batches
    except Exception as error:
        is_started = batches is not None
        batches = None  # as the frames of the traceback, it would keep the processes
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, EOFError | ConnectionError | FileNotFoundError):  # of the socket of a killed process
            raise _loader_ended(str(error)) from error
        if isinstance(error, OSError) and not is_started:  # such as a read-only /dev/shm, or too many open files
            raise DataError(
                f"the processes that load images cannot be started ({error.strerror or error}): {IN_MAIN_PROCESS}"
            ) from error
        raise


def _prepare_process(_: int) -> None:
    """Prepare a process that loads images."""
    leave_to_parent()
    Queue._on_queue_feeder_error = staticmethod(_end_process)  # type: ignore[attr-defined]


def _end_process(error: Exception, _: Any) -> None:
    """End this process, which cannot send its images, for example because /tmp is full: the run would wait forever."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def plain_loader_errors() -> Iterator[None]:
    """Context in which errors of the processes of a loader are raised as if this process had loaded the images.

    Raises:
        DataError: An image cannot be read, or such a process was killed, which torch reports at any moment.
        Stopped: A signal that all processes get ended such a process before it could ignore it.
    """
    try:
        yield
        return
    except DataError as error:
        _, is_remote, message = str(error).rpartition("\nsrpkd.data.images.DataError: ")
        if not is_remote:
            raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _loader_ended(str(error).strip(" .")) from None
    raise DataError(message)


def _loader_ended(reason: str) -> BaseException:
    """Return the error of a run after a process that loads images has ended.

    On Windows and macOS such a process needs seconds to start, and until then Ctrl-C ends it. This is only before the
    first step of a stage, of which the state has been saved.
    """
    if number := received():
        return Stopped(number)
    return DataError(
        f"a process that loads images ended unexpectedly ({reason}): if memory ran out, use fewer of them: a smaller "
        "--num_threads, which may also change with --resume"
    )


def has_one_size(config: ResolvedConfig) -> bool:
    """Return whether the options give all training images the same size."""
    return config.is_synthetic or "crop" in config.preprocess


def has_targets(config: ResolvedConfig) -> bool:
    """Return whether every test image has a target; generated test images always have one."""
    return config.is_synthetic or config.dataset_mode == "aligned"


def input_size(config: ResolvedConfig, direction: str = "G_A", layout: FolderLayout | None = None) -> tuple[int, int]:
    """Return (H, W) of the inputs that a direction's generator is trained on.

    If images keep their own sizes, it is the size of the first one.

    Args:
        layout: as for ``open_data``.
    """
    if has_one_size(config):
        side = config.synthetic_size if config.is_synthetic else config.crop_size
        return side, side
    with torch.device("cpu"):  # also inside a "meta" device context
        first = SeededDataset(open_data(config, "train", layout))[0, 0]  # does not draw from torch's default generator
    height, width = first[sides(direction)[0]].shape[1:]
    return height, width


def channels_of(config: ResolvedConfig, direction: str) -> tuple[int, int]:
    """Return (input, output) channels of a direction's generator."""
    channels = config.input_nc, config.output_nc
    return channels[::-1] if direction == "G_B" else channels
