"""Reading weights from untrusted files, and writing them atomically.

No code in a file is executed. The keys are those of the public CycleGAN and CUT code, without the prefixes of wrappers
such as DataParallel. A file that cannot be used raises a `CheckpointError`.
"""

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_type, shorten, system_reason
from ..files import atomic_write, expand_user
from ..finite import describe_nonfinite
from .networks import (
    GeneratorSpec,
    ResnetGenerator,
    UnetGenerator,
    define_generator,
    infer_generator,
    normalize_per_image,
)

SUFFIXES = (".pth", ".pt", ".safetensors")
HOW_TO_SAVE = "save only the weights: torch.save(net.state_dict(), path)"

# DataParallel and DistributedDataParallel wrap a whole network; torch.compile also wraps parts of one.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")

# The magic number in the first of several pickles that torch.save wrote before torch 1.6, which writes zip archives.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


class CheckpointError(ValueError):
    """A file of weights cannot be used; the message says what was found, what is expected, and what to do."""


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state_dict to `path` atomically, as CPU tensors by name, which the public code can read.

    Dtypes are kept. The prefixes that DataParallel and torch.compile add to the keys are removed.

    Raises:
        TypeError: `module` is not a network.
        WriteError: the file cannot be written.
    """
    check_type("module", module, nn.Module, "a torch.nn.Module")
    save_tensors({WRAPPERS.sub("", key): value for key, value in module.state_dict().items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors by name to `path` atomically, as CPU tensors.

    Raises:
        WriteError: the file cannot be written.
    """
    with atomic_write(path) as file:
        torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, file)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state_dict in a `.pth`, `.pt` or `.safetensors` file onto the CPU, without executing code in the file.

    The file holds the state_dict, or a dict with it as "state_dict". The prefixes `module.` and `_orig_mod.` are
    removed from its keys, and the unused statistics that instance norms stored before torch 0.4 are dropped.

    Raises:
        CheckpointError: the file does not exist or cannot be read, is text, truncated or damaged, could be loaded only
            by executing code, or holds anything but tensors by name, or a tensor has a value that is not finite (the
            message names it).
        ImportError: it is a `.safetensors` file, and the package safetensors is not installed.
    """
    path = expand_user(path)
    try:
        _check_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    content = _check_state_dict(content, path)
    weights = {WRAPPERS.sub("", key): value.detach() for key, value in content.items()}
    if len(weights) < len(content):
        raise CheckpointError(f"{path} has keys that differ only in a wrapper's prefix; {HOW_TO_SAVE}")
    weights = {key: value for key, value in weights.items() if not _is_stale_statistic(key, weights)}
    _check_finite(weights, path)
    return weights


def load_generator(
    path: str | os.PathLike[str], spec: GeneratorSpec | None = None, *, train_mode_norm: bool = False
) -> ResnetGenerator | UnetGenerator:
    """Build the generator whose weights are in a file: in float32, on the CPU, in training mode.

    Args:
        path: a file that `load_weights` reads.
        spec: the expected architecture; None accepts any (`infer_generator`).
        train_mode_norm: normalise as pix2pix does at inference (`normalize_per_image`); not for further training.

    Raises:
        CheckpointError: the errors of `load_weights`, or the weights are not those of a generator or of `spec`.
        TypeError: `spec` is something else.
    """
    if spec is not None:
        check_type("spec", spec, GeneratorSpec, "a GeneratorSpec, such as GeneratorSpec('resnet_9blocks', ngf=64)")
    weights = load_weights(path)
    try:
        found = infer_generator(weights)
        if spec is not None and found.netG.startswith("unet"):
            found = replace(found, dropout=spec.dropout)  # it does not show in a U-Net's weights
        if spec is not None and spec != found:
            raise ValueError(_difference(asdict(found), asdict(spec)))
        with torch.device("meta"):  # the initial weights are replaced: no memory and no random numbers for them
            net = define_generator(**asdict(found))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    details = {"norm none": found.norm == "none", f"antialias {found.antialias}": found.antialias != "none"}
    what = ", ".join([f"a {found.netG} of ngf {found.ngf}", *(name for name, shown in details.items() if shown)])
    check_fit(net, weights, f"{path} looks like {what}")
    net.load_state_dict(weights, assign=True)
    net.float()
    _check_finite(net.state_dict(), Path(path), " in float32")  # which has a smaller range than float64
    return normalize_per_image(net) if train_mode_norm else net


def teacher_files(model: str, teacher: str, teacher_B: str | None = None) -> dict[str, Path]:
    """Return the files of a run's teachers by their generators: "G", or "G_A" and, if there is one, "G_B".

    Args:
        model, teacher, teacher_B: options of the run, see ``TrainConfig``.
    """
    path = expand_user(teacher)
    direction = "G" if model == "pix2pix" else "G_A"
    if path.is_dir():
        # the folder of a run that trained both contains its student, and its teacher in a folder below; CUT's only
        # generator has the name of pix2pix's
        names = (f"latest_net_{direction}.pth", "latest_net_G.pth")
        files_in_order = [folder / name for name in names for folder in (path / "teacher", path)]
        path = next((file for file in files_in_order if file.exists()), path / names[0])
    files = {direction: path}
    if model == "pix2pix":
        return files
    sibling = path.with_name(path.name.replace("_G_A", "_G_B"))
    if teacher_B:
        files["G_B"] = expand_user(teacher_B)
    elif sibling != path and sibling.exists():
        files["G_B"] = sibling
    return files


def _check_file(path: Path) -> None:
    """Raise a CheckpointError for files that are recognisable as something else without loading them."""
    if path.is_dir():
        names = shorten(sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES), 5)
        raise CheckpointError(f"{path} is a folder: give a file of weights. This folder has: {names or 'none'}")
    if not path.exists():
        # name the topmost missing part of the path: the file, or one of its folders
        folder = next(parent for parent in path.parents if parent.is_dir())
        missing = path.relative_to(folder).parts[0]
        existing = sorted(p.name for p in folder.iterdir())
        weights = [name for name in existing if name.endswith(SUFFIXES)]
        names = shorten(get_close_matches(missing, existing, n=5, cutoff=0.5) or weights, 5)
        raise CheckpointError(
            f"{path} does not exist: {folder.absolute()} has no {missing}; similar names or weights: {names or 'none'}"
        )
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty, expected weights: copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights: the download failed, repeat it")
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):  # text has no such control characters
        begin = head.decode(errors="replace").strip()[:40]
        raise CheckpointError(f"{path} is a text file ({begin!r} ...), expected weights; {HOW_TO_SAVE}")
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise CheckpointError(f"{path} is truncated: it ends after {size} bytes; copy it again")
    if head.startswith(b"\x80") and LEGACY_MAGIC not in head:
        raise CheckpointError(
            f"{path} is a Python pickle that torch.save did not write. Loading it could execute any code, so it was "
            f"not loaded; {HOW_TO_SAVE}"
        )


def _read_torch(path: Path) -> Any:
    try:
        # no mmap: overwriting the file later would change the loaded tensors; a file that Python opened, whose errors
        # keep their kind
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        # torch's message advises to disable the protection
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds more than weights: loading it would execute code ({unsafe[1]}). Nothing was executed "
                f"or loaded; expected tensors by name: {HOW_TO_SAVE}"
            ) from error
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package safetensors, which is not installed: pip install safetensors, or give the "
            "weights as .pth"
        ) from error
    try:
        return load(path.read_bytes())  # load_file maps the file into memory, like mmap above
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if reason := system_reason(error):
        return CheckpointError(f"{path} cannot be read: {reason}")
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or not a file of weights. Copy or download "
        f"it again; if it has another format (TorchScript, ONNX), {HOW_TO_SAVE}"
    )


def _check_state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {kind}, expected tensors by name; {HOW_TO_SAVE}")
    is_weight = {key: isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()}
    if others := [f"{key!r}: {type(content[key]).__name__}" for key in content if not is_weight[key]]:
        nested = [key for key, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        one = f"save one of its parts: torch.save(torch.load(path)[{nested[0]!r}], new_path)" if nested else HOW_TO_SAVE
        raise CheckpointError(
            f"{path} holds a dict with more than tensors by name ({shorten(others, 5)}). Expected a state_dict, or a "
            f'dict with one as "state_dict"; {one}'
        )
    odd = [
        key for key, value in content.items() if value.is_meta or value.is_quantized or value.layout != torch.strided
    ]
    if odd:
        raise CheckpointError(
            f"{path} holds tensors that are quantized, sparse, or without data ({shorten(odd, 5)}). Expected dense "
            f"tensors; {HOW_TO_SAVE}"
        )
    return content


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _check_finite(weights: Mapping[str, Tensor], path: Path, where: str = "") -> None:
    problems = {key: problem for key, value in weights.items() if (problem := describe_nonfinite(value))}
    if problems:
        first, others = next(iter(problems)), list(problems)[1:]
        also = f"; also not finite: {shorten(others, 5)}" if others else ""
        raise CheckpointError(
            f"{path}: the tensor {first} is not finite{where} ({problems[first]}{also}). Expected finite weights: the "
            "training that wrote them diverged, or the file was damaged; use an earlier checkpoint"
        )


def _is_stale_statistic(key: str, weights: Mapping[str, Tensor]) -> bool:
    owner, _, name = key.rpartition(".")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return name in statistics and f"{owner}.weight" not in weights  # batch norm has both


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    differ = [name for name in found if found[name] != wanted[name]]
    facts = [f"{name} is {found[name]!r} in the file, expected {wanted[name]!r}" for name in differ]
    flags = [f"--no_dropout {not found[name]}" if name == "dropout" else f"--{name} {found[name]}" for name in differ]
    return f"{'; '.join(facts)}: use {' '.join(flags)}"


def check_fit(net: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Check that weights have the names and shapes of a network's.

    Args:
        what: the file and the network, the beginning of the message.

    Raises:
        CheckpointError: they do not; the message lists the differences.
    """
    expected = net.state_dict()
    # torch < 0.4.1 did not count batches; load_state_dict handles it
    missing = [key for key in expected.keys() - weights.keys() if not key.endswith(".num_batches_tracked")]
    surplus = weights.keys() - expected.keys()
    shapes = [
        f"{key} {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    dtypes = [
        f"{key} {weights[key].dtype}"
        for key, value in expected.items()
        if key in weights and weights[key].is_floating_point() != value.is_floating_point()
    ]
    problems = {"missing": sorted(missing), "unknown": sorted(surplus), "wrong shape": shapes, "wrong dtype": dtypes}
    if found := [f"{name}: {shorten(keys, 5)}" for name, keys in problems.items() if keys]:
        raise CheckpointError(f"{what}, but {'; '.join(found)}. Expected the layers of the public CycleGAN or CUT code")
