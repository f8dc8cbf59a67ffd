"""Fingerprints of what a run reads: a resumed run must read the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..data.listing import relative_name
from .datasets import DataSummary


def fingerprints(data: DataSummary, teachers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return what a run reads, in words -> its fingerprint.

    Args:
        data: what is known of the images; generated images have no fingerprint.
        teachers: teachers that were loaded from files, by direction.
    """
    found = {f"weights of the teacher {direction}": _of_weights(network) for direction, network in teachers.items()}
    if data.train:
        for folder, sizes in zip(data.train.layout.folders, data.train.file_bytes):
            found[f"images in {folder}"] = _of_files(sizes, folder)
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


def _of_files(sizes: Mapping[str, int], folder: Path) -> str:
    """Return the number of files, and a digest of their names and sizes in bytes."""
    digest = hashlib.sha256()
    for path, size in sizes.items():
        digest.update(f"{relative_name(path, folder)}\0{size}\0".encode(errors="surrogateescape"))
    return f"{len(sizes)} files, digest {digest.hexdigest()[:12]}"


def _of_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"digest {digest.hexdigest()[:12]}"
