"""The configuration of a training run, its validation, and what follows from it for teachers and variants."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from ..arguments import check_device
from ..data.layouts import DatasetMode
from ..defaults import KD_WEIGHT, SRP_WEIGHT
from ..devices import gpu_count
from ..files import windows_name_problem
from ..kernels.build import available_cores
from .distributed import launched_world_size
from .hints import nearest_hint, public_hint
from .option_groups import (
    OPTIONS,
    SYNTHETIC,
    DataOptions,
    LossOptions,
    NetworkOptions,
    RunOptions,
    TeacherOptions,
)
from .speedups import fast_options

# the options in which variants may differ: images, teacher, seeds and device are the same for all
VARIANT_OPTIONS = {entry.name for group in (NetworkOptions, LossOptions) for entry in fields(group)} - {"model"} | {
    "n_epochs", "n_epochs_decay", "epoch_steps", "batch_size", "lr", "beta1", "max_dataset_size", "no_flip", "ema",
    "clip_grad_norm",
}  # fmt: skip
# the options that may change when a run is resumed: they do not affect its results
RESUME_OPTIONS = {
    "resume", "runs_dir", "device", "cuda_graph", "num_threads", "time_budget", "update_html_freq", "save_latest_freq",
    "tensorboard", "wandb", "trackio", "no_keep_state",
}  # fmt: skip
# the options that extend a run when it is resumed: the learning rate follows the new total from there on
EXTEND_OPTIONS = {"n_epochs", "n_epochs_decay"}

MINIMUM = {
    "load_size": 1, "crop_size": 1, "max_dataset_size": 1, "teacher_max_dataset_size": 1, "num_threads": 0,
    "synthetic_size": 16, "synthetic_pairs": 1, "synthetic_test_pairs": 1, "ngf": 1, "ndf": 1, "n_layers_D": 1,
    "teacher_ngf": 1, "pool_size": 0, "lambda_L1": 0, "lambda_A": 0, "lambda_B": 0, "lambda_identity": 0,
    "lambda_kd": 0, "lambda_srp": 0, "lambda_feature": 0, "n_epochs": 0, "n_epochs_decay": 0,
    "teacher_n_epochs": 0, "teacher_n_epochs_decay": 0, "epoch_steps": 1, "batch_size": 1, "beta1": 0,
    "seeds": 1, "time_budget": 0, "print_freq": 1, "save_latest_freq": 1, "save_epoch_freq": 1,
    "update_html_freq": 1, "samples": 0, "ema": 0, "init_gain": 0,
}  # fmt: skip
DATASET_LIMITS = ("max_dataset_size", "teacher_max_dataset_size")  # inf, the public code's default, means all images
POSITIVE = ("lr", "delta", "clip_grad_norm")
BELOW_ONE = ("beta1", "ema")


@dataclass
class TrainConfig(DataOptions, NetworkOptions, TeacherOptions, LossOptions, RunOptions):
    """All options of a training run, as a user gives them. None leaves an option to ``resolved``."""

    @property
    def torch_device(self) -> torch.device:
        """The device of this process: `device`, or a GPU if there is one; under torchrun, the GPU of the local rank."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return device

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and weights."""
        is_used = self.channels_last and not self.is_one_image_on_cpu
        return torch.channels_last if is_used else torch.contiguous_format

    @property
    def is_one_image_on_cpu(self) -> bool:
        """Whether a process trains on one image at a time, on a CPU.

        PyTorch's backward of nn.InstanceNorm2d then takes a channels_last gradient for a contiguous one, and returns
        wrong numbers (seen in 2.14).
        """
        return self.torch_device.type == "cpu" and self.batch_size <= launched_world_size()

    @property
    def is_synthetic(self) -> bool:
        """Whether the images are generated."""
        return self.dataroot == SYNTHETIC

    @property
    def distils(self) -> bool:
        """Whether the run has a teacher."""
        return bool(self.teacher or self.teacher_netG)

    @property
    def learns_from_teacher(self) -> bool:
        """Whether any distillation loss has a weight."""
        return any((self.lambda_kd, self.lambda_srp, self.lambda_feature))

    def resolved(self) -> ResolvedConfig:
        """Return a validated copy in which the defaults that depend on other options are filled in.

        The defaults of `model` are those of the public code.

        Raises:
            ValueError: An option is of a wrong type or out of range, or options contradict each other.
        """
        given = {name: _plain_value(value) for name, value in vars(self).items()}
        _check_types(given)
        if not self.dataroot:
            raise ValueError(
                f"dataroot is not set: pass --dataroot with the folder of your images, or --dataroot {SYNTHETIC} "
                "for generated images"
            )
        defaults = self.dependent_defaults()
        options: dict[str, Any] = {
            name: defaults.get(name) if value is None else value for name, value in given.items()
        }
        for name in ("dataroot", "runs_dir"):
            options[name] = os.path.expanduser(options[name])  # a shell does not expand ~ in --runs_dir=~/runs
        for name in DATASET_LIMITS:
            if options[name] == math.inf:
                options[name] = "inf"
        if options["max_dataset_size"] == "inf":
            options["max_dataset_size"] = None
        if options["max_dataset_size"] is None and options["teacher_max_dataset_size"] == "inf":
            options["teacher_max_dataset_size"] = None
        if self.teacher:
            options["teacher_netG"] = None
        if self.fast and not self.resume:  # a resumed run keeps its options, on another device too
            fastest = fast_options(self.torch_device)
            options |= {name: fastest[name] for name in fastest if options[name] == OPTIONS[name].default}
        config = ResolvedConfig(**options)
        _check(config)
        return config

    def dependent_defaults(self) -> dict[str, Any]:
        """Return the defaults that depend on other options."""
        paired = self.model == "pix2pix"
        return {
            "dataset_mode": "aligned" if paired else "unaligned",
            "netG": "unet_256" if paired else "resnet_9blocks",
            "norm": "batch" if paired else "instance",
            "no_dropout": not paired,
            "gan_mode": "vanilla" if paired else "lsgan",
            "num_threads": min(4, available_cores()),  # torch warns about more
            "lambda_kd": KD_WEIGHT[self.model],
            "lambda_srp": SRP_WEIGHT[self.model],
            "teacher_n_epochs": self.n_epochs,
            "teacher_n_epochs_decay": self.n_epochs_decay,
            "teacher_max_dataset_size": self.max_dataset_size,
        }


TYPES = get_type_hints(TrainConfig)
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def accepted_types(name: str) -> list[Any]:
    """Return the types that an option accepts, without None; [] for a name that is not an option, such as help."""
    if name not in OPTIONS:
        return []
    kind = TYPES[name]
    return (
        [kind] if get_origin(kind) in (None, dict, Literal) else [part for part in get_args(kind) if part != NoneType]
    )


def expected_value(name: str) -> str:
    """Return the types that an option accepts, in words."""
    if name == "variants":
        return "a mapping in YAML, {name: {option: value, ...}, ...}, where {} has no options"
    return " or ".join(
        " or ".join(map(str, get_args(kind)))
        if get_origin(kind) is Literal
        else EXPECTED.get(kind, "a mapping in YAML, {name: value, ...}")
        for kind in accepted_types(name)
    )


@dataclass(kw_only=True)
class ResolvedConfig(TrainConfig):
    """A validated ``TrainConfig`` without open options, as ``TrainConfig.resolved`` returns it.

    ``dataclasses.replace`` does not validate: use it for values that are known to be valid.
    """

    dataroot: str
    dataset_mode: DatasetMode
    netG: str
    norm: Literal["instance", "batch"]
    no_dropout: bool
    gan_mode: Literal["lsgan", "vanilla"]
    lambda_kd: float
    lambda_srp: float
    max_dataset_size: int | None
    num_threads: int
    teacher_n_epochs: int
    teacher_n_epochs_decay: int

    def resolved(self) -> ResolvedConfig:
        """Return the configuration itself: it has been validated."""
        return self


def teacher_config(config: ResolvedConfig) -> ResolvedConfig:
    """Return the options of the teacher that the run trains.

    Raises:
        ValueError: `teacher_netG` is not set.
    """
    if config.teacher_netG is None:
        raise ValueError("teacher_netG is not set: the run trains no teacher")
    return replace(
        config,
        netG=config.teacher_netG,
        ngf=config.teacher_ngf,
        antialias=config.antialias if config.teacher_netG.startswith("resnet") else "none",
        n_epochs=config.teacher_n_epochs,
        n_epochs_decay=config.teacher_n_epochs_decay,
        max_dataset_size=None if config.teacher_max_dataset_size == "inf" else config.teacher_max_dataset_size,
        init_student=None,
        init_discriminator=None,
        init_adapter=None,
    )


def variant_config(config: ResolvedConfig, name: str) -> ResolvedConfig:
    """Return the options of one variant.

    Raises:
        ValueError: An option of the variant is invalid; the message names the variant.
    """
    options = vars(config) | {"variants": {}} | config.variants[name]
    try:
        return TrainConfig(**options).resolved()
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {name!r}: {error}") from error


def check_keys(options: Any, source: str) -> dict[str, Any]:
    """Return `options` if it is a dict whose keys are names of options.

    Args:
        options: what was read, of any type.
        source: where it comes from, for the message.

    Raises:
        ValueError: It is not a dict, or has an unknown key; the message suggests the nearest option.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{source}: expected options as `name: value` lines, received {type(options).__name__}")
    for name in options:
        if name not in OPTIONS:
            hint = public_hint(name) or nearest_hint(str(name), OPTIONS)
            raise ValueError(f"{source}: unknown option {name!r}{hint}")
    return options


def _plain_value(value: Any) -> Any:
    """Return a path as a text and a number of NumPy as one of Python, as config.yaml stores them."""
    if isinstance(value, dict):
        return {key: _plain_value(part) for key, part in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, Path) else value


def _check_types(options: dict[str, Any]) -> None:
    """Raise a ValueError if an option has a value that its annotation does not allow."""
    for name, value in options.items():
        is_unset = value is None and NoneType in get_args(TYPES[name])
        is_no_limit = value == math.inf and name in DATASET_LIMITS
        if not (is_unset or is_no_limit or any(_has_type(value, kind) for kind in accepted_types(name))):
            raise ValueError(f"{name}={value!r}: expected {expected_value(name)}")


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and abs(value) != math.inf
    return type(value) is (get_origin(kind) or kind)


def _check(config: ResolvedConfig) -> None:
    """Raise a ValueError if an option is out of range or options contradict each other."""
    _check_ranges(config)
    _check_data(config)
    _check_teacher(config)
    _check_schedule(config)
    _check_name(config)
    if config.device:
        check_device(config.device)
    _check_processes(config)
    _check_variants(config)


def _check_ranges(config: ResolvedConfig) -> None:
    options = vars(config)
    # negated comparisons, so that NaN fails them
    for name, minimum in MINIMUM.items():
        value = options[name]
        if value not in (None, "inf") and not value >= minimum:
            raise ValueError(f"{name}={value}: expected at least {minimum}")
    for name in POSITIVE:
        value = options[name]
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: expected a number above 0")
    for name in BELOW_ONE:
        value = options[name]
        if value is not None and not value < 1:
            raise ValueError(f"{name}={value}: expected a number below 1")
    if abs(config.seed) >= 2**40:
        raise ValueError(f"seed={config.seed}: expected a whole number of at most 40 bits")


def _check_data(config: ResolvedConfig) -> None:
    if config.model == "pix2pix" and config.dataset_mode != "aligned":
        raise ValueError("model pix2pix needs pairs: use --dataset_mode aligned, or --model cycle_gan")
    if config.is_synthetic and (config.input_nc, config.output_nc) != (3, 3):
        raise ValueError(
            f"input_nc={config.input_nc} and output_nc={config.output_nc}: generated images have 3 channels; leave "
            "both options at 3"
        )
    if config.is_synthetic and config.dataset_mode == "unaligned" and config.synthetic_pairs < 2:
        raise ValueError("synthetic_pairs=1: an unpaired task needs at least 2 scenes, one for each side")


def _check_teacher(config: ResolvedConfig) -> None:
    if config.teacher_B and (not config.teacher or config.model == "pix2pix"):
        raise ValueError("teacher_B (weights from B to A) needs model cycle_gan and teacher (weights from A to B)")
    if config.init_adapter and not config.variants and not (config.distils and config.lambda_feature):
        raise ValueError(
            f"init_adapter={config.init_adapter}: only feature matching has adapters: set lambda_feature above 0 and a "
            "teacher, or remove init_adapter"
        )


def _check_schedule(config: ResolvedConfig) -> None:
    if config.n_epochs + config.n_epochs_decay == 0:
        raise ValueError("n_epochs and n_epochs_decay are both 0: set at least one of them, or nothing is trained")
    if config.teacher_netG and config.teacher_n_epochs + config.teacher_n_epochs_decay == 0:
        raise ValueError(
            "teacher_n_epochs and teacher_n_epochs_decay are both 0: set at least one of them, or the teacher is not "
            "trained"
        )


def _check_name(config: ResolvedConfig) -> None:
    if Path(config.name).name != config.name or "\0" in config.name or config.name in ("", ".", ".."):
        raise ValueError(
            f"name={config.name!r}: expected the name of a folder inside {config.runs_dir}, without slashes"
        )
    if sys.platform == "win32" and (problem := windows_name_problem(config.name)):
        raise ValueError(f"name={config.name!r}: {problem}: use another name")


def _check_processes(config: ResolvedConfig) -> None:
    processes = launched_world_size()
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by the number of processes, {processes}: use "
            f"--batch_size {processes} or a multiple of it"
        )
    device = config.torch_device
    if processes > 1 and device.type == "cuda" and (device.index or 0) >= gpu_count():
        raise ValueError(
            f"local rank {device.index} has no GPU: torch sees {gpu_count()}; use torchrun "
            "--nproc_per_node with that number, or --device cpu"
        )


def _check_variants(config: ResolvedConfig) -> None:
    variants = config.variants
    if variants and not config.distils:
        raise ValueError("variants compare students of a teacher: pass --teacher or --teacher_netG")
    for variant in variants:
        if not isinstance(variant, str):
            raise ValueError(f"variant {variant!r}: expected a text as its name")
    # Windows and macOS do not tell upper case from lower case
    if len({variant.replace(" ", "-").casefold() for variant in variants}) < len(variants):
        raise ValueError(
            f"variants {list(variants)}: two of them have the same folder name, or differ only in case; rename one"
        )
    reserved = ("teacher", "input", "truth")  # the other labels of the report page
    for variant, options in variants.items():
        if variant.casefold() in reserved or not re.fullmatch(r"[^\s./\\][^/\\]*", variant):
            raise ValueError(
                f"variant {variant!r}: expected a name that can be a folder's, other than {', '.join(reserved)}"
            )
        if sys.platform == "win32" and (problem := windows_name_problem(variant)):
            raise ValueError(f"variant {variant!r}: {problem}, and its folder would have it: use another name")
        if fixed := [name for name in check_keys(options, f"variant {variant!r}") if name not in VARIANT_OPTIONS]:
            raise ValueError(
                f"variant {variant!r}: {', '.join(fixed)} cannot differ between variants: set it for the whole run"
            )
