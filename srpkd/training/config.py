"""From a command line, presets and YAML files to a ``TrainConfig``.

A later source wins over an earlier one: the defaults, --preset files, --config files, flags.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .options import GROUPS, OPTIONS, RESUME_OPTIONS, RunOptions, TrainConfig, check_keys, nearest_hint, public_hint


def presets() -> list[str]:
    """The names that --preset takes."""
    return sorted(
        entry.name[:-5] for entry in resources.files("srpkd.presets").iterdir() if entry.name.endswith(".yaml")
    )


def read_preset(name: str) -> dict[str, Any]:
    """The options of a preset that comes with the package.

    Raises:
        ValueError: there is none of this name; names those there are.
    """
    if name not in presets():
        raise ValueError(
            f"there is no preset {name!r}{nearest_hint(name, presets())}; there are: {', '.join(presets())}"
        )
    return check_keys(yaml.safe_load(resources.files("srpkd.presets").joinpath(f"{name}.yaml").read_text()), name)


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: it cannot be read, is not YAML, or has an unknown option (the nearest is named).
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: is not YAML: {error}") from error
    return check_keys({} if content is None else content, f"--config {path}")


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for; preset ``demo`` when it is empty.

    Bad arguments end the process with a message and status 2, as command lines do.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog="python -m srpkd.train",
        usage="python -m srpkd.train [--preset NAME] [--config FILE] [--resume RUN] [--OPTION VALUE ...]   "
        "(--help lists the options)",
        description="Train a generator, or distil a small one from a large one with the relation loss. "
        "Without arguments: the demo, on generated images. Presets: " + ", ".join(presets()) + ".",
        exit_on_error=False,
    )
    parser.add_argument("--preset", action="append", default=[], help="named options; may be repeated, later wins")
    parser.add_argument("--config", action="append", default=[], help="YAML file of options; may be repeated")
    for group in GROUPS:
        parser.add_class_arguments(group, as_group=True)

    try:
        flags, files = _split(sys.argv[1:] if arguments is None else arguments)
        options = _resumed_options(flags, files)
        for kind, value in sorted(files, key=lambda entry: entry[0] == "config"):
            options |= read_preset(value) if kind == "preset" else read_config(value)
        # files become flags that come first, so that the parser checks them alike and flags win
        parsed = parser.parse_args([*as_flags(options), *flags])
        for variant, own in parsed.variants.items():
            try:
                typed = parser.parse_args(as_flags(check_keys(own, f"variant {variant!r}")))
            except ArgumentError as error:
                raise ValueError(f"variant {variant!r}: {_plain(str(error))}") from error
            parsed.variants[variant] = {name: typed[name] for name in own}
        config = TrainConfig(**{name: parsed[name] for name in OPTIONS})
        if config.resume is not None:
            config.resume = str(run_folder(config.resume, config.runs_dir))
        return config.resolved()
    except (ValueError, ArgumentError) as error:
        parser.exit(2, f"{parser.format_usage()}error: {_plain(str(error))}\n")


def run_folder(resume: str, runs_dir: str) -> Path:
    """The folder of a run that is given by its path, or by its name.

    Raises:
        ValueError: there is none; names the runs that there are.
    """
    found = [path for path in (Path(runs_dir) / resume, Path(resume).expanduser()) if (path / "config.yaml").is_file()]
    if not found:
        there = sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
        raise ValueError(
            f"--resume {resume}: there is no such run, neither by this path nor in {runs_dir}, "
            f"where there {'are ' + ', '.join(there) if there else 'is none'}"
        )
    return found[0]


def _resumed_options(flags: Sequence[str], files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The options of the run that --resume names, if it stands among the flags.

    Raises:
        ValueError: there is no such run, or other options stand beside it that a run cannot change any more.
    """
    parser = argparse.ArgumentParser("python -m srpkd.train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--runs_dir", default=RunOptions.runs_dir)
    known = parser.parse_known_args(flags)[0]
    if known.resume is None:
        return {}
    given = [flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")] + [kind for kind, _ in files]
    if fixed := [name for name in dict.fromkeys(given) if name not in RESUME_OPTIONS]:
        raise ValueError(
            f"--resume goes on with a run as it is: leave out {', '.join(f'--{name}' for name in fixed)}, or start "
            f"another run; it takes {', '.join(f'--{name}' for name in sorted(RESUME_OPTIONS - {'resume'}))}"
        )
    return read_config(str(run_folder(known.resume, known.runs_dir) / "config.yaml"))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A command line as (flags, [("preset" or "config", value)]).

    A boolean flag without a value means true, as in the public code.

    Raises:
        ValueError: an unknown option; the nearest is named.
    """
    flags, files = [], []
    rest = list(arguments) or ["--preset=demo"]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=") if argument.startswith("--") else ("", "", "")
        alone = not equals and (not rest or rest[0].startswith("--"))
        if name in ("preset", "config"):
            if alone:
                raise ValueError(f"--{name} needs a value")
            files.append((name, value if equals else rest.pop(0)))
        elif name and name not in (*OPTIONS, "help"):
            hint = public_hint(name) or nearest_hint(name, [*OPTIONS, "preset", "config"], "--")
            raise ValueError(f"there is no option --{name}{hint}")
        else:
            flags.append(f"{argument}=true" if alone and name and "bool" in _type_of(name) else argument)
    return flags, files


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in options.items()
    ]


def _type_of(name: str) -> str:
    """An option's type as it is written above; none for --help."""
    return str(OPTIONS[name].type) if name in OPTIONS else ""


def _plain(message: str) -> str:
    """The parser's message about a value, in words instead of types; any other as it is."""
    match = re.search(r'Parser key "(\w+)":.*(?:Got value|Given value): ([^\n]*)', message, re.DOTALL)
    if match is None or match[1] not in OPTIONS:
        return message
    kind = _type_of(match[1]).removesuffix(" | None")
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    if kind.startswith("Literal"):
        expected = " or ".join(re.findall(r"\w+", kind.removeprefix("Literal")))
    else:
        expected = words.get(kind, "a mapping in YAML, {name: value, ...}")
    value = match[2].strip().strip("'\"")
    hint = PUBLIC_VALUES.get((match[1], value))
    return f"--{match[1]} {match[2]}: expected {expected}" + (f"; {hint}" if hint else "")


def to_yaml(config: TrainConfig) -> str:
    """The configuration as a file that --config reads."""
    return yaml.safe_dump(asdict(replace(config, resume=None)), sort_keys=False, allow_unicode=True)


PUBLIC_VALUES = {
    ("norm", "none"): "without a norm students do not train well; instance learns no weights either",
    ("gan_mode", "wgangp"): "its gradient penalty is not offered; lsgan is what CycleGAN trains with",
    ("lambda_identity", "none"): "0 switches it off",
}
