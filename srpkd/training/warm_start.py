"""Weights from files that the networks of a stage start from: generators, discriminators and feature adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from ..arguments import shorten
from ..files import expand_user
from ..models.checkpoints import CheckpointError, check_fit, load_generator, load_weights
from ..models.networks import GeneratorSpec
from .datasets import channels_of
from .objectives import Objective
from .options import ResolvedConfig


def warm_start(objective: Objective, config: ResolvedConfig) -> list[str]:
    """Load the files that init_student, init_discriminator and init_adapter name into the networks of a stage.

    Networks on the "meta" device only have their files checked.

    Returns:
        One line for each option that is set: which network starts from which file.

    Raises:
        CheckpointError: A file is missing, or its weights do not fit the networks.
    """
    lines = []
    if config.init_student:
        files = warm_start_files(config.init_student, objective.generators)
        for direction, path in files.items():
            with _option("init_student"):
                weights = load_generator(path, generator_spec(config, direction)).state_dict()
            _load(objective.generators[direction], weights)
            if direction in objective.averages:
                _load(objective.averages[direction].module, weights)
        lines.append(_describe(files, objective.generators))
    if config.init_discriminator:
        files = warm_start_files(config.init_discriminator, objective.discriminators)
        for name, path in files.items():
            with _option("init_discriminator"):
                weights = load_discriminator_weights(path, objective.discriminators[name])
            _load(objective.discriminators[name], weights)
        lines.append(_describe(files, objective.discriminators))
    if config.init_adapter:
        adapters = {f"adapter_{direction}": weights for direction, weights in objective.adapter_weights().items()}
        files = warm_start_files(config.init_adapter, adapters)
        for name, path in files.items():
            with _option("init_adapter"):
                _load_adapters(path, adapters[name])
        lines.append(_describe(files, adapters))
    return lines


def warm_start_files(given: str, names: Iterable[str]) -> dict[str, Path]:
    """Return name -> file of its weights, for those names that have one.

    Args:
        given: the file of the first name, such as latest_net_G_A.pth, or the folder that contains the files of all.
        names: names of networks as in the names of files, for example "G_A" and "G_B".
    """
    first, *others = names
    path = expand_user(given)
    if path.is_dir():
        path = path / f"latest_net_{first}.pth"
    files = {first: path}
    for name in others:
        sibling = path.with_name(path.name.replace(f"_{first}", f"_{name}"))
        if sibling != path and sibling.exists():
            files[name] = sibling
    return files


def generator_spec(config: ResolvedConfig, direction: str) -> GeneratorSpec:
    """Return the architecture of a direction's generator."""
    input_nc, output_nc = channels_of(config, direction)
    return GeneratorSpec(
        config.netG,
        input_nc,
        output_nc,
        config.ngf,
        config.norm,
        not config.no_dropout,
        config.antialias,
    )


def load_discriminator_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Return the weights in a file if they fit a discriminator.

    Raises:
        CheckpointError: The file cannot be read, or contains other weights; the message names the options to change.
    """
    weights = load_weights(path)
    found, expected = describe_discriminator(weights), describe_discriminator(network.state_dict())
    if not found:
        raise CheckpointError(f"{path}: expected the weights of a discriminator, such as latest_net_D.pth")
    if differences := [name for name in found | expected if found.get(name) != expected.get(name)]:
        facts = [
            f"{name} is {found[name]} in the file, expected {expected[name]}"
            for name in differences
            if name in found and name in expected
        ]
        flags = [f"--{name} {found[name]}" for name in differences if name in found and name != "input channels"]
        advice = f"use {' '.join(flags)}" if flags else "use the discriminator of a run with the same model and images"
        raise CheckpointError(f"{path}: {'; '.join(facts)}: {advice}")
    check_fit(network, weights, str(path))
    return weights


def describe_discriminator(weights: Mapping[str, Tensor]) -> dict[str, str | int]:
    """Return the options of a discriminator that show in its weights, or {} if these are no discriminator's."""
    norm = "batch" if any(key.endswith(".weight") and w.ndim == 1 for key, w in weights.items()) else "instance"
    convolutions = [w for key, w in weights.items() if re.fullmatch(r"(model|net)\.\d+\.weight", key) and w.ndim == 4]
    first = {"model.0.weight", "net.0.weight"} & weights.keys()
    if not first or len(convolutions) < 3 or convolutions[-1].shape[0] != 1:
        return {}
    ndf, channels, *_ = convolutions[0].shape
    kind: dict[str, str | int] = {"netD": "n_layers", "n_layers_D": len(convolutions) - 2}
    if "net.0.weight" in weights:
        kind = {"netD": "pixel"}
    return {**kind, "input channels": channels, "ndf": ndf, "norm": norm}


@contextmanager
def _option(name: str) -> Iterator[None]:
    """Begin the message of a CheckpointError with the option that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"--{name}: {error}") from error


def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if not next(network.parameters()).is_meta:
        network.load_state_dict(weights)


def _load_adapters(path: Path, adapters: Mapping[str, Tensor]) -> None:
    weights = load_weights(path)
    if {key: w.shape for key, w in weights.items()} != {key: w.shape for key, w in adapters.items()}:
        raise CheckpointError(
            f"{path}: expected an adapter of {_shapes(adapters)}, received {_shapes(weights)}: use the file "
            "latest_net_adapter_*.pth of a run with the same layers and the same channels of student and teacher"
        )
    for key, value in adapters.items():
        value.copy_(weights[key])  # on "meta" this does nothing


def _shapes(weights: Mapping[str, Tensor]) -> str:
    return shorten([f"{key} {tuple(w.shape)}" for key, w in weights.items()], 4)


def _describe(files: Mapping[str, Path], names: Iterable[str]) -> str:
    parts = [f"{name} starts from {files[name]}" if name in files else f"{name} from random weights" for name in names]
    return ", ".join(parts)
