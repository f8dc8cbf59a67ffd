"""Hints for unknown options: the nearest name, and what replaces an option of the public code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# options of the public code, and values of them, that do not exist here
PUBLIC_OPTIONS = {
    "checkpoints_dir": "use --runs_dir, the folder of all runs",
    "continue_train": "use --resume NAME to resume a run; a finished run continues with more epochs, --resume NAME "
    "--n_epochs NUMBER, and a new run starts from existing weights with --init_student and --init_discriminator",
    "epoch_count": "use --resume NAME to resume a run; it knows its epoch",
    "gpu_ids": "use --device cuda:1 or --device cpu; for several GPUs, torchrun --nproc_per_node=2 -m srpkd.train ...",
    "lr_policy": "the schedule is the public code's linear one: --n_epochs, then --n_epochs_decay",
    "lr_decay_iters": "the schedule is the public code's linear one: --n_epochs, then --n_epochs_decay",
    "use_wandb": "use --wandb",
    "display_id": "a run's index.html shows its images; --tensorboard, --wandb and --trackio log to other tools",
    "display_freq": "a run's index.html shows its images; --update_html_freq sets the steps between two updates",
    "no_html": "a run always writes index.html; --update_html_freq sets the steps between two updates",
    "save_by_iter": "use --save_epoch_freq to keep checkpoints",
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
