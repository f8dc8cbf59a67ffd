"""FID and KID of generated images, by torch-fidelity."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset

from ..arguments import check_type, check_whole
from ..data.folders import Images
from ..extras import require
from ..models.checkpoints import CheckpointError, load_weights

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network that FID and KID are defined by


def fidelity(
    generated: Images,
    real: Mapping[str, Sequence[Images]],
    *,
    fid: bool = True,
    kid: bool = True,
    inception_weights: str | Path | None = None,
    kid_subset_size: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    feature_extractor: str | None = None,
) -> dict[str, dict[str, float]]:
    """Fréchet and kernel Inception distance of generated images to real ones, by torch-fidelity.

    Args:
        generated: the images.
        real: name -> the sets of images that together are compared with, such as train and test.
        inception_weights: torch-fidelity's file of Inception weights; by default the one in torch's cache.
        kid_subset_size: images a subset of KID; by default 1000, or as many as there are.
        batch_size: images a pass, where all have one size.
        device: "cpu" or "cuda".
        feature_extractor: one registered with torch-fidelity, in place of Inception.

    Returns:
        Per name ``{"FID": ..., "KID": ..., "KID std": ..., "KID subset": ...}``.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: there are no Inception weights; says which file to put where.
        CheckpointError, ValueError: the file or the images are not what they should be.
        TypeError: an argument of another kind.
    """
    check_type("generated", generated, Images, "Images(paths)")
    check_type("real", real, Mapping, "{name: [Images(paths), ...], ...}")
    if not real or not all(isinstance(parts, Sequence) and parts for parts in real.values()):
        raise ValueError(f"real={dict(real)!r}: expected {{name: [Images(paths), ...], ...}}, with one name at least")
    if not (fid or kid):
        raise ValueError("fid and kid are both False: nothing to compute")
    check_whole("batch_size", batch_size, least=1)
    library = require("torch_fidelity", "metrics", "FID and KID")
    weights = None if feature_extractor else _inception(inception_weights)
    together = {name: parts[0] if len(parts) == 1 else ConcatDataset(parts) for name, parts in real.items()}
    if not all(images.one_size() for images in [generated, *(part for parts in real.values() for part in parts)]):
        batch_size = 1
    results = {}
    with tempfile.TemporaryDirectory() as cache:  # the features of the generated images are taken once
        for name, images in together.items():
            if min(len(generated), len(images)) < 2:
                raise ValueError(f"FID and KID need two images at least; received {len(generated)} and {len(images)}")
            subset = kid_subset_size or min(1000, len(generated), len(images))
            found = library.calculate_metrics(
                input1=generated,
                input2=images,
                input1_cache_name="generated",
                cache_root=cache,
                fid=fid,
                kid=kid,
                kid_subset_size=subset,
                batch_size=batch_size,
                cuda=device.startswith("cuda"),
                save_cpu_ram=not device.startswith("cuda"),  # no loader processes where the network is the slow part
                feature_extractor=feature_extractor or INCEPTION,
                feature_extractor_weights_path=weights,
                verbose=False,
            )
            results[name] = {"FID": found["frechet_inception_distance"]} if fid else {}
            if kid:
                mean, std = (found[f"kernel_inception_distance_{kind}"] for kind in ("mean", "std"))
                results[name] |= {"KID": mean, "KID std": std, "KID subset": subset}
    return results


def _inception(path: str | Path | None) -> str:
    """The file of weights, looked at before torch-fidelity unpickles it."""
    url = require("torch_fidelity.feature_extractor_inceptionv3", "metrics", "FID and KID").URL_INCEPTION_V3
    usual = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    file = Path(path).expanduser() if path else usual
    if not file.exists():
        raise FileNotFoundError(
            f"the Inception weights that FID and KID are measured with are not at {file}. Download {url} and put it "
            f"at {usual}, or give its path: --inception_weights PATH"
        )
    if "Mixed_7c.branch_pool.conv.weight" not in load_weights(file):
        raise CheckpointError(f"{file} holds other weights than torch-fidelity's Inception: download {url}")
    return str(file)
