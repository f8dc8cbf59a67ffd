"""Extension of a resumed run by a new number of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import distributed
from .options import EXTEND_OPTIONS, ResolvedConfig, variant_config
from .resume import load_final_state, resume_command


def stage_name(config: ResolvedConfig, variant: str, number: int) -> str:
    """Return the name of the stage that trains a variant with seed `number` (0, 1, ...)."""
    return f"{variant} seed {number}" if _has_several(config) else variant


def stage_folder(folder: Path, config: ResolvedConfig, variant: str, number: int) -> Path:
    """Return the folder of that stage in the folder of the run, which is that of an only stage."""
    return folder / stage_name(config, variant, number).replace(" ", "-") if _has_several(config) else folder


def extend(
    config: ResolvedConfig, variants: Mapping[str, ResolvedConfig], folder: Path, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of a resumed run with the stages that its new number of epochs extends.

    Nothing changes if the numbers of epochs are those of the state. The final states of the stages are read and
    checked; nothing is written.

    Args:
        config: options of the run, with the new numbers of epochs.
        variants: name -> options of a student, with the new numbers of epochs.
        folder: folder of the run.
        state: state of the run.

    Raises:
        ValueError: A stage has already trained as many epochs, the run has finished and no stage is extended, or the
            number of processes differs.
        CheckpointError: The final state of a stage is missing or cannot be read.
    """
    before = replace(config, **{name: state["config"][name] for name in EXTEND_OPTIONS})
    old = {name: variant_config(before, name) if config.variants else before for name in variants}
    training: tuple[str, Mapping[str, Any]] = state["training"] or ("", {})
    done, extended, rows = list(state["done"]), list(state.get("extended", ())), dict(state["rows"])
    changed = [name for name in variants if _epochs(old[name]) != _epochs(variants[name])]
    for name in changed:
        for number in range(config.seeds):
            stage = stage_name(config, name, number)
            if stage == training[0]:
                _check_epochs(config, stage, variants[name], training[1])
            elif stage in done or stage in extended:
                final = load_final_state(stage_folder(folder, config, name, number))
                _check_epochs(config, stage, variants[name], final)
                check_processes(config, final)
                if stage in done:
                    done.remove(stage)
                    extended.append(stage)
                    rows.pop(name, None)  # all seeds of a variant are extended, in their order
    if state.get("finished") and not extended:
        unused = sorted(EXTEND_OPTIONS) if before != config else []
        raise ValueError(
            f"--resume {config.resume}: the run has finished"
            + (f", and its variants set their own {' and '.join(unused)}" if unused else "")
            + f"; to train it further, increase the epochs, now n_epochs={before.n_epochs} and "
            f"n_epochs_decay={before.n_epochs_decay}: --resume {config.resume} --n_epochs {2 * before.n_epochs or 100}"
        )
    return {**state, "done": done, "extended": extended, "rows": rows}


def starting_variants(
    config: ResolvedConfig, variants: Mapping[str, ResolvedConfig], state: Mapping[str, Any]
) -> list[str]:
    """Return the names of the variants of which a stage has not started yet.

    Args:
        state: state of a resumed run, else {}.
    """
    if state.get("finished"):
        return []  # seeds that the time budget left out are not started when a run is extended
    started = [*state.get("done", ()), *state.get("extended", ()), *(state.get("training") or ())[:1]]
    numbers = range(config.seeds)
    return [name for name in variants if any(stage_name(config, name, number) not in started for number in numbers)]


def check_processes(config: ResolvedConfig, training_state: Mapping[str, Any]) -> None:
    """Check that the state of a stage is that of as many processes as there are now.

    Raises:
        ValueError: It is not; the message says how to resume.
    """
    processes = len(training_state["processes"])
    if processes != distributed.world_size():
        raise ValueError(
            f"--resume {config.resume}: the number of processes is {distributed.world_size()} and was {processes}: "
            f"resume with {resume_command(config.resume, processes)}"
        )


def _has_several(config: ResolvedConfig) -> bool:
    return max(len(config.variants), 1) * config.seeds > 1


def _epochs(config: ResolvedConfig) -> tuple[int, int]:
    return config.n_epochs, config.n_epochs_decay


def _check_epochs(
    config: ResolvedConfig, stage: str, options: ResolvedConfig, training_state: Mapping[str, Any]
) -> None:
    trained = training_state["epochs"]
    if sum(_epochs(options)) <= trained:
        raise ValueError(
            f"--resume {config.resume}: {stage} has already trained {trained} epochs, received n_epochs="
            f"{options.n_epochs} and n_epochs_decay={options.n_epochs_decay}: their sum must be above {trained}"
        )
