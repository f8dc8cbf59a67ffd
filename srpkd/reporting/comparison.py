"""Several generators on one image: their outputs, costs, and relation maps. The content of ``srpkd compare``."""

from __future__ import annotations

import base64
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ..arguments import check_whole
from ..data.images import DataError, read_image
from ..data.picture import image_to_tensor, picture_size, resize_picture, with_channels
from ..devices import synchronize
from ..files import expand_user
from ..kernels.formulas import DEFAULT_NORMALIZE, Normalize
from ..models.checkpoints import load_generator, teacher_files
from ..models.complexity import count_parameters
from ..models.inference import MIN_SIZE, check_output, input_channels, pad_images
from ..models.latency import measure_latency
from ..models.networks import default_tap, size_multiple
from ..taps import FeatureTap
from .page import read_report
from .pictures import encode_png, mark_pixel, relation_picture, to_pixels

TIMED_CALLS = 3  # after one that is not timed
KEPT_IMAGES = 4  # whose features are kept for ``relations``: as many tabs of a browser work side by side


class Comparison:
    """Generators side by side.

    Args:
        weights: label -> file of weights that ``load_generator`` reads.
        device: where the generators run.
        size: the longer side of a larger image is scaled down to this many pixels.
        normalize: the relation matrix whose rows the maps show, as in ``relation_row``.
        layers: label -> name of the layer whose relations are shown; by default ``default_tap``.
        train_mode_norm: batch norms normalise each image by its own statistics, as in a run with this option.

    Raises:
        CheckpointError: a file does not hold a generator.
        ValueError: the generators take images with different numbers of channels, or ``size`` is too small.
    """

    def __init__(
        self,
        weights: Mapping[str, Path],
        *,
        device: str = "cpu",
        size: int = 512,
        normalize: Normalize = DEFAULT_NORMALIZE,
        layers: Mapping[str, str] | None = None,
        train_mode_norm: bool = False,
    ) -> None:
        check_whole("size", size, least=MIN_SIZE)
        self.size, self.normalize, self.device = size, normalize, torch.device(device)
        self.networks = {
            label: load_generator(path, train_mode_norm=train_mode_norm) for label, path in weights.items()
        }
        channels = {label: input_channels(network) for label, network in self.networks.items()}
        if len(set(channels.values())) > 1:
            raise ValueError(f"the generators take images with different numbers of channels: {channels}")
        self.channels = next(iter(channels.values()))
        self.taps = {}
        for label, network in self.networks.items():
            network.to(self.device).eval().requires_grad_(False)
            layer = (layers or {}).get(label, "")
            known = layer in dict(network.named_modules())  # variants may have another architecture
            self.taps[label] = FeatureTap(network, [layer if known and layer else default_tap(network)])
        self.costs = {
            label: {
                "parameters": count_parameters(network),
                "bytes": os.path.getsize(expand_user(weights[label])),
            }
            for label, network in self.networks.items()
        }
        self._kept: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}  # id -> image, label -> feature; the oldest first

    def translate(self, path: str | Path) -> dict[str, Any]:
        """Run every generator on an image file, and keep the features of the last images for ``relations``.

        Returns:
            {"id": name of the image for ``relations``, "width", "height", "resized": (width, height) of the file if it
            was scaled down, else None, "input": PNG, "networks": [{"label", "image": PNG, "ms": median time of a
            forward pass, "parameters", "bytes"}]}, where PNG is a data URL.

        Raises:
            DataError: the file cannot be read as an image, or is too small.
            NonFiniteError: an output has a NaN or an infinite value.
        """
        picture = read_image(str(path))
        full = picture_size(picture)
        if min(full) < MIN_SIZE:
            raise DataError(f"{path}: {full[0]} x {full[1]} pixels; expected at least {MIN_SIZE} x {MIN_SIZE}")
        if max(full) > self.size:
            width, height = (max(MIN_SIZE, round(side * self.size / max(full))) for side in full)
            picture = resize_picture(picture, width, height)
        image = image_to_tensor(with_channels(picture, self.channels))
        outputs, features = [], {}
        for label, network in self.networks.items():
            output, features[label], milliseconds = self._run(network, self.taps[label], image)
            check_output(output, label)
            outputs.append({"label": label, "image": png(to_pixels(output)), "ms": milliseconds} | self.costs[label])
        while len(self._kept) >= KEPT_IMAGES:
            del self._kept[next(iter(self._kept))]
        name = secrets.token_hex(8)  # a page that is still open from an earlier server does not have the same
        self._kept[name] = image, features
        height, width = image.shape[1:]
        return {
            "id": name,
            "width": width,
            "height": height,
            "resized": full if full != (width, height) else None,
            "input": png(to_pixels(image)),
            "networks": outputs,
        }

    def relations(self, name: str, x: float, y: float) -> dict[str, Any]:
        """Return each network's map of the relations of one pixel to all others.

        Args:
            name: the "id" of an image that ``translate`` returned.
            x, y: position of the pixel as fractions of the image's width and height, in [0, 1).

        Returns:
            {"input": PNG with the pixel framed, "maps": {label: PNG}}.

        Raises:
            ValueError: the image is none of the last ones, or the position is outside of it.
        """
        if name not in self._kept:
            raise ValueError(f"the features of this image are not kept (the last {KEPT_IMAGES} are): open it again")
        if not (0 <= x < 1 and 0 <= y < 1):
            raise ValueError(f"x={x}, y={y}: expected fractions of the image's sides, at least 0 and below 1")
        self._kept[name] = image, features = self._kept.pop(name)  # now the last one
        size = (image.shape[1], image.shape[2])
        maps, marked = {}, None
        for label, feature in features.items():
            pixel = int(y * feature.shape[1]), int(x * feature.shape[2])
            if marked is None:
                marked = mark_pixel(image, pixel, feature.shape)
            maps[label] = png(relation_picture(feature, pixel, size, self.normalize))
        assert marked is not None  # there is at least one network
        return {"input": png(marked), "maps": maps}

    @torch.no_grad()
    def _run(self, network: nn.Module, tap: FeatureTap, image: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return a network's output and feature for an image (C, H, W), cropped to it, and its median time in ms."""
        height, width = image.shape[1:]
        padded = pad_images(image[None], size_multiple(network)).to(self.device)
        with tap.recording() as recorded:
            output = network(padded)
        [feature] = recorded.values()
        feature = feature[0]
        rows = -(-feature.shape[1] * height // padded.shape[2])  # without the cells of the padding
        columns = -(-feature.shape[2] * width // padded.shape[3])

        def call() -> None:
            network(padded)
            synchronize(self.device)

        milliseconds = measure_latency(call, 1, TIMED_CALLS, seconds=math.inf, warm_up=0)["p50_ms"]
        return output[0, :, :height, :width].cpu(), feature[:, :rows, :columns].cpu(), milliseconds


def networks_of(paths: Sequence[str], direction: str = "A") -> tuple[dict[str, Path], dict[str, Any], list[str]]:
    """Find the generators to compare.

    Args:
        paths: files of weights, and folders of runs: their teacher, and every student that has been saved.
        direction: "A" or "B": which generators of a CycleGAN run.

    Returns:
        (label -> file, the configuration of the first run, notes on files that are missing).

    Raises:
        ValueError: a folder contains no generator, or a path does not exist.
    """
    found: dict[str, Path] = {}
    config: dict[str, Any] = {}
    notes: list[str] = []
    for text in paths:
        path = expand_user(text)
        if not path.exists():
            raise ValueError(f"{path} does not exist: expected a file of weights, or the folder of a run, runs/<name>")
        if path.is_file():
            short = path.stem.removeprefix("latest_net_")
            _add(found, short if len(paths) == 1 else f"{path.parent.name}/{path.name}".removeprefix("/"), path)
            continue
        own = _read_config(path / "config.yaml")
        config = config or own
        for file, is_teacher in _files_of_run(path, own, direction, notes):
            if is_teacher:
                label = "teacher"
            else:
                label = path.resolve().name if file.parent == path else file.parent.relative_to(path).as_posix()
            _add(found, label, file)
    if direction == "B" and not any(file.stem.endswith("G_B") for file in found.values()):
        notes.append("--direction B has no effect: it selects generators of a CycleGAN run")
    return found, config, notes


def _files_of_run(run: Path, config: Mapping[str, Any], direction: str, notes: list[str]) -> list[tuple[Path, bool]]:
    """Return the generators of a run as (file, whether it is the teacher), the teacher first."""
    teacher: Path | None = None
    if given := config.get("teacher"):
        found = teacher_files(str(config.get("model")), str(given), config.get("teacher_B"))
        teacher = found.get("G", found.get(f"G_{direction}"))
    if teacher and not teacher.is_file():
        notes.append(f"the teacher {teacher} does not exist any more: left out")
        teacher = None
    files = [(teacher, True)] if teacher else []
    names = ("latest_net_G.pth", f"latest_net_G_{direction}.pth")
    own = sorted(file for name in names for file in run.rglob(name))
    own.sort(key=lambda file: file.parent != run / "teacher")
    files += [(file, file.parent == run / "teacher") for file in own]
    if not files:
        raise ValueError(
            f"{run} contains no generator: expected {' or '.join(names)} in it or in its folders, as srpkd train "
            "writes them; or pass files of weights"
        )
    return files


def _read_config(path: Path) -> dict[str, Any]:
    """Return the options in a run's config.yaml, or {} if there is none that can be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _add(found: dict[str, Path], label: str, path: Path) -> None:
    """Add a network under a label that is not taken yet."""
    number, unique = 1, label
    while unique in found:
        number += 1
        unique = f"{label} ({number})"
    found[unique] = path


def png(pixels: np.ndarray) -> str:
    """Return pixels (H, W, 3) as the data URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def layers_of(config: Mapping[str, Any], labels: Iterable[str]) -> dict[str, str]:
    """Return the layer of each network that the run in ``config`` relates, label -> name; {} means the default."""
    layers = config.get("layers")
    if not isinstance(layers, dict) or not layers:
        return {}
    student, teacher = next(iter(layers.items()))
    return {label: str(teacher if re.fullmatch(r"teacher( \(\d+\))?", label) else student) for label in labels}


def samples_of(paths: Iterable[Path], direction: str = "A") -> dict[str, Path]:
    """Return the input images on the pages of runs, caption -> file, without those that do not exist.

    Those of a CycleGAN run are the inputs of its generator ``direction``.
    """
    samples: dict[str, Path] = {}
    other = {"A": "B to A", "B": "A to B"}[direction]
    for run in paths:
        report, _ = read_report(expand_user(run) / "report.json")
        for sample in report.get("samples") or []:
            if sample["caption"].endswith(other):
                continue
            for image in sample["images"]:
                file = expand_user(run) / image["file"]
                if image["label"] == "input" and file.is_file():
                    samples.setdefault(sample["caption"], file)
    return samples
