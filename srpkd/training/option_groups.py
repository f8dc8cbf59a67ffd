"""The options of a training run in five groups, which are the sections of ``python -m srpkd.train --help``.

Option names are those of the public CycleGAN and pix2pix code where it has the option. The "Args:" sections are the
help texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..data import Direction
from ..data.folders import Preprocess
from ..data.layouts import DatasetMode
from ..kernels.formulas import DEFAULT_DISTANCE, DEFAULT_NORMALIZE, Distance, Normalize
from ..loss import Scope
from ..models.antialias import Antialias
from ..models.networks import InitType, NetD

SYNTHETIC = ":synthetic:"  # the dataroot that selects the generated data set


@dataclass
class DataOptions:
    """Images.

    Args:
        dataroot: folder of images, or ":synthetic:" for the generated data set.
        dataset_mode: unaligned (folders trainA, trainB, testA, testB) or aligned (folders train, test with A and B
            side by side in one image, or train/A, train/B, test/A, test/B with files of equal names); test folders
            may be named val, or absent; default: aligned for pix2pix, unaligned for cycle_gan.
        direction: AtoB, or BtoA to swap the two sides.
        preprocess: how images are scaled and cropped: resize_and_crop, crop, scale_width, scale_width_and_crop or none.
        load_size: size that images are scaled to before the crop.
        crop_size: size of the crop.
        no_flip: disable random horizontal flips.
        serial_batches: read images in order, without shuffling.
        max_dataset_size: maximum number of training images (or pairs); inf or null for all of them.
        input_nc: channels of an input image, 1 or 3.
        output_nc: channels of an output image, 1 or 3.
        num_threads: number of data loading processes; 0 loads images in the main process; default: 4, or the number of
            cores if it is smaller.
        synthetic_size: side of a generated image in pixels.
        synthetic_pairs: number of generated training pairs; unpaired, half of the scenes are A and half B.
        synthetic_test_pairs: number of generated test pairs.
        synthetic_variant: number that selects the textures and colours of the generated scenes.
    """

    dataroot: str | None = None
    dataset_mode: DatasetMode | None = None
    direction: Direction = "AtoB"
    preprocess: Preprocess = "resize_and_crop"
    load_size: int = 286
    crop_size: int = 256
    no_flip: bool = False
    serial_batches: bool = False
    max_dataset_size: int | Literal["inf"] | None = None
    input_nc: Literal[1, 3] = 3
    output_nc: Literal[1, 3] = 3
    num_threads: int | None = None
    synthetic_size: int = 64
    synthetic_pairs: int = 600
    synthetic_test_pairs: int = 100
    synthetic_variant: int = 0


@dataclass
class NetworkOptions:
    """The student's networks; without a teacher, the networks that are trained.

    Args:
        model: pix2pix (paired images) or cycle_gan (unpaired images, both directions).
        netG: generator: `resnet_<n>blocks`, such as resnet_6blocks, or `unet_<size>`, such as unet_128; default:
            unet_256 for pix2pix, resnet_9blocks for cycle_gan.
        netD: discriminator: basic (70 x 70 PatchGAN), n_layers or pixel.
        n_layers_D: number of layers of netD n_layers.
        ngf: channels of the generator's first layer.
        ndf: channels of the discriminator's first layer.
        norm: instance or batch; default: batch for pix2pix, instance for cycle_gan.
        no_dropout: disable dropout in the generator; default: dropout for pix2pix only.
        antialias: where a ResNet filters as CUT and FastCUT do: none, down (where it downsamples), up (where it
            upsamples) or both, which is also what --antialias without a value means.
        init_type: weight initialisation: normal, xavier, kaiming or orthogonal.
        init_gain: scale of the initial weights.
        init_student: weights that the generator starts from: latest_net_G.pth for pix2pix, latest_net_G_A.pth for
            cycle_gan (latest_net_G_B.pth in the same folder is loaded too), or the folder that contains them. The
            architecture must be that of netG, ngf, norm, no_dropout and antialias. A teacher that the run trains does
            not use it.
        init_discriminator: weights that the discriminator starts from, for example those of the teacher's own run:
            latest_net_D.pth for pix2pix, latest_net_D_A.pth for cycle_gan (latest_net_D_B.pth in the same folder is
            loaded too), or the folder that contains them.
    """

    model: Literal["pix2pix", "cycle_gan"] = "cycle_gan"
    netG: str | None = None
    netD: NetD = "basic"
    n_layers_D: int = 3
    ngf: int = 64
    ndf: int = 64
    norm: Literal["instance", "batch"] | None = None
    no_dropout: bool | None = None
    antialias: Antialias = "none"
    init_type: InitType = "normal"
    init_gain: float = 0.02
    init_student: str | None = None
    init_discriminator: str | None = None


@dataclass
class TeacherOptions:
    """The teacher: loaded from a file, or trained by the run before the student.

    Args:
        teacher: teacher weights: latest_net_G.pth for pix2pix, latest_net_G_A.pth for cycle_gan (latest_net_G_B.pth
            in the same folder is loaded too), or the folder that contains them; cycle_gan also takes the only
            generator of CUT, latest_net_G.pth. The folder of a run that trained a teacher works as well.
        teacher_B: for cycle_gan: weights of the teacher's generator from B to A, if they are in another folder.
        teacher_netG: architecture of a teacher that the run trains before the student, with the student's norm,
            dropout and, if it is a ResNet, anti-aliasing. Ignored if `teacher` is given, since the file determines
            the architecture. With neither option there is no teacher.
        teacher_ngf: channels of the first layer of that teacher.
        teacher_n_epochs: epochs of that teacher at the full learning rate; default: n_epochs.
        teacher_n_epochs_decay: epochs of that teacher with a falling learning rate; default: n_epochs_decay.
        teacher_max_dataset_size: maximum number of training images (or pairs) of that teacher, inf for all of them;
            default: max_dataset_size.
    """

    teacher: str | None = None
    teacher_B: str | None = None
    teacher_netG: str | None = None
    teacher_ngf: int = 64
    teacher_n_epochs: int | None = None
    teacher_n_epochs_decay: int | None = None
    teacher_max_dataset_size: int | Literal["inf"] | None = None


@dataclass
class LossOptions:
    """Losses and their weights.

    Args:
        gan_mode: lsgan or vanilla; default: vanilla for pix2pix, lsgan for cycle_gan.
        pool_size: for cycle_gan: number of generated images in the history that a discriminator samples from.
        lambda_L1: for pix2pix: weight of the L1 distance to the target image.
        lambda_A: for cycle_gan: weight of the cycle loss A to B to A.
        lambda_B: for cycle_gan: weight of the cycle loss B to A to B.
        lambda_identity: for cycle_gan: weight of the identity loss, relative to lambda_A and lambda_B.
        lambda_kd: weight of the L1 distance between the outputs of student and teacher; default: 300 for
            pix2pix, 30 for cycle_gan.
        lambda_srp: weight of the relation loss; default: 5400 for pix2pix, 540 for cycle_gan. The defaults suit cosine
            and l2; row-normalised matrices have entries about sqrt(N) times smaller and need a larger weight.
        lambda_feature: weight of FitNet's feature matching: MSE after a learned 1 x 1 convolution.
        init_adapter: weights that these convolutions start from: latest_net_adapter_G.pth for pix2pix,
            latest_net_adapter_G_A.pth for cycle_gan (latest_net_adapter_G_B.pth in the same folder is loaded too), or
            the folder that contains them. A run with lambda_feature writes these files.
        layers: student module name to teacher module name of the tapped layers; default: the end of the encoder
            (model.9 of a ResNet).
        normalize: normalisation of the relation matrix: cosine (default), row or none.
        distance: distance between two relation matrices: l2 (default), l1 or huber.
        delta: threshold of the Huber distance, where it becomes linear; other distances ignore it.
        scope: pixels that are related to each other: those of one image, of the process's part of the batch
            (batch), or of the whole batch across all processes (global).
        backend: backend of the relation loss; auto selects the fastest one that is available.
        rectify: negative entries of both relation matrices count as 0, as in Gram anchoring.
        detach_norms: the norms that the relation matrices are divided by are constants to the gradient.
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
    init_adapter: str | None = None
    layers: dict[str, str] | None = None
    normalize: Normalize = DEFAULT_NORMALIZE
    distance: Distance = DEFAULT_DISTANCE
    delta: float = 1.0
    scope: Scope = "image"
    backend: str = "auto"
    rectify: bool = False
    detach_norms: bool = False


@dataclass
class RunOptions:
    """The run.

    Args:
        name: name of the run; its results are written to `<runs_dir>/<name>`; if that exists, to `<name>-2` and so on.
        runs_dir: folder of all runs.
        n_epochs: epochs at the full learning rate.
        n_epochs_decay: epochs over which the learning rate then falls linearly towards 0.
        epoch_steps: steps per epoch; default: one pass over the images.
        batch_size: images (or pairs) per step, over all processes.
        lr: learning rate of Adam.
        beta1: first momentum of Adam.
        seed: random seed.
        variants: students to compare, as {name: {option: value, ...}} with the options in which each one differs
            (of its networks, losses and training); default: one student.
        seeds: number of times that each student is trained, with consecutive seeds.
        time_budget: seconds that a run may take: no further seed is started that would end later, if it takes as long
            as those before. At least two seeds run, so it has no effect on one or two.
        ema: decay of an exponential moving average of the generators' weights, such as 0.999. The averages are then
            saved, evaluated and shown; default: no averaging.
        clip_grad_norm: maximum gradient norm of all generators, and of all discriminators; default: no clipping.
        train_mode_norm: evaluate generators with batch norms that use the statistics of each image, as pix2pix does,
            and not the running ones; dropout is disabled either way. Saved weights support both: evaluate, translate
            and export have the same flag, and compare follows that of the run.
        fast: set the options among precision, compile and channels_last that make training fastest on the device;
            options that you set to another value than their default remain.
        precision: fp32, bf16 or fp16; the last two enable autocast. A CPU or GPU without bfloat16 instructions trains
            in fp32 instead of bf16.
        force_bf16: use precision bf16 on such a device too, where it is slower than fp32, on a CPU many times.
        compile: compile the networks with torch.compile.
        channels_last: keep images and weights in the channels_last memory format.
        cuda_graph: run each training step as one CUDA graph, which the host launches at once. It gives the results of
            steps without it. Runs of several processes and images of different sizes ignore it.
        device: cpu, cuda, cuda:1, ...; default: a GPU if there is one.
        resume: name or folder of a stopped run to resume, or of a finished one to extend with a larger n_epochs or
            n_epochs_decay. All other options keep their values except device, cuda_graph, num_threads, time_budget,
            runs_dir, no_keep_state, update_html_freq, save_latest_freq, tensorboard, wandb and trackio.
        print_freq: steps between two lines of metrics.jsonl.
        save_latest_freq: steps between two saves of the state that a run can be resumed from.
        no_keep_state: delete the state of a run when it finishes, to save disk space; the run can then not be
            extended. The state of a student is three times as large as the weights of its generators and
            discriminators, plus those of its generators with `ema`.
        save_epoch_freq: epochs between two saved checkpoints; the latest one is always saved.
        update_html_freq: steps between two updates of the report page during training.
        tensorboard: also write logs to `<runs_dir>/<name>/tensorboard` (needs the package tensorboard).
        wandb: also log to Weights & Biases (needs the package wandb and `wandb login`).
        trackio: also log to a local Trackio dashboard (needs the package trackio).
        samples: number of test images in the report.
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
    fast: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    force_bf16: bool = False
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False
    device: str | None = None
    resume: str | None = None
    print_freq: int = 10
    save_latest_freq: int = 1000
    no_keep_state: bool = False
    save_epoch_freq: int = 50
    update_html_freq: int = 1000
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    samples: int = 6


GROUPS = (DataOptions, NetworkOptions, TeacherOptions, LossOptions, RunOptions)
OPTIONS = {entry.name: entry for group in GROUPS for entry in fields(group)}
