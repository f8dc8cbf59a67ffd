"""How good generated images are: ``python -m srpkd.evaluate generated real``.

FID and KID are computed by torch-fidelity and SSIM by torchmetrics (``pip install 'srpkd[metrics]'``). The training
run's own scores are in ``srpkd.evaluation``.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from .arguments import check_type, check_whole, default_device, device, json_file, positive
from .checkpoint import SUFFIXES, CheckpointError, atomic_write, load_generator, load_weights
from .data.folders import DataError, image_files, open_image, read_image, split_pair
from .data.world import PALETTE
from .extras import require
from .metrics import class_accuracy, confusion_matrix, mean_iou, nearest_colour, pixel_accuracy, psnr
from .report import format_table
from .translate import TRAIN_MODE_NORM, translate_folder

METRICS = ("fid", "kid", "psnr", "ssim", "miou", "segmentation")
INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network that FID and KID are defined by

# R G B name, as a palette file has them: the 19 classes that are scored, then what is not
CITYSCAPES = """
128 64 128 road
244 35 232 sidewalk
70 70 70 building
102 102 156 wall
190 153 153 fence
153 153 153 pole
250 170 30 traffic light
220 220 0 traffic sign
107 142 35 vegetation
152 251 152 terrain
70 130 180 sky
220 20 60 person
255 0 0 rider
0 0 142 car
0 0 70 truck
0 60 100 bus
0 80 100 train
0 0 230 motorcycle
119 11 32 bicycle
0 0 0 ignore
111 74 0 ignore
81 0 81 ignore
250 170 160 ignore
230 150 140 ignore
180 165 180 ignore
150 100 100 ignore
150 120 90 ignore
0 0 90 ignore
0 0 110 ignore
"""


class Palette(NamedTuple):
    """Colours (M, 3) in 0..255, of which the first `classes` are scored and the others ignored in the truth."""

    colours: Tensor
    classes: int


class Images(Dataset):
    """Image files as uint8 tensors (3, H, W).

    Args:
        paths: the files.
        size: scale every image to size x size; None leaves it.
        cut: (image, path) -> the part of it that counts.
        resample: how they are scaled; NEAREST keeps the colours of label maps.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        cut: Callable[[Image.Image, str], Image.Image] | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> None:
        self.paths, self.size, self.cut, self.resample = list(paths), size, cut, resample

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.paths[index])
        image = self.cut(image, self.paths[index]) if self.cut else image
        if self.size:
            image = image.resize((self.size, self.size), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def one_size(self) -> bool:
        """Whether all images have one size; reads no pixels."""
        if self.size:
            return True
        sizes = set()
        for path in self.paths:
            with open_image(path) as image:
                sizes.add(image.size)
        return len(sizes) == 1


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


def likeness(pairs: Iterator[tuple[Tensor, Tensor]], names: Sequence[str] = ("psnr", "ssim")) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM (Wang et al. 2004, 11 x 11 Gaussian window) of pairs of uint8 images (3, H, W)."""
    if "ssim" in names:
        ssim = require("torchmetrics.functional.image", "metrics", "SSIM").structural_similarity_index_measure
    sums, count = dict.fromkeys(names, 0.0), 0
    for ours, theirs in pairs:
        if "psnr" in names:
            sums["psnr"] += psnr(ours[None], theirs[None], data_range=255.0)
        if "ssim" in names:
            if min(ours.shape[1:]) < 11:
                raise ValueError(f"SSIM needs 11 x 11 pixels at least; received an image of {tuple(ours.shape[1:])}")
            sums["ssim"] += ssim(ours[None].double(), theirs[None].double(), data_range=255.0).item()
        count += 1
    return {name.upper(): total / count for name, total in sums.items()}


def label_scores(pairs: Iterator[tuple[Tensor, Tensor]], palette: Palette) -> dict[str, float]:
    """Scores, in percent, of painted label maps: each pixel's class is that of the nearest colour of the palette."""
    maps = (tuple(nearest_colour(image[None], palette.colours) for image in pair) for pair in pairs)
    return _scores((pred, true, palette.classes) for pred, true in maps)


def segmentation_scores(
    images: Images, labels: Sequence[Tensor], segmenter: Callable[[Tensor], Any], device: str = "cpu"
) -> dict[str, float]:
    """FCN scores, in percent: how well a segmentation network finds the true classes in generated photos.

    Args:
        images: generated photos.
        labels: the true class of each pixel, (H, W) integers for each; other than 0..K-1 is ignored.
        segmenter: photos (1, 3, H, W) in [0, 1] -> logits (1, K, h, w), or a mapping with them as "out"; what
            normalisation it needs is its own. Logits are scaled to the labels' size.
    """

    @torch.no_grad()
    def maps() -> Iterator[tuple[Tensor, Tensor, int]]:
        for image, label in zip(images, labels):
            logits = segmenter(image[None].to(device).float() / 255)
            logits = logits["out"] if isinstance(logits, Mapping) else logits
            if not isinstance(logits, Tensor) or logits.ndim != 4:
                received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the segmenter gave {received}; expected logits (1, K, h, w)")
            logits = F.interpolate(logits.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
            yield logits.argmax(1).cpu(), label[None], logits.shape[1]

    return _scores(maps())


def _scores(maps: Iterable[tuple[Tensor, Tensor, int]]) -> dict[str, float]:
    """Scores of (predicted, true, number of classes); another class is wrong if predicted, ignored if true."""
    total: Any = 0
    for pred, true, classes in maps:
        scored = (true >= 0) & (true < classes)
        total = total + confusion_matrix(pred[scored].clamp_max(classes), true[scored], classes + 1)
    return {
        "mIoU": 100 * mean_iou(total, classes),
        "pixel accuracy": 100 * pixel_accuracy(total),
        "class accuracy": 100 * class_accuracy(total),
    }


def load_segmenter(path: str | Path, device: str = "cpu") -> nn.Module:
    """A segmentation network from an exported program (.pt2, ``torch.export.save``) or TorchScript (other names).

    A program is what its file says it is, and ``torch.export.load`` may even unpickle parts of it: unlike a file of
    weights, take it from a source that you trust alone.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"--segmenter {path}: there is no such file")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module().to(device)
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # either loader may raise anything on other bytes
        raise ValueError(
            f"--segmenter {path}: neither TorchScript (torch.jit.save) nor, as .pt2, an exported program "
            f"(torch.export.save): {str(error).splitlines()[0]}"
        ) from error


def read_palette(name: str) -> Palette:
    """The palette "world" (of the generated data), "cityscapes", or that of a file of lines ``R G B name``.

    A colour named ignore or void is left out where the truth has it. Lines that begin with # are comments.

    Raises:
        ValueError: no such file, or a line that is not like that.
    """
    if name == "world":
        return Palette(PALETTE.clone(), len(PALETTE))
    if name == "cityscapes":
        text = CITYSCAPES
    else:
        try:
            text = Path(name).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--palette {name}: expected world, cityscapes, or a file of lines 'R G B name' ({error})"
            ) from error
    scored, ignored = [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)(?:[\s,]+(.*))?", line)
        if not match or max(map(int, match.groups()[:3])) > 255:
            raise ValueError(f"--palette {name}: {line!r} is not a line 'R G B name' with numbers of 0 to 255")
        colour = [int(value) for value in match.groups()[:3]]
        (ignored if match[4] in ("ignore", "void") else scored).append(colour)
    if not scored:
        raise ValueError(f"--palette {name} has no colours: expected lines 'R G B name'")
    return Palette(torch.tensor(scored + ignored, dtype=torch.uint8), len(scored))


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
            add(likeness(both(Image.Resampling.BICUBIC), names), "test", len(pairs))
        if "miou" in wanted:
            if not options.palette:
                raise ValueError("miou needs --palette: world, cityscapes, or a file of lines 'R G B name'")
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
    add("--palette", help="world, cityscapes, or a file of lines 'R G B name'; the name ignore leaves a colour out")
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
