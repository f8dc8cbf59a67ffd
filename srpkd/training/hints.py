"""Hints for unknown options: the nearest name, and what replaces an option of the public code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PAGE = "a run's index.html shows its images"
LOGGERS = f"{PAGE}; --tensorboard, --wandb and --trackio log to other tools"
RESUME = "use --resume NAME: a stopped run resumes, and a finished one is extended with a larger --n_epochs"
SCHEDULE = "the schedule is the public code's linear one: --n_epochs, then --n_epochs_decay"
TRANSLATE = "a run evaluates its networks at its end; for other images use srpkd translate WEIGHTS IN_FOLDER OUT_FOLDER"

# options of the public code, also of its older versions, and values of them, that do not exist here
PUBLIC_OPTIONS = {
    "aspect_ratio": TRANSLATE,
    "batchSize": "use --batch_size",
    "checkpoints_dir": "use --runs_dir, the folder of all runs",
    "no_antialias": "without --antialias there is no anti-aliasing; CUT's default is --antialias both",
    "no_antialias_up": "use --antialias down; without --antialias there is no anti-aliasing",
    "continue_train": f"{RESUME}; a new run starts from existing weights with --init_student and --init_discriminator",
    "display_env": LOGGERS,
    "display_freq": f"{PAGE}; --update_html_freq sets the steps between two updates",
    "display_id": LOGGERS,
    "display_ncols": f"{PAGE}; --samples sets their number",
    "display_port": LOGGERS,
    "display_server": LOGGERS,
    "display_winsize": f"{PAGE} in their own size",
    "epoch": f"{RESUME}; other commands take the file of an epoch, such as 50_net_G_A.pth",
    "epoch_count": "use --resume NAME to resume a run; it knows its epoch",
    "eval": "networks are evaluated in eval mode; --train_mode_norm uses the statistics of each image",
    "fineSize": "use --crop_size",
    "gpu_ids": "use --device cuda:1 or --device cpu; for several GPUs, torchrun --nproc_per_node=2 -m srpkd.train ...",
    "how_many": TRANSLATE,
    "identity": "use --lambda_identity",
    "loadSize": "use --load_size",
    "load_iter": f"{RESUME}; the newest state is loaded",
    "lr_decay_iters": SCHEDULE,
    "lr_policy": SCHEDULE,
    "model_suffix": "other commands take the file of a generator, such as latest_net_G_A.pth",
    "nThreads": "use --num_threads",
    "niter": "use --n_epochs, its name in later versions of the public code",
    "niter_decay": "use --n_epochs_decay, its name in later versions of the public code",
    "no_html": "a run always writes index.html; --update_html_freq sets the steps between two updates",
    "no_lsgan": "use --gan_mode vanilla",
    "ntest": TRANSLATE,
    "num_test": TRANSLATE,
    "phase": f"training reads the training images and evaluates on the test images; {TRANSLATE}",
    "results_dir": TRANSLATE,
    "save_by_iter": "use --save_epoch_freq to keep checkpoints",
    "suffix": "use --name for the whole name of the run",
    "use_wandb": "use --wandb",
    "verbose": "srpkd profile WEIGHTS prints the size of a network",
    "wandb_project_name": "use --wandb; the project is srpkd, and --name names the run",
    "which_direction": "use --direction",
    "which_epoch": f"{RESUME}; other commands take the file of an epoch, such as 50_net_G_A.pth",
    "which_model_netD": "use --netD",
    "which_model_netG": "use --netG",
}
PUBLIC_VALUES = {
    ("norm", "none"): "students do not train well without normalisation; instance has no weights either",
    ("gan_mode", "wgangp"): "the gradient penalty is not implemented; CycleGAN uses lsgan",
    ("lambda_identity", "none"): "use 0 to disable it",
}


def public_hint(name: object) -> str:
    """Return what replaces an option of the public code, as the end of a message, or ""."""
    return f": {PUBLIC_OPTIONS[name]}" if isinstance(name, str) and name in PUBLIC_OPTIONS else ""


def nearest_hint(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return the nearest of `names` as the end of a message, or "" if none is near."""
    nearest = difflib.get_close_matches(name, list(names), 1, cutoff=0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
