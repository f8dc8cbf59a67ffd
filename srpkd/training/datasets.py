"""The images of a run, as its options describe them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.batches import ResumableBatchSampler, SeededDataset, collate, sides
from ..data.folders import DataError, open_dataset
from ..data.synthetic import generate_scenes, open_synthetic
from ..data.validate import validate_dataset
from ..models.networks import define_generator, size_multiple
from . import distributed
from .options import TrainConfig

TEST_SEED = 1_000_003  # of the generated test scenes: far from the training scenes' 0

cached_scenes = functools.cache(generate_scenes)


def open_data(config: TrainConfig, phase: str) -> Dataset:
    """The images of a phase, "train" or "test": a folder's, or the generated ones (always in pairs for the test)."""
    testing = phase == "test"
    limit = None if testing else config.max_dataset_size
    if config.is_synthetic:
        world = cached_scenes(
            config.synthetic_test_pairs if testing else config.synthetic_pairs,
            config.synthetic_size,
            TEST_SEED if testing else 0,
            config.synthetic_variant,
        )
        paired = testing or config.dataset_mode == "aligned"
        if limit is not None and not paired:
            limit *= 2  # one half of the scenes gives the photos, the other the label maps
        return open_synthetic(
            world[:limit],
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
        serial_batches=testing or config.serial_batches,
        max_dataset_size=limit,
        input_nc=config.input_nc,
        output_nc=config.output_nc,
    )


def validate_data(config: TrainConfig, stages: Iterable[TrainConfig], teachers: Mapping[str, nn.Module]) -> str:
    """What the images are, in a line; raises a DataError that says all that is wrong with them.

    Args:
        stages: the options of all that the run will train.
        teachers: those that it has loaded.
    """
    stages = list(stages)
    with torch.device("meta"):
        nets = [define_generator(netG) for netG in {stage.netG for stage in stages}]
    multiple = max(size_multiple(net) for net in [*nets, *teachers.values()])
    limits = [stage.max_dataset_size for stage in stages]
    if config.is_synthetic:
        if config.synthetic_size % multiple:
            raise DataError(
                f"synthetic_size={config.synthetic_size} must be a multiple of {multiple} for these generators"
            )
        return (
            f"generated scenes of {config.synthetic_size} x {config.synthetic_size} pixels: "
            f"{config.synthetic_pairs} to train, {config.synthetic_test_pairs} to test"
        )
    summaries = [
        validate_dataset(
            config.dataroot,
            config.dataset_mode,
            phase,
            preprocess=config.preprocess,
            load_size=config.load_size,
            crop_size=config.crop_size,
            direction=config.direction,
            max_dataset_size=max(limits) if phase == "train" and None not in limits else None,
            batch_size=max(stage.batch_size for stage in stages) if phase == "train" else 1,
            size_multiple=multiple,
        )
        for phase in ("train", "test")
    ]
    return "; ".join(map(str, summaries))


def make_loader(dataset: Dataset, config: TrainConfig, seed: int, start: int = 0) -> DataLoader:
    """Batches of {"A", "B"} without end, shuffled by the seed, from number `start` on; len() is those of one pass.

    Raises:
        DataError: there are so few images that they cannot be shared out evenly to the processes.
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
            f"{batches.batch_size} images cannot be shared out evenly to {distributed.world_size()} processes: use fewer"
        )
    return DataLoader(
        SeededDataset(dataset),
        batch_sampler=batches,
        num_workers=0 if config.is_synthetic else config.num_threads,
        collate_fn=collate,
        pin_memory=config.torch_device.type == "cuda",
        generator=torch.Generator(),  # its own, lest the loader draw from torch's
    )


def has_one_size(config: TrainConfig) -> bool:
    """Whether all training images are of one size, which the options say."""
    return config.is_synthetic or "crop" in config.preprocess


def input_size(config: TrainConfig, direction: str = "G_A") -> tuple[int, int]:
    """(H, W) of what a direction's generator is trained on; where images keep their sizes, of the first one."""
    if has_one_size(config):
        side = config.synthetic_size if config.is_synthetic else config.crop_size
        return side, side
    with torch.device("cpu"):  # also where networks are made on "meta"
        first = SeededDataset(open_data(config, "train"))[0, 0]  # draws nothing from torch's generator
    height, width = first[sides(direction)[0]].shape[1:]
    return height, width


def channels_of(config: TrainConfig, direction: str) -> tuple[int, int]:
    """(input, output) channels of a direction's generator."""
    channels = config.input_nc, config.output_nc
    return channels[::-1] if direction == "G_B" else channels
