"""Fingerprints of what a run reads: a resumed run must read the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..data.images import relative_name
from ..data.layouts import find_layout
from .datasets import train_limit
from .options import ResolvedConfig


def fingerprints(
    config: ResolvedConfig, stages: Iterable[ResolvedConfig], teachers: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return what a run reads, in words -> its fingerprint.

    Args:
        config: options of the run.
        stages: options of every stage.
        teachers: teachers that were loaded from files, by direction.
    """
    found = {f"weights of the teacher {direction}": _of_weights(network) for direction, network in teachers.items()}
    if not config.is_synthetic:
        layout = find_layout(config.dataroot, config.dataset_mode, "train")
        for folder, files in zip(layout.folders, layout.files(train_limit(stages))):
            found[f"images in {folder}"] = _of_files(files, folder)
    return found


def check_unchanged(resume: str, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    """Check that a resumed run reads what it did before.

    Args:
        resume: the run, as --resume names it.
        now: fingerprints of what it reads now.
        then: fingerprints in its state; a state from before they existed has none.

    Raises:
        ValueError: It does not.
    """
    if changed := [name for name in now if name in then and now[name] != then[name]]:
        differences = [f"{name}: {now[name]} now, {then[name]} when it started" for name in changed]
        raise ValueError(
            f"--resume {resume}: the run would read other data than before ({'; '.join(differences)}): restore them, "
            f"or start a new run with --init_student {resume} and --init_discriminator {resume}"
        )


def _of_files(files: list[str], folder: Path) -> str:
    """Return the number of files, and a digest of their names and sizes."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{relative_name(path, folder)}\0{os.path.getsize(path)}\0".encode(errors="surrogateescape"))
    return f"{len(files)} files, digest {digest.hexdigest()[:12]}"


def _of_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"digest {digest.hexdigest()[:12]}"
