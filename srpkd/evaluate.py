"""How good generated images are: ``python -m srpkd.evaluate generated real``.

FID and KID are computed by torch-fidelity and SSIM by torchmetrics (``pip install 'srpkd[metrics]'``). The training
run's own scores are in ``srpkd.training.validation``.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .arguments import default_device, device, json_file, positive
from .data.folders import DataError, Images, image_files, open_image, split_pair
from .files import atomic_write
from .metrics.fidelity import fidelity
from .metrics.pixels import nearest_colour, similarity
from .metrics.segmentation import Palette, label_scores, load_segmenter, read_palette, segmentation_scores
from .models.checkpoints import SUFFIXES, load_generator
from .reporting.table import format_table
from .translate import TRAIN_MODE_NORM, translate_folder

METRICS = ("fid", "kid", "psnr", "ssim", "miou", "segmentation")


def pair_up(generated: Sequence[str], real: Sequence[str]) -> list[tuple[str, str]]:
    """Files of one name: suffixes aside, and the endings _fake_B, _real_B, ... that the public code writes.

    Raises:
        ValueError: a generated image has no real one, or two of them have one name.
    """

    def key(path: str) -> str:
        return re.sub(r"_(fake|real|rec)(_[AB])?$", "", Path(path).stem)

    for paths in (generated, real):
        if len({key(path) for path in paths}) < len(paths):
            raise ValueError(f"two images beside {paths[0]} have one name, so they cannot be paired by name")
    partner = {key(path): path for path in real}
    if alone := [path for path in generated if key(path) not in partner]:
        raise ValueError(
            f"{len(alone)} of {len(generated)} generated images have no real image of the same name, such as "
            f"{alone[0]}; the real ones are like {real[0]}"
        )
    return [(path, partner[key(path)]) for path in generated]


def find_images(where: str) -> list[str]:
    """The image files in a folder and below it, or those that a pattern like ``results/*_fake_B.png`` names.

    Raises:
        ValueError: there are none.
    """
    path = os.path.expanduser(where)
    found = image_files(path) if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"{where}: no images there; expected a folder of images, or a pattern like 'out/*_fake_B.png'")
    return found


def _half(image: Image.Image, path: str, side: int) -> Image.Image:
    return split_pair(image, path)[side]


def _paired(ours: Images, theirs: Images) -> Iterator[tuple[Tensor, Tensor]]:
    for index in tqdm(range(len(ours)), unit="pair", desc="comparing"):
        one, other = ours[index], theirs[index]
        if one.shape != other.shape:
            raise ValueError(
                f"{ours.paths[index]} has {tuple(one.shape[1:])} pixels and {theirs.paths[index]} "
                f"{tuple(other.shape[1:])}: --size N scales both to N x N"
            )
        yield one, other


def _read_classes(path: str, palette: Palette | None) -> Tensor:
    """The class of each pixel of a label file, (H, W): by the palette, -1 for what it ignores, or as its values are."""
    if palette:
        classes = nearest_colour(Images([path])[0][None], palette.colours)[0]
        return classes.masked_fill(classes >= palette.classes, -1)
    with open_image(path) as image:
        if image.mode not in ("L", "P", "I", "I;16"):
            raise DataError(f"{path} is a colour image ({image.mode}): give its --palette, or files of class numbers")
        return torch.from_numpy(np.array(image).astype(np.int64))


def evaluate_images(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for: ``{"rows": [{"metric", "value", "against", "images"}], "notes": [...]}``."""
    cuts = [partial(_half, side=side) for side in (0, 1)] if options.aligned else [None, None]
    before, after = cuts[::-1] if options.direction == "BtoA" else cuts
    with tempfile.TemporaryDirectory() as scratch:
        source = options.generated
        if source.endswith(SUFFIXES):
            if not options.input:
                raise ValueError(f"{source} is a generator: give the folder of the images that it translates, --input")
            net = load_generator(source, train_mode_norm=options.train_mode_norm).to(options.device)
            _, skipped = translate_folder(net, options.input, scratch, size=options.size, cut=before, force=True)
            if skipped:
                raise ValueError(f"images that cannot be read: {'; '.join(skipped)}")
            source = scratch
        elif options.input:
            raise ValueError(f"--input is for a generator's weights ({', '.join(SUFFIXES)}); {source} is a folder")
        elif options.train_mode_norm:
            raise ValueError(f"--train_mode_norm is for a generator's weights; {source} is images already made")
        return _evaluate(options, find_images(source), find_images(options.real), after)


def _evaluate(options: argparse.Namespace, generated: list[str], real: list[str], cut: Any) -> dict[str, Any]:
    size, wanted = options.size, options.metrics
    rows, notes = [], []

    def add(scores: Mapping[str, float], against: str, count: int) -> None:
        rows.extend({"metric": n, "value": v, "against": against, "images": count} for n, v in scores.items())

    if {"fid", "kid"} & set(wanted):
        truth = {"test": [Images(real, size, cut)]}
        if options.real_train:
            truth["train + test"] = [Images(find_images(options.real_train), size, cut), *truth["test"]]
        scores = fidelity(
            Images(generated, size),
            truth,
            fid="fid" in wanted,
            kid="kid" in wanted,
            inception_weights=options.inception_weights,
            kid_subset_size=options.kid_subset_size,
            batch_size=options.batch_size,
            device=options.device,
        )
        for name, found in scores.items():
            if subset := found.pop("KID subset", None):
                notes.append(f"KID against {name}: mean and deviation of 100 subsets of {subset} images.")
            add(found, name, len(generated))
        if "fid" in wanted and len(generated) < 2048:
            notes.append(
                f"FID of {len(generated)} images, fewer than its 2,048 features, is biased upwards: compare it only "
                "with that of as many images. KID is not."
            )
    if {"psnr", "ssim", "miou"} & set(wanted):
        pairs = pair_up(generated, real)

        def both(resample: Image.Resampling) -> Iterator[tuple[Tensor, Tensor]]:
            ours, theirs = zip(*pairs)
            return _paired(Images(ours, size, resample=resample), Images(theirs, size, cut, resample))

        if names := [name for name in ("psnr", "ssim") if name in wanted]:
            add(similarity(both(Image.Resampling.BICUBIC), names), "test", len(pairs))
        if "miou" in wanted:
            if not options.palette:
                raise ValueError("miou needs --palette: synthetic, cityscapes, or a file of lines 'R G B name'")
            add(label_scores(both(Image.Resampling.NEAREST), read_palette(options.palette)), "test", len(pairs))
    if "segmentation" in wanted:
        if not (options.segmenter and options.labels):
            raise ValueError("segmentation needs --segmenter, a network's file, and --labels, true classes of pixels")
        palette = read_palette(options.palette) if options.palette else None
        pairs = pair_up(generated, find_images(options.labels))
        labels = (_read_classes(path, palette) for _, path in tqdm(pairs, unit="image", desc="segmenting"))
        network = load_segmenter(options.segmenter, options.device)
        scores = segmentation_scores(Images([a for a, _ in pairs], size), labels, network, options.device)
        add(scores, "labels", len(pairs))
    return {"rows": rows, "notes": notes}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd evaluate",
        description="Score generated images: FID and KID to real ones; PSNR and SSIM to the true image of the same\n"
        "name; mIoU of painted label maps by palette; FCN scores of generated photos by a segmentation network.",
        epilog="examples:\n"
        "  srpkd evaluate zebras horse2zebra/testB --real_train horse2zebra/trainB\n"
        "  srpkd evaluate latest_net_G.pth facades/test --aligned --input facades/test --metrics psnr ssim\n"
        "  srpkd evaluate 'images/*_fake_B.png' 'images/*_real_B.png' --metrics miou --palette cityscapes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("generated", help="folder or pattern of generated images, or a generator's weights with --input")
    add("real", help="folder or pattern of real test images")
    add("--input", metavar="FOLDER", help="the images that the generator translates, at --size or as they are")
    add("--train_mode_norm", action="store_true", help=f"of the generator: {TRAIN_MODE_NORM}")
    add("--metrics", nargs="+", choices=METRICS, default=["fid", "kid"], help="what to compute (default: fid kid)")
    add("--real_train", metavar="FOLDER", help="real training images: FID and KID against train + test too")
    add("--aligned", action="store_true", help="--input and real images are pairs side by side: A left, B right")
    add("--direction", choices=("AtoB", "BtoA"), default="AtoB", help="of aligned pairs (default: %(default)s)")
    add("--size", type=positive, help="scale all images to SIZE x SIZE first (default: as they are)")
    add("--inception_weights", metavar="PATH", help="torch-fidelity's file; by default that in torch's cache")
    add("--kid_subset_size", type=positive, help="images a subset of KID (default: 1000, or as many as there are)")
    add("--palette", help="synthetic, cityscapes, or a file of lines 'R G B name'; the name ignore leaves a colour out")
    add(
        "--segmenter",
        metavar="PATH",
        help="photos (1, 3, H, W) in [0, 1] -> logits: TorchScript or .pt2, programs that are run: trust their source",
    )
    add("--labels", metavar="FOLDER", help="for segmentation: files of class numbers, or of --palette colours")
    add("--batch_size", type=positive, default=32, help="images a pass of Inception (default: %(default)s)")
    add("--device", type=device, default=default_device(), help="cpu, cuda, ... (default here: %(default)s)")
    add("--json", type=json_file, metavar="FILE", help="write the results there too")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        result = evaluate_images(options)
        print(table_of(result))  # first, lest it be lost with a file that cannot be written
        if options.json:
            with atomic_write(options.json) as file:
                file.write(json.dumps(result, indent=1).encode())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def table_of(result: Mapping[str, Any]) -> str:
    """What `evaluate_images` gives, as a table."""
    columns = [
        {"key": "metric", "label": "metric", "format": ""},
        {"key": "value", "label": "value", "format": ".4f"},
        {"key": "against", "label": "against", "format": ""},
        {"key": "images", "label": "images", "format": ","},
    ]
    return format_table({"columns": columns, "rows": result["rows"], "notes": result["notes"]})


if __name__ == "__main__":
    main()
