"""The options of a training run, as dataclasses, and their validation.

Option names are those of the public CycleGAN and pix2pix code where it has the option.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..arguments import check_device
from .distributed import launched_world_size

SYNTHETIC = ":synthetic:"  # a dataroot that names the generated data set instead of a folder


@dataclass
class DataOptions:
    """Images.

    Args:
        dataroot: folder of images, or ":synthetic:" for the generated data set.
        dataset_mode: unaligned (trainA, trainB, testA, testB) or aligned (train, test: A and B side by side);
            by default what the model needs.
        direction: AtoB, or BtoA to swap the two sides.
        preprocess: how an image becomes a crop.
        load_size: images are scaled to this size ...
        crop_size: ... and cropped to this.
        no_flip: do not mirror images at random.
        serial_batches: take images in order, do not shuffle.
        max_dataset_size: use at most so many images (pairs) to train.
        input_nc: channels of an input image, 1 or 3.
        output_nc: channels of an output image, 1 or 3.
        num_threads: processes that load images; 0 loads them in the main one.
        synthetic_size: side of a generated image.
        synthetic_pairs: how many generated pairs there are to train on.
        synthetic_test_pairs: how many generated pairs there are to test on.
        synthetic_variant: which textures and colours the generated scenes have.
    """

    dataroot: str | None = None
    dataset_mode: Literal["unaligned", "aligned"] | None = None
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    preprocess: Literal["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"] = "resize_and_crop"
    load_size: int = 286
    crop_size: int = 256
    no_flip: bool = False
    serial_batches: bool = False
    max_dataset_size: int | None = None
    input_nc: Literal[1, 3] = 3
    output_nc: Literal[1, 3] = 3
    num_threads: int = 4
    synthetic_size: int = 64
    synthetic_pairs: int = 600
    synthetic_test_pairs: int = 100
    synthetic_variant: int = 0


@dataclass
class NetworkOptions:
    """The student's networks, and those of a run without a teacher.

    Args:
        model: pix2pix (pairs) or cycle_gan (unpaired, both directions).
        netG: resnet_9blocks, resnet_6blocks, resnet_<n>blocks, unet_256, unet_128, unet_<size>; by default
            unet_256 for pix2pix and resnet_9blocks for cycle_gan.
        netD: basic (70 x 70 PatchGAN), n_layers or pixel.
        n_layers_D: layers of netD n_layers.
        ngf: channels of the generator's first layer.
        ndf: channels of the discriminator's first layer.
        norm: instance or batch; by default batch for pix2pix and instance for cycle_gan.
        no_dropout: no dropout in the generator; by default dropout only for pix2pix.
        init_type: normal, xavier, kaiming or orthogonal.
        init_gain: scale of the initial weights.
    """

    model: Literal["pix2pix", "cycle_gan"] = "cycle_gan"
    netG: str | None = None
    netD: Literal["basic", "n_layers", "pixel"] = "basic"
    n_layers_D: int = 3
    ngf: int = 64
    ndf: int = 64
    norm: Literal["instance", "batch"] | None = None
    no_dropout: bool | None = None
    init_type: Literal["normal", "xavier", "kaiming", "orthogonal"] = "normal"
    init_gain: float = 0.02


@dataclass
class TeacherOptions:
    """The teacher: a file, or one that the run trains first.

    Args:
        teacher: its weights: latest_net_G.pth for pix2pix; for cycle_gan latest_net_G_A.pth, with which
            latest_net_G_B.pth beside it is taken too; or the folder that holds them, also that of a run which
            trained a teacher.
        teacher_B: cycle_gan: weights of its generator B to A, where they lie elsewhere.
        teacher_netG: architecture of a teacher that the run trains itself, before the student, if there is no
            `teacher` to load (whose file tells its architecture); with neither there is no teacher.
        teacher_ngf: its channels; by default 64.
        teacher_n_epochs: its epochs at the full learning rate; by default n_epochs.
        teacher_n_epochs_decay: its epochs of decay; by default n_epochs_decay.
        teacher_max_dataset_size: at most so many images (pairs) to train it; by default max_dataset_size.
    """

    teacher: str | None = None
    teacher_B: str | None = None
    teacher_netG: str | None = None
    teacher_ngf: int = 64
    teacher_n_epochs: int | None = None
    teacher_n_epochs_decay: int | None = None
    teacher_max_dataset_size: int | None = None


@dataclass
class LossOptions:
    """Losses and their weights.

    Args:
        gan_mode: lsgan or vanilla; by default vanilla for pix2pix and lsgan for cycle_gan.
        pool_size: generated images remembered for the discriminators of cycle_gan.
        lambda_L1: pix2pix: weight of the L1 distance to the target.
        lambda_A: cycle_gan: weight of the cycle A to B to A.
        lambda_B: cycle_gan: weight of the cycle B to A to B.
        lambda_identity: cycle_gan: weight of the identity loss, relative to lambda_A and lambda_B.
        lambda_kd: weight of the L1 distance between the student's and the teacher's outputs; by default 30, and for
            pix2pix, whose L1 loss weighs ten times as much as cycle_gan's cycles, 300.
        lambda_srp: weight of the relation loss; by default 540, and for pix2pix 5400, which is for cosine and l2:
            row-normalised relations are smaller, about 1 / sqrt(N) each.
        lambda_feature: weight of FitNet's feature matching: MSE after a learnt 1 x 1 adapter.
        layers: student module name to teacher module name of the tapped layers; by default the end of the
            encoder (model.9 of a ResNet).
        normalize: row, cosine or none: which relation matrix.
        distance: l1, l2 or huber: how two relation matrices are compared.
        delta: where Huber's distance turns linear.
        scope: image, batch or global: whether a pixel is related to those of its image, of its process's share of the
            batch, or of the whole batch, whatever the number of processes.
        backend: what computes the relation loss; auto takes the fastest here.
    """

    gan_mode: Literal["lsgan", "vanilla"] | None = None
    pool_size: int = 50
    lambda_L1: float = 100.0
    lambda_A: float = 10.0
    lambda_B: float = 10.0
    lambda_identity: float = 0.5
    lambda_kd: float | None = None
    lambda_srp: float | None = None
    lambda_feature: float = 0.0
    layers: dict[str, str] | None = None
    normalize: Literal["row", "cosine", "none"] = "cosine"
    distance: Literal["l1", "l2", "huber"] = "l2"
    delta: float = 1.0
    scope: Literal["image", "batch", "global"] = "image"
    backend: str = "auto"


@dataclass
class RunOptions:
    """The run.

    Args:
        name: name of the run: it leaves everything in <runs_dir>/<name>.
        runs_dir: where runs are kept.
        n_epochs: epochs at the full learning rate.
        n_epochs_decay: epochs over which it then falls linearly towards 0.
        epoch_steps: steps in an epoch; by default one pass over the images.
        batch_size: images (pairs) a step, of all processes together.
        lr: Adam's learning rate.
        beta1: Adam's first momentum.
        seed: of everything random.
        variants: students to compare, by name, each with the options that set it apart (of its networks, losses and
            training); by default one.
        seeds: how often each is trained, with seeds of its own.
        time_budget: seconds after which no further seed is begun (at least two are run).
        ema: decay of a moving average of the generators' weights, such as 0.999, which is then what is kept,
            measured and shown; by default none.
        clip_grad_norm: largest norm of a group's gradients, which are scaled down to it; by default any.
        train_mode_norm: measure and use generators with each image's own statistics in their batch norms, as
            pix2pix has it, and not with the running ones; dropout is off either way. The files keep both: the same
            flag of evaluate, translate and export chooses there.
        precision: fp32, bf16 or fp16: of what autocast runs in 16 bits.
        compile: torch.compile the networks.
        channels_last: keep images and weights in that memory format.
        device: cpu, cuda, cuda:1, ...; by default a GPU where there is one.
        resume: name or folder of a run that was stopped: go on with it. Its options stay as they are, but for
            device, num_threads, time_budget, runs_dir and what only watches.
        print_freq: steps between two lines of metrics.jsonl.
        save_latest_freq: steps between two states that a run can be resumed from.
        save_epoch_freq: epochs between two kept checkpoints; the latest is always kept.
        update_html_freq: steps between two updates of the page during training: its curves and samples.
        tensorboard: write <run>/tensorboard too (needs the package tensorboard).
        wandb: log to Weights & Biases too (needs the package wandb, and `wandb login`).
        trackio: log to a local Trackio dashboard too (needs the package trackio).
        samples: test images shown in the report.
    """

    name: str = "experiment"
    runs_dir: str = "runs"
    n_epochs: int = 100
    n_epochs_decay: int = 100
    epoch_steps: int | None = None
    batch_size: int = 1
    lr: float = 0.0002
    beta1: float = 0.5
    seed: int = 0
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 1
    time_budget: float | None = None
    ema: float | None = None
    clip_grad_norm: float | None = None
    train_mode_norm: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    device: str | None = None
    resume: str | None = None
    print_freq: int = 10
    save_latest_freq: int = 1000
    save_epoch_freq: int = 50
    update_html_freq: int = 1000
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    samples: int = 6


@dataclass
class TrainConfig(DataOptions, NetworkOptions, TeacherOptions, LossOptions, RunOptions):
    """All options of a training run; see the five groups."""

    @property
    def torch_device(self) -> torch.device:
        """What `device` says, or a GPU where there is one; its own for each process of torchrun."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return device

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def is_synthetic(self) -> bool:
        return self.dataroot == SYNTHETIC

    @property
    def distils(self) -> bool:
        return bool(self.teacher or self.teacher_netG)

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a student would learn anything from a teacher, if it has one."""
        return any((self.lambda_kd, self.lambda_srp, self.lambda_feature))

    def resolved(self) -> TrainConfig:
        """The same with what stands open filled in by the model's customs, as the public code does.

        Raises:
            ValueError: options that contradict each other.
        """
        paired = self.model == "pix2pix"
        customs: dict[str, Any] = {
            "dataset_mode": "aligned" if paired else "unaligned",
            "netG": "unet_256" if paired else "resnet_9blocks",
            "norm": "batch" if paired else "instance",
            "no_dropout": not paired,
            "gan_mode": "vanilla" if paired else "lsgan",
            # what served best on generated images, docs/study.md
            "lambda_kd": 300.0 if paired else 30.0,
            "lambda_srp": 5400.0 if paired else 540.0,
            "teacher_n_epochs": self.n_epochs,
            "teacher_n_epochs_decay": self.n_epochs_decay,
            "teacher_max_dataset_size": self.max_dataset_size,
        }
        if self.teacher:
            self = replace(self, teacher_netG=None)
        config = replace(self, **{name: value for name, value in customs.items() if getattr(self, name) is None})
        config._check()
        return config

    def _check(self) -> None:
        if not self.dataroot:
            raise ValueError(
                f"no dataroot: give the folder of your images, --dataroot PATH, or --dataroot {SYNTHETIC} "
                "for the generated ones"
            )
        if self.model == "pix2pix" and self.dataset_mode != "aligned":
            raise ValueError("model pix2pix needs pairs: use --dataset_mode aligned, or --model cycle_gan")
        if self.teacher_B and (not self.teacher or self.model == "pix2pix"):
            raise ValueError("teacher_B, weights from B to A, needs model cycle_gan and teacher, weights from A to B")
        least = {
            "load_size": 1, "crop_size": 1, "max_dataset_size": 1, "teacher_max_dataset_size": 1, "num_threads": 0,
            "synthetic_size": 16, "synthetic_pairs": 1, "synthetic_test_pairs": 1, "ngf": 1, "ndf": 1, "n_layers_D": 1,
            "teacher_ngf": 1, "pool_size": 0, "lambda_L1": 0, "lambda_A": 0, "lambda_B": 0, "lambda_identity": 0,
            "lambda_kd": 0, "lambda_srp": 0, "lambda_feature": 0, "n_epochs": 0, "n_epochs_decay": 0,
            "teacher_n_epochs": 0, "teacher_n_epochs_decay": 0, "epoch_steps": 1, "batch_size": 1, "beta1": 0,
            "seeds": 1, "time_budget": 0, "print_freq": 1, "save_latest_freq": 1, "save_epoch_freq": 1,
            "update_html_freq": 1, "samples": 0, "ema": 0, "init_gain": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value}: expected at least {bound}")
        for name in ("lr", "delta", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: expected a number above 0")
        for name in ("beta1", "ema"):
            value = getattr(self, name)
            if value is not None and not value < 1:
                raise ValueError(f"{name}={value}: expected a number below 1")
        if self.n_epochs + self.n_epochs_decay == 0:
            raise ValueError("n_epochs and n_epochs_decay are both 0: nothing would be trained")
        if self.teacher_netG and self.teacher_n_epochs + self.teacher_n_epochs_decay == 0:
            raise ValueError("teacher_n_epochs and teacher_n_epochs_decay are both 0: the teacher would stay untrained")
        if self.is_synthetic and (self.input_nc, self.output_nc) != (3, 3):
            raise ValueError("generated images have three channels: leave input_nc and output_nc at 3")
        if self.is_synthetic and self.dataset_mode == "unaligned" and self.synthetic_pairs < 2:
            raise ValueError("synthetic_pairs=1: an unpaired task needs two scenes at least, one for each side")
        if abs(self.seed) >= 2**40:
            raise ValueError(f"seed={self.seed}: expected a whole number of at most 40 bits")
        if Path(self.name).name != self.name or "\0" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name!r}: expected a plain name for a folder inside {self.runs_dir}")
        if self.device:
            check_device(self.device)
        self._check_processes()
        self._check_arms()

    def _check_processes(self) -> None:
        processes = launched_world_size()
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared out evenly to {processes} processes: "
                f"--batch_size {processes}, or a multiple of it"
            )
        device = self.torch_device
        if processes > 1 and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"process {device.index} of this machine has no GPU of its own, torch sees "
                f"{torch.cuda.device_count()}: torchrun --nproc_per_node with that number, or --device cpu"
            )

    def _check_arms(self) -> None:
        if self.variants and not self.distils:
            raise ValueError("variants compare students of a teacher: give --teacher or --teacher_netG")
        if len({variant.replace(" ", "-") for variant in self.variants}) < len(self.variants):
            raise ValueError(f"variants {list(self.variants)}: two of them would share a folder; name them apart")
        taken = ("teacher", "input", "truth")  # beside the variants on the page
        for variant, options in self.variants.items():
            if variant in taken or not re.fullmatch(r"[^\s./\\][^/\\]*", variant):
                raise ValueError(
                    f"variant {variant!r}: expected a plain name for a folder, other than {', '.join(taken)}"
                )
            if common := [name for name in check_keys(options, f"variant {variant!r}") if name not in VARIANT_OPTIONS]:
                raise ValueError(
                    f"variant {variant!r}: {', '.join(common)} cannot differ between variants: set it for the whole run"
                )


GROUPS = (DataOptions, NetworkOptions, TeacherOptions, LossOptions, RunOptions)
OPTIONS = {entry.name: entry for group in GROUPS for entry in fields(group)}
# what may set one student apart from the next: all see the same images, teacher, seeds and device
VARIANT_OPTIONS = {entry.name for group in (NetworkOptions, LossOptions) for entry in fields(group)} - {"model"} | {
    "n_epochs", "n_epochs_decay", "epoch_steps", "batch_size", "lr", "beta1", "max_dataset_size", "no_flip", "ema",
    "clip_grad_norm",
}  # fmt: skip
# what a resumed run may be told anew: its results hang on none of them
RESUME_OPTIONS = {
    "resume", "runs_dir", "device", "num_threads", "time_budget", "update_html_freq", "save_latest_freq", "tensorboard",
    "wandb", "trackio",
}  # fmt: skip


def check_keys(options: Any, source: str) -> dict[str, Any]:
    """The options as they are, if they are a mapping from known names.

    Raises:
        ValueError: they are not; an unknown name is answered with the nearest.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{source}: expected options as `name: value` lines, received {type(options).__name__}")
    for name in options:
        if name not in OPTIONS:
            raise ValueError(
                f"{source}: there is no option {name!r}{public_hint(name) or nearest_hint(str(name), OPTIONS)}"
            )
    return options


def teacher_config(config: TrainConfig) -> TrainConfig:
    """The options of a teacher that the run trains itself."""
    return replace(
        config,
        netG=config.teacher_netG,
        ngf=config.teacher_ngf,
        n_epochs=config.teacher_n_epochs,
        n_epochs_decay=config.teacher_n_epochs_decay,
        max_dataset_size=config.teacher_max_dataset_size,
    )


def variant_config(config: TrainConfig, name: str) -> TrainConfig:
    """The options of one variant, checked; errors name it."""
    options = check_keys(config.variants[name], f"variant {name!r}")
    try:
        return replace(config, **options).resolved()
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {name!r}: {error}") from error


# options of the public code, and values of them, that have no twin here
PUBLIC_OPTIONS = {
    "checkpoints_dir": "runs are kept in --runs_dir",
    "continue_train": "go on with a run by --resume NAME",
    "epoch_count": "go on with a run by --resume NAME, which knows its epoch",
    "gpu_ids": "say --device cuda:1 or --device cpu; on several GPUs, torchrun --nproc_per_node=2 -m srpkd.train ...",
    "lr_policy": "the learning rate is the public code's linear one: --n_epochs, then --n_epochs_decay",
    "lr_decay_iters": "the learning rate is the public code's linear one: --n_epochs, then --n_epochs_decay",
    "use_wandb": "say --wandb",
    "display_id": "a run's index.html shows its pictures; --tensorboard, --wandb and --trackio log elsewhere too",
    "display_freq": "a run's index.html shows its pictures, updated every --update_html_freq steps",
    "no_html": "a run's index.html is always written; --update_html_freq says how often",
    "save_by_iter": "checkpoints are kept by --save_epoch_freq",
}


def public_hint(name: str) -> str:
    return f": {PUBLIC_OPTIONS[name]}" if name in PUBLIC_OPTIONS else ""


def nearest_hint(name: str, names: Any, prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, list(names), 1, cutoff=0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


ResolvedConfig = TrainConfig
