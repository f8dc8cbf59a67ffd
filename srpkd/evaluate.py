"""Score generated images: ``python -m srpkd.evaluate generated real``.

FID and KID are computed by torch-fidelity, SSIM by torchmetrics (``pip install "srpkd[metrics]"``). The scores that a
training run reports are computed in ``srpkd.training.validation``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from PIL.Image import Resampling
from torch import Tensor

from .arguments import add_device, add_train_mode_norm, exit_on_error, json_file, parse, positive
from .data import Direction
from .data.images import Crop, Headers, ImageFiles, half_width, left_half, read_headers, right_half
from .data.listing import find_images, pair_by_name
from .files import expand_user, write_json
from .metrics.fidelity import check_counts, fidelity, inception_file
from .metrics.pixels import PIXEL_METRICS, check_window, require_ssim, similarity
from .metrics.segmentation import (
    Palette,
    label_scores,
    load_segmenter,
    read_label_map,
    read_palette,
    segmentation_scores,
)
from .models.checkpoints import SUFFIXES, load_generator
from .models.inference import translate_folder
from .progress import ProgressBar
from .reporting.table import format_table

METRICS = ("fid", "kid", *PIXEL_METRICS, "miou", "segmentation")
# option -> the metrics that use it
METRICS_OF = {
    "real_train": ("fid", "kid"),
    "inception_weights": ("fid", "kid"),
    "kid_subset_size": ("kid",),
    "palette": ("miou", "segmentation"),
    "segmenter": ("segmentation",),
    "labels": ("segmentation",),
}
FID_FEATURES = 2048  # of fewer images the covariance is singular


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Compute the metrics of a command line: {"rows": [{"metric", "value", "against", "images"}], "notes": [str]}."""
    _check_combination(options)
    # before what takes long: an image that cannot be opened ends it, and the results would be lost
    folders = (options.input or options.generated, options.real, options.real_train)
    found = {folder: _find(folder) for folder in dict.fromkeys(filter(None, folders))}
    with tempfile.TemporaryDirectory() as scratch:
        result = _scores(options, found, scratch)
    for folder, images in found.items():
        if images.headers.further_frames:
            result["notes"].append(f"{images.headers.further_frames}.")
        if images.others:
            result["notes"].append(f"{folder}: {images.others} left out.")
    return result


class _Images(NamedTuple):
    """Images, what their headers tell, and how many other files are next to them, in words."""

    paths: list[str]
    headers: Headers
    others: str

    def dataset(self, size: int | None, crop: Crop | None = None) -> ImageFiles:
        return ImageFiles(self.paths, size, crop, headers=self.headers)


def _find(where: str) -> _Images:
    paths, others = find_images(where)
    return _Images(paths, read_headers(paths), others)


def _translated(options: argparse.Namespace, crop: Crop | None, folder: str) -> _Images:
    """Translate the images of --input, and return the results, which are written to a folder."""
    net = load_generator(options.generated, train_mode_norm=options.train_mode_norm).to(options.device)
    done = translate_folder(
        net, options.input, folder, size=options.size, crop=crop, force=True, lossless=True, sync="nothing"
    )
    if done.skipped:
        raise ValueError(f"images that cannot be translated: {'; '.join(done.skipped)}")
    return _Images(done.written, read_headers(done.written), "")


def _check_combination(options: argparse.Namespace) -> None:
    """Raise a ValueError if a metric needs another option, or an option has no effect without another."""
    metrics = set(options.metrics)
    if "miou" in metrics and not options.palette:
        raise ValueError("miou needs --palette: synthetic, cityscapes, or a file of lines 'R G B name'")
    if "segmentation" in metrics and not (options.segmenter and options.labels):
        raise ValueError("segmentation needs --segmenter, the file of a network, and --labels, the true classes")
    for name, users in METRICS_OF.items():
        if getattr(options, name) is not None and not metrics.intersection(users):
            raise ValueError(
                f"--{name} has no effect on {', '.join(options.metrics)}: add {' or '.join(users)} to --metrics, or "
                f"leave out --{name}"
            )
    if options.direction == "BtoA" and not options.aligned:
        raise ValueError("--direction BtoA is that of pairs side by side: add --aligned, or leave out --direction")
    given, is_generator = options.generated, options.generated.endswith(SUFFIXES)
    if is_generator and not options.input:
        raise ValueError(f"{given} is a generator: give the folder of the images to translate, --input")
    if options.input and not is_generator:
        raise ValueError(
            f"--input {options.input} needs a generator's weights ({', '.join(SUFFIXES)}) to translate the images; "
            f"received {given}"
        )
    if options.input and not expand_user(options.input).is_dir():
        raise ValueError(f"--input {options.input} is not a folder: give the folder of the images to translate")
    if options.train_mode_norm and not is_generator:
        raise ValueError(f"--train_mode_norm needs a generator's weights; received images, {given}")


def _crops(options: argparse.Namespace) -> tuple[Crop | None, Crop | None]:
    """Return what is used of an input image and of a real one."""
    if not options.aligned:
        return None, None
    return (left_half, right_half) if options.direction == "AtoB" else (right_half, left_half)


def _sizes(images: _Images, crop: Crop | None) -> dict[str, tuple[int, int]]:
    """Return path -> (width, height) of what is used of an image; raise a DataError for half of an odd width."""
    sizes = images.headers.sizes.items()
    return {path: (half_width(width, path) if crop else width, height) for path, (width, height) in sizes}


def _check_sizes(
    pairs: Iterable[tuple[str, str]], sizes: Mapping[str, tuple[int, int]], real: Mapping[str, tuple[int, int]]
) -> None:
    """Raise a ValueError if the images of a pair differ in size."""
    for one, other in pairs:
        if sizes[one] != real[other]:
            has, expected = ("{} x {}".format(*size) for size in (sizes[one], real[other]))
            raise ValueError(f"{one} has {has} pixels and {other} {expected}: use --size N to scale both to N x N")


def _scores(options: argparse.Namespace, found: Mapping[str, _Images], scratch: str) -> dict[str, Any]:
    metrics, (source_crop, crop) = set(options.metrics), _crops(options)
    generated, real = found[options.input or options.generated], found[options.real]
    # before what takes long: an error would end it, and the results would be lost
    if {"fid", "kid"} & metrics:
        inception_file(options.inception_weights)
        check_counts(len(generated.paths), len(real.paths), options.kid_subset_size)
    if "ssim" in metrics:
        require_ssim()
    palette = read_palette(options.palette) if options.palette else None
    segmenter = load_segmenter(options.segmenter, options.device) if options.segmenter else None
    label_maps = find_images(options.labels).images if options.labels else []
    pairs = pair_by_name(generated.paths, real.paths) if {*PIXEL_METRICS, "miou"} & metrics else []
    labelled = pair_by_name(generated.paths, label_maps, "label map") if label_maps else []
    read_headers([path for _, path in labelled])
    for _, path in labelled[:1]:
        read_label_map(path, palette)
    sizes, real_sizes = _sizes(generated, source_crop if options.input else None), _sizes(real, crop)
    if real_train := found.get(options.real_train):
        _sizes(real_train, crop)
    if not options.size:
        _check_sizes(pairs, sizes, real_sizes)
    if "ssim" in metrics:
        check_window(options.size or min(min(real_sizes[other]) for _, other in pairs))

    if options.input:  # the results have the names, sizes and order of the inputs
        inputs, generated = generated, _translated(options, source_crop, scratch)
        result_of = dict(zip(inputs.paths, generated.paths))
        pairs, labelled = ([(result_of[path], other) for path, other in group] for group in (pairs, labelled))
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    segmented: list[dict[str, Any]] = []
    if segmenter is not None:  # before the distances, which take long: its output may be refused
        photos, label_files = zip(*labelled)
        with ProgressBar(label_files, unit="image", desc="segmenting") as progress:  # closed before an error
            labels = (read_label_map(path, palette) for path in progress)
            scores = segmentation_scores(ImageFiles(photos, options.size), labels, segmenter, options.device)
        segmented = _rows(scores, "labels", len(labelled))
    if {"fid", "kid"} & metrics:
        rows, notes = _distances(options, generated, real, real_train, crop)
    if pairs:
        rows += _pair_scores(options, pairs, crop, palette)
    return {"rows": rows + segmented, "notes": notes}


def _rows(scores: Mapping[str, float], against: str, count: int) -> list[dict[str, Any]]:
    return [{"metric": name, "value": value, "against": against, "images": count} for name, value in scores.items()]


def _distances(
    options: argparse.Namespace, generated: _Images, real: _Images, real_train: _Images | None, crop: Crop | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of FID and KID, and notes on them."""
    test = real.dataset(options.size, crop)
    references = {"test": [test]}
    if real_train:
        references["train + test"] = [real_train.dataset(options.size, crop), test]
    found = fidelity(
        generated.dataset(options.size),
        references,
        fid="fid" in options.metrics,
        kid="kid" in options.metrics,
        inception_weights=options.inception_weights,
        kid_subset_size=options.kid_subset_size,
        batch_size=options.batch_size,
        device=options.device,
    )
    rows, notes, count = [], [], len(generated.paths)
    for name, scores in found.items():
        if subset := scores.pop("KID subset", None):
            notes.append(f"KID against {name}: mean and standard deviation of 100 subsets of {subset} images.")
        rows += _rows(scores, name, count)
    if "fid" in options.metrics and count < FID_FEATURES:
        notes.append(
            f"FID of {count} images, fewer than its {FID_FEATURES:,} features, is biased upwards: compare it only with "
            "that of as many images. KID is unbiased."
        )
    return rows, notes


def _pair_scores(
    options: argparse.Namespace, pairs: Sequence[tuple[str, str]], crop: Crop | None, palette: Palette | None
) -> list[dict[str, Any]]:
    """Return the rows of PSNR, SSIM and mIoU."""
    rows = []

    def compare(score: Callable[[Iterable[tuple[Tensor, Tensor]]], Mapping[str, float]], resample: Resampling) -> None:
        one, other = zip(*pairs)
        both = zip(ImageFiles(one, options.size, resample=resample), ImageFiles(other, options.size, crop, resample))
        with ProgressBar(both, total=len(pairs), unit="pair", desc="comparing") as progress:  # closed before an error
            rows.extend(_rows(score(progress), "test", len(pairs)))

    if pixel_metrics := [metric for metric in PIXEL_METRICS if metric in options.metrics]:
        compare(lambda images: similarity(images, pixel_metrics), Resampling.BICUBIC)
    if palette and "miou" in options.metrics:
        compare(lambda images: label_scores(images, palette), Resampling.NEAREST)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `evaluate` as a table."""
    columns = [
        {"key": "metric"},
        {"key": "value", "format": ".4f"},
        {"key": "against"},
        {"key": "images", "format": ","},
    ]
    return format_table({"columns": columns, "rows": result["rows"], "notes": result["notes"]})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd evaluate",
        description="Score generated images: FID and KID to real images; PSNR and SSIM to the real image of the same\n"
        "name; mIoU of label maps by a palette; FCN scores of generated photos by a segmentation network.",
        epilog="examples:\n"
        "  srpkd evaluate zebras horse2zebra/testB --real_train horse2zebra/trainB\n"
        "  srpkd evaluate latest_net_G.pth facades/test --aligned --input facades/test --metrics psnr ssim\n"
        "  srpkd evaluate 'images/*_fake_B.png' 'images/*_real_B.png' --metrics miou --palette cityscapes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("generated", help="folder or pattern of generated images, or a generator's weights with --input")
    add("real", help="folder or pattern of real test images")
    add("--input", metavar="FOLDER", help="images for the generator to translate")
    add("--metrics", nargs="+", choices=METRICS, default=["fid", "kid"], help="what to compute (default: fid kid)")
    add("--real_train", metavar="FOLDER", help="real training images: also compute FID and KID against train + test")
    add("--aligned", action="store_true", help="--input and real images are pairs side by side: A left, B right")
    add("--direction", choices=get_args(Direction), default="AtoB", help="of aligned pairs (default: %(default)s)")
    add("--size", type=positive, help="scale all images to SIZE x SIZE first (default: keep their sizes)")
    add("--inception_weights", metavar="PATH", help="torch-fidelity's file (default: the one in torch's cache)")
    add("--kid_subset_size", type=positive, help="images per subset of KID (default: 1000, or as many as there are)")
    add("--palette", help="synthetic, cityscapes, or a file of lines 'R G B name'; the name ignore excludes a colour")
    add(
        "--segmenter",
        metavar="PATH",
        help="network from photos (1, 3, H, W) in [0, 1] to logits, as TorchScript or .pt2: the file is executed, so "
        "use only one that you trust",
    )
    add("--labels", metavar="FOLDER", help="for segmentation: images of class numbers, or of --palette colours")
    add("--batch_size", type=positive, default=32, help="images per forward pass of Inception (default: %(default)s)")
    add("--json", type=json_file, metavar="FILE", help="also write the results to this file")
    add_device(result)
    add_train_mode_norm(result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(parser(), arguments)
    with exit_on_error():
        result = evaluate(options)
        print(table(result))  # before the file is written: if that fails, the results are not lost
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
