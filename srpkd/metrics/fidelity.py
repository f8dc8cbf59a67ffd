"""FID and KID of generated images, computed by torch-fidelity."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..arguments import check_type, check_whole
from ..data.images import ImageFiles
from ..data.picture import byte_levels
from ..extras import require
from ..files import expand_user, writing
from ..models.checkpoints import CheckpointError, load_weights

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network that defines FID and KID


def fidelity(
    generated: ImageFiles,
    real: Mapping[str, Sequence[ImageFiles]],
    *,
    fid: bool = True,
    kid: bool = True,
    inception_weights: str | Path | None = None,
    kid_subset_size: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    feature_extractor: str | None = None,
) -> dict[str, dict[str, float]]:
    """Compute the Fréchet and the kernel Inception distance between generated and real images, with torch-fidelity.

    FID: Heusel et al. 2017; KID: Bińkowski et al. 2018. Images of more than 8 bits per channel are rounded to 8 bits.

    Args:
        generated: the generated images.
        real: name -> the sets of real images that together form one reference, such as train and test.
        fid, kid: which distances to compute.
        inception_weights: torch-fidelity's file of Inception weights; by default the one in torch's cache.
        kid_subset_size: images per subset of KID; by default 1000, or as many as there are.
        batch_size: images per forward pass, if all images have the same size.
        device: "cpu", "cuda", "cuda:1", ...; torch-fidelity runs on the CPU instead of other devices.
        feature_extractor: name of a feature extractor that is registered with torch-fidelity, instead of Inception.

    Returns:
        For each name of `real`: {"FID", "KID", "KID std", "KID subset"}.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: the Inception weights are missing; the message says where to download and put them.
        CheckpointError: the file of weights cannot be used.
        WriteError: the disk of the temporary files is full.
        ValueError, TypeError: an invalid argument, or fewer images than two or than a subset.
    """
    check_type("generated", generated, ImageFiles, "ImageFiles(paths)")
    check_type("real", real, Mapping, "{name: [ImageFiles(paths), ...], ...}")
    if not real or not all(isinstance(parts, Sequence) and parts for parts in real.values()):
        raise ValueError(
            f"real={dict(real)!r}: expected {{name: [ImageFiles(paths), ...], ...}} with at least one name"
        )
    if not (fid or kid):
        raise ValueError("fid and kid are both False, expected at least one of them to be True")
    check_whole("batch_size", batch_size, least=1)
    library = require("torch_fidelity", "metrics", "FID and KID")
    weights = None if feature_extractor else inception_file(inception_weights)
    counts = {name: sum(map(len, parts)) for name, parts in real.items()}
    check_counts(len(generated), min(counts.values()), kid_subset_size)
    if not all(images.have_same_size() for images in [generated, *(part for parts in real.values() for part in parts)]):
        batch_size = 1
    results: dict[str, dict[str, float]] = {}
    on_gpu = device.startswith("cuda")
    with (
        tempfile.TemporaryDirectory() as cache,  # the features of the generated images are computed once
        writing(cache),
        torch.cuda.device(device) if on_gpu else nullcontext(),  # torch-fidelity uses the current GPU
    ):
        for name, parts in real.items():
            subset = kid_subset_size or min(1000, len(generated), counts[name])
            found: Mapping[str, Any] = library.calculate_metrics(
                input1=_Bytes(generated),
                input2=ConcatDataset([_Bytes(part) for part in parts]),
                input1_cache_name="generated",
                cache_root=cache,
                fid=fid,
                kid=kid,
                kid_subset_size=subset,
                batch_size=batch_size,
                cuda=on_gpu,
                save_cpu_ram=not on_gpu,  # no loader processes where the network is the bottleneck
                feature_extractor=feature_extractor or INCEPTION,
                feature_extractor_weights_path=weights,
                verbose=False,
            )
            results[name] = {"FID": found["frechet_inception_distance"]} if fid else {}
            if kid:
                mean, std = (found[f"kernel_inception_distance_{statistic}"] for statistic in ("mean", "std"))
                results[name] |= {"KID": mean, "KID std": std, "KID subset": subset}
    return results


def check_counts(generated: int, real: int, kid_subset_size: int | None) -> None:
    """Raise a ValueError if these are too few images for FID and KID, or fewer than a subset."""
    fewest = min(generated, real)
    if fewest < 2:
        raise ValueError(f"FID and KID need at least two images; received {generated} and {real}")
    if kid_subset_size is not None and not 2 <= kid_subset_size <= fewest:
        raise ValueError(f"--kid_subset_size {kid_subset_size}: expected 2 to {fewest}, the number of images")


class _Bytes(Dataset[Tensor]):
    """Images as uint8, which the Inception network of FID and KID takes; deeper images are rounded."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return byte_levels(self.images[index])


def inception_file(path: str | Path | None) -> str:
    """Return the path of the Inception weights, validated before torch-fidelity unpickles them.

    Args:
        path: by default the file in torch's cache.

    Raises:
        ImportError, FileNotFoundError, CheckpointError: as `fidelity` raises.
    """
    require("torch_fidelity", "metrics", "FID and KID")
    url = import_module("torch_fidelity.feature_extractor_inceptionv3").URL_INCEPTION_V3
    default = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    file = expand_user(path) if path else default
    if not file.exists():
        raise FileNotFoundError(
            f"the Inception weights for FID and KID are not at {file}. Download {url} and put it at {default}, or give "
            "its path: --inception_weights PATH"
        )
    _check_inception(file, file.stat().st_mtime_ns, url)
    return str(file)


@functools.lru_cache(maxsize=1)  # srpkd evaluate checks them first, and `fidelity` again
def _check_inception(file: Path, modified: int, url: str) -> None:
    """Raise a CheckpointError for other weights; ``modified`` tells one version of the file from another."""
    if "Mixed_7c.branch_pool.conv.weight" not in load_weights(file):
        raise CheckpointError(f"{file} holds other weights than torch-fidelity's Inception: download {url}")
