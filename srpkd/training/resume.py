"""The state of a run, in one file: a resumed run gives the same results as an uninterrupted one.

A finished stage has a state as well, in its own folder, from which the stage can be extended.
"""

from __future__ import annotations

import random
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arguments import command_line, first_line, system_reason
from ..devices import gpu_count
from ..files import atomic_write, replace_file, sync_folder, writing
from ..models.checkpoints import CheckpointError

# newest first; NEXT remains only if the run was stopped between two renames
NEXT, NEWEST, PREVIOUS = NAMES = ("state.next.pt", "state.pt", "state.previous.pt")
FINAL = "final_state.pt"
VERSION = 2


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.pt`` and keep the previous state: at any moment the folder contains a complete one.

    Args:
        folder: folder of the run.
        state: tensors, numbers, strings and None in dicts, lists and tuples, which ``load_state`` reads.
    """
    with atomic_write(folder / NEXT, "content") as file:
        torch.save({"version": VERSION} | state, file)
    # renames reach the disk in this order, and at the latest with the folder: each of the names is that of a complete
    # state at any moment
    with writing(folder / NEWEST):
        if (folder / NEWEST).exists():
            replace_file(folder / NEWEST, folder / PREVIOUS)
        replace_file(folder / NEXT, folder / NEWEST)
    sync_folder(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """Return the newest state in the folder of a run that can be read; report newer ones on stderr.

    Raises:
        CheckpointError: the folder has no state, none can be read, or the state has another version.
    """
    found = [folder / name for name in NAMES if (folder / name).exists()]
    problems = []
    for path in found:
        try:
            state = _read(path)
        except _Unreadable as error:
            problems.append(error)
            continue
        if problems:
            print(f"{folder}: {'; '.join(map(str, problems))}: resuming from {path.name}", file=sys.stderr)
        return state
    if problems:
        advice = "start a new run" if all(problem.is_damaged for problem in problems) else "make one of them readable"
        raise CheckpointError(f"{folder}: {'; '.join(map(str, problems))}: no state to resume from, {advice}")
    raise CheckpointError(
        f"{folder} has no {NEWEST} to resume from: the run has finished and did not keep its state (--no_keep_state), "
        "or was stopped before its first step; to train its weights further, start a new run with --init_student "
        f"{folder} and --init_discriminator {folder}"
    )


def has_state(folder: Path) -> bool:
    """Return whether a folder has a state to resume from."""
    return any((folder / name).exists() for name in NAMES)


def resume_command(run: str | Path | None, processes: int) -> str:
    """Return the command line that resumes a run with a number of processes."""
    launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
    return f"{launcher} -m srpkd.train --resume {command_line([str(run)])}"


def remove_state(folder: Path) -> None:
    """Delete the states in the folder of a finished run, and those of its stages."""
    with writing(folder):
        for path in [*(folder / name for name in NAMES), *folder.rglob(FINAL)]:
            path.unlink(missing_ok=True)


def remove_older_states(folder: Path) -> None:
    """Delete the states in the folder of a finished run other than the newest, which ``save_state`` wrote."""
    with suppress(OSError):  # the run has finished: an older state does no harm
        for name in NAMES:
            if name != NEWEST:
                (folder / name).unlink(missing_ok=True)


def save_final_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a finished stage, as ``save_state`` expects it, to the folder of the stage."""
    with atomic_write(folder / FINAL) as file:
        torch.save({"version": VERSION} | state, file)


def load_final_state(folder: Path) -> dict[str, Any]:
    """Return the state of a finished stage.

    Raises:
        CheckpointError: there is none, it is damaged, or has another version.
    """
    path = folder / FINAL
    advice = f"start a new run with --init_student {folder} and --init_discriminator {folder}"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {FINAL}: the run did not keep the state of this stage (--no_keep_state), or its last "
            f"step was not finite; to train its weights further, {advice}"
        )
    try:
        return _read(path)
    except _Unreadable as error:
        raise CheckpointError(f"{folder}: {error}: to train its weights further, {advice}") from error


class _Unreadable(Exception):
    """The file of a state is damaged, or the operating system does not let it be read."""

    def __init__(self, path: Path, error: Exception) -> None:
        reason = system_reason(error)
        self.is_damaged = not reason
        problem = f"cannot be read ({reason})" if reason else f"is damaged ({first_line(error)})"
        super().__init__(f"{path.name} {problem}")


def _read(path: Path) -> dict[str, Any]:
    try:
        # torch does not verify the checksums that it writes
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with open(path, "rb") as file:  # Python's errors of the operating system keep their kind
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        raise _Unreadable(path, error) from error
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: unsupported state version {state.get('version')} (this srpkd reads {VERSION}): resume with "
            "the version that wrote it"
        )
    return state


def random_state() -> dict[str, Any]:
    """Return the states of the random number generators of torch (CPU and GPUs), Python and NumPy."""
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned; GPUs that it does not include keep their state."""
    torch.set_rng_state(state["torch"])
    for device, generator in zip(range(gpu_count()), state["cuda"]):
        torch.cuda.set_rng_state(generator, device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy, and Python's generator, which the image pools use."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
