"""Read a ``TrainConfig`` from the command line, presets and YAML files.

A later source overrides an earlier one: defaults, --preset files, --config files, flags.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml

from ..extras import imports_of
from ..files import expand_user, write_file
from .hints import PUBLIC_VALUES, nearest_hint, public_hint
from .option_groups import GROUPS, OPTIONS, RunOptions
from .options import (
    DATASET_LIMITS,
    EXTEND_OPTIONS,
    RESUME_OPTIONS,
    TYPES,
    ResolvedConfig,
    TrainConfig,
    accepted_types,
    check_keys,
    expected_value,
)

WITHOUT_VALUE = {"antialias": "both"}  # what an option means that is given without a value; a boolean option means true
NOT_TEXT = "int", "float", "bool", "timestamp"  # in YAML


class _Loader(yaml.SafeLoader):
    """A loader that keeps texts as they are written: a run may be named 2026-01-31, 007 or 1.10.

    In YAML 1.1 the number 010 is 8, and 1:30 is 90: here they are 10 and a text, which is no number.
    It refuses a key that is in a mapping twice, of which PyYAML ignores the first.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if first := lines.get(key.value):
                    raise ValueError(f"{key.value!r} is in line {first} and again in line {line}: remove one")
                lines[key.value] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        for key, value in node.value:
            names_text = isinstance(key, yaml.ScalarNode) and str in accepted_types(key.value)
            for part, kinds in ((key, (*NOT_TEXT, "null")), (value, NOT_TEXT if names_text else ())):
                if part.tag.rpartition(":")[2] in kinds:
                    part.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float | str:
        if ":" in node.value:
            return node.value
        with suppress(ValueError):
            return int(node.value)
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


# where a number is expected: the message quotes it
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def presets() -> list[str]:
    """Return the names of all presets."""
    return sorted(
        entry.name[:-5] for entry in resources.files("srpkd.presets").iterdir() if entry.name.endswith(".yaml")
    )


def read_preset(name: str) -> dict[str, Any]:
    """Return the options of a preset.

    Raises:
        ValueError: There is no preset of this name; the message lists all presets.
    """
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}{nearest_hint(name, presets())}; presets: {', '.join(presets())}")
    text = resources.files("srpkd.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return check_keys(yaml.safe_load(text), name)


def read_config(path: str) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        ValueError: The file cannot be read, is not YAML, or has an unknown option (the message suggests the nearest).
    """
    try:
        content = _Loader(expand_user(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: is not YAML: {error}") from error
    return check_keys({} if content is None else content, f"--config {path}")


def parse_arguments(arguments: Sequence[str] | None = None) -> ResolvedConfig:
    """Return the configuration that a command line describes; an empty one means ``--preset demo``.

    Invalid arguments print a message and end the process with status 2, as argparse does.

    Args:
        arguments: the command line without the program's name; default: that of the process.
    """
    with imports_of("train"):
        from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog="python -m srpkd.train",
        usage="python -m srpkd.train [--preset NAME] [--config FILE] [--resume RUN] [--OPTION VALUE ...]   "
        "(--help lists the options)",
        description="Train a generator, or distil a small one from a large one with the relation loss. "
        "Without arguments: the demo, on generated images. Presets: " + ", ".join(presets()) + ".",
        exit_on_error=False,
    )
    parser.add_argument("--preset", action="append", default=[], help="preset; may be repeated, a later one overrides")
    parser.add_argument("--config", action="append", default=[], help="YAML file of options; may be repeated")
    for group in GROUPS:
        parser.add_class_arguments(group, as_group=True)

    try:
        flags, files, rest = _split(sys.argv[1:] if arguments is None else arguments)
        options = _resumed_options(flags, files)
        for kind, value in sorted(files, key=lambda entry: entry[0] == "config"):
            options |= read_preset(value) if kind == "preset" else read_config(value)
        options = {name: _read_mapping(name, value) for name, value in (options | flags).items()}
        parsed = parser.parse_args([*as_flags(options), *rest])  # it converts all alike
        for variant, own in options.get("variants", {}).items():  # as written: the parser reads some texts as numbers
            check_keys(own, f"variant {variant!r}")
            try:
                typed = parser.parse_args(as_flags(own))
            except (ValueError, ArgumentError) as error:
                raise ValueError(f"variant {variant!r}: {_plain(str(error))}") from error
            parsed.variants[variant] = {name: typed[name] for name in own}
        config = TrainConfig(**{name: parsed[name] for name in OPTIONS})
        if config.resume is not None:
            config.resume = str(run_folder(config.resume, config.runs_dir))
        return config.resolved()
    except (ValueError, OSError, ArgumentError) as error:
        parser.exit(2, f"{parser.format_usage()}error: {_plain(str(error))}\n")


def run_folder(resume: str, runs_dir: str) -> Path:
    """Return the folder of an existing run, given by its path or by its name in `runs_dir`.

    Raises:
        ValueError: There is no such run; the message lists the runs in `runs_dir`.
    """
    runs = expand_user(runs_dir)
    found = [path for path in (runs / resume, expand_user(resume)) if (path / "config.yaml").is_file()]
    if not found:
        names = sorted(path.parent.name for path in runs.glob("*/config.yaml"))
        raise ValueError(
            f"--resume {resume}: expected the path of a run or the name of one in {runs_dir}, which contains "
            f"{', '.join(names) or 'no runs'}"
        )
    return found[0]


def _resumed_options(flags: dict[str, Any], files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the options of the run that --resume names, or {} without that flag.

    Raises:
        ValueError: There is no such run, or the command line sets an option that a resumed run cannot change.
    """
    if "resume" not in flags:
        return {}
    given = [*flags, *(kind for kind, _ in files)]
    if fixed := [name for name in dict.fromkeys(given) if name not in RESUME_OPTIONS | EXTEND_OPTIONS]:
        accepted = sorted((RESUME_OPTIONS | EXTEND_OPTIONS) - {"resume"})
        raise ValueError(
            f"--resume keeps the options of the run: remove {', '.join(f'--{name}' for name in fixed)}, or start "
            f"a new run; a resumed run accepts {', '.join(f'--{name}' for name in accepted)}"
        )
    folder = run_folder(flags["resume"], flags.get("runs_dir", RunOptions.runs_dir))
    return read_config(str(folder / "config.yaml"))


def _split(arguments: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, str]], list[str]]:
    """Split a command line into options, [("preset" or "config", value), ...] and what is left for the parser.

    A boolean flag without a value means true, as in the public code, and --antialias alone "both".

    Raises:
        ValueError: An option is unknown (the message suggests the nearest), or a value is missing.
    """
    flags: dict[str, Any] = {}
    files, others = [], []
    rest = list(arguments) or ["--preset=demo"]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=") if argument.startswith("--") else ("", "", "")
        alone = not equals and (not rest or rest[0].startswith("--"))
        if value == "--":  # argparse would make an empty list of it
            raise ValueError(f"--{name}: expected a value, received '--'")
        if name in OPTIONS and alone and (bool in accepted_types(name) or name in WITHOUT_VALUE):
            flags[name] = WITHOUT_VALUE.get(name, True)
        elif alone and name in (*OPTIONS, "preset", "config"):
            raise ValueError(f"--{name} needs a value")
        elif name in OPTIONS:
            flags[name] = value if equals else rest.pop(0)
        elif name in ("preset", "config"):
            files.append((name, value if equals else rest.pop(0)))
        elif name and name != "help":
            hint = public_hint(name) or nearest_hint(name, [*OPTIONS, "preset", "config"], "--")
            raise ValueError(f"unknown option --{name}{hint}")
        else:
            others.append(argument)
    return flags, files, others


def _read_mapping(name: str, value: Any) -> Any:
    """Return the mapping that a text describes, for an option that takes one; any other value unchanged."""
    if isinstance(value, str) and any(get_origin(kind) is dict for kind in accepted_types(name)):
        with suppress(yaml.YAMLError):
            content = _Loader(value).get_single_data()
            return content if isinstance(content, dict) else value
    return value


def as_flags(options: dict[str, Any]) -> list[str]:
    """Return options as command line flags, ["--name=value", ...].

    Raises:
        ValueError: A value is of a kind that the parser would turn into another value.
    """
    limits = {name: "inf" for name in DATASET_LIMITS if options.get(name) == math.inf}  # .inf in YAML
    return [f"--{name}={_as_text(name, value)}" for name, value in (options | limits).items()]


def _as_text(name: str, value: Any) -> str:
    kinds = accepted_types(name)
    is_number = int in kinds or float in kinds
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    # the parser reads 1:30 as 90, +010 as 8, and null as a text
    if (is_number and ":" in text) or (TYPES[name] is str and not isinstance(value, str)):
        raise ValueError(f"--{name} {text}: expected {expected_value(name)}")
    if is_number:
        with suppress(ValueError):
            return str(int(text))
    return text


def _plain(message: str) -> str:
    """Rewrite the parser's message about an invalid value in plain words; return any other message unchanged."""
    match = re.search(r'Parser key "(\w+)":.*(?:Got value|Given value): ([^\n]*)', message, re.DOTALL)
    if match is None or match[1] not in OPTIONS:
        return message
    hint = PUBLIC_VALUES.get((match[1], match[2].strip().strip("'\"")))
    return f"--{match[1]} {match[2]}: expected {expected_value(match[1])}" + (f"; {hint}" if hint else "")


def update_yaml(path: Path, options: dict[str, Any]) -> None:
    """Change options in the ``config.yaml`` of a run; the file stays as it is if it has these values.

    Raises:
        WriteError: The file cannot be written.
    """
    content = read_config(str(path))
    if content != content | options:
        text = yaml.safe_dump(content | options, sort_keys=False, allow_unicode=True)
        write_file(path, text.encode())


def to_yaml(config: TrainConfig) -> str:
    """Return the configuration as YAML that --config reads; `resume` is left out."""
    return yaml.safe_dump(asdict(replace(config, resume=None)), sort_keys=False, allow_unicode=True)
