"""The state of a run: one file, from which the run goes on as if it had never been stopped."""

from __future__ import annotations

import os
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import atomic_write
from ..models.checkpoints import CheckpointError

# newest first; the first is there only if the run was stopped in between two renamings
NEXT, NEWEST, PREVIOUS = NAMES = ("state.next.pt", "state.pt", "state.previous.pt")
VERSION = 1


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.pt``, and keep the one before it: at any moment a whole one lies in the folder.

    Args:
        state: tensors, numbers, texts and None in dicts, lists and tuples: what ``load_state`` reads back.
    """
    with atomic_write(folder / NEXT) as file:
        torch.save({"version": VERSION} | state, file)
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / PREVIOUS)
    os.replace(folder / NEXT, folder / NEWEST)


def load_state(folder: Path) -> dict[str, Any]:
    """The newest state in a run's folder that is whole; says so on stderr where a newer one is not.

    Raises:
        CheckpointError: there is none.
    """
    found = [folder / name for name in NAMES if (folder / name).exists()]
    problems = []
    for path in found:
        try:
            # torch does not compare the checksums that it writes
            if (damaged := zipfile.ZipFile(path).testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file makes of the readers can be anything
            problems.append(f"{path.name} is damaged ({str(error).splitlines()[0]})")
            continue
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{path} is a state of version {state.get('version')}, this srpkd reads {VERSION}: go on with the one "
                "that wrote it"
            )
        if problems:
            print(f"{folder}: {'; '.join(problems)}: going on from {path.name}", file=sys.stderr)
        return state
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}: nothing to go on from, start the run anew")
    raise CheckpointError(
        f"{folder} holds no {NEWEST} to go on from: the run has finished, or was stopped before its first step"
    )


def has_state(folder: Path) -> bool:
    """Whether there is anything to go on from."""
    return any((folder / name).exists() for name in NAMES)


def remove_state(folder: Path) -> None:
    """Nothing is left to go on with."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """The random number generators of torch on the CPU and on the GPUs, of Python and of NumPy."""
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the numbers that would have come next; GPUs beyond those that there were keep theirs."""
    torch.set_rng_state(state["torch"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(generator, device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy, and Python's generator, which the image pool draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
