"""Put every image of a folder through a generator: ``python -m srpkd.translate student.pth photos paintings``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .arguments import check_whole, default_device, device, positive
from .data.folders import image_files, read_image
from .files import WriteError, atomic_write
from .models.checkpoints import load_generator
from .models.inference import image_tensor, pillow_modes, translate

TRAIN_MODE_NORM = "batch norms by each image's own statistics, as pix2pix has it, not by the running ones"


def translate_folder(
    net: nn.Module,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 1,
    size: int | None = None,
    force: bool = False,
    cut: Callable[[Image.Image, str], Image.Image] | None = None,
) -> tuple[list[str], list[str]]:
    """Translate the images in a folder and below it; the results have their names, sizes and formats.

    An image is reflected at its right and lower edge up to the network's multiple, and the result cut back. Images that
    follow one another and are of one size share a batch.

    Args:
        net: a generator made by ``define_generator`` or ``load_generator``, on its device.
        source: the folder; hidden files are left out, and the pixels are taken as stored (no EXIF rotation).
        target: where the results go; made where it does not exist.
        batch_size: images a pass at most.
        size: scale every image to size x size first; by default it keeps its own.
        force: replace files that exist.
        cut: (image, path) -> the part of it to translate.

    Returns:
        The paths written, and what could not be read, as "path: why".

    Raises:
        FileExistsError: results exist already, before anything is translated.
        FileNotFoundError: the source does not exist, or holds no images.
        ValueError: the target lies in the source (or is it), or the network has other than 1 or 3 channels.
        WriteError: a result cannot be written; those before it are there, and whole.
    """
    check_whole("batch_size", batch_size, least=1)
    if size is not None:
        check_whole("size", size, least=1)
    source, target = Path(source).expanduser(), Path(target).expanduser()
    mode, _ = pillow_modes(net)
    paths = _list(source, target, force)
    written, skipped, batch = [], [], []

    def flush() -> None:
        if batch:
            outputs = translate(net, torch.stack([image for _, image in batch]))
            for (path, _), output in zip(batch, outputs):
                try:
                    written.append(_save(output, target / os.path.relpath(path, source)))
                except WriteError as error:
                    if not written:
                        raise
                    raise WriteError(f"{error}. {len(written)} of {len(paths)} images are written") from error
            batch.clear()

    was_training = net.training
    net.eval()
    try:
        for path in tqdm(paths, unit="image", desc="translating"):
            try:
                image = read_image(path)
                image = cut(image, path) if cut else image
            except ValueError as error:
                skipped.append(str(error))
                continue
            image = image.convert(mode)
            if size:
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            tensor = image_tensor(image)
            if batch and (len(batch) == batch_size or batch[0][1].shape != tensor.shape):
                flush()
            batch.append((path, tensor))
        flush()
    finally:
        net.train(was_training)
    return written, skipped


def _list(source: Path, target: Path, force: bool) -> list[str]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give the folder of the images to translate")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder for the results")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}: results would lie among the images; give a folder outside")
    paths = image_files(source)
    if not paths:
        raise FileNotFoundError(f"{source} holds no images (.jpg, .png, .ppm, .bmp, .tif, .webp)")
    there = [path for path in paths if (target / os.path.relpath(path, source)).exists()]
    if there and not force:
        raise FileExistsError(
            f"{len(there)} of the results exist already, such as {target / os.path.relpath(there[0], source)}: "
            "--force replaces them, or give another folder"
        )
    return paths


def _save(output: Tensor, path: Path) -> str:
    pixels = ((output.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    kind = Image.registered_extensions()[path.suffix.lower()]
    quality = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    with atomic_write(path) as file:
        image.save(file, kind, **quality.get(kind, {}))
    return str(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd translate",
        description="Put every image in a folder, and in the folders in it, through a generator. Any image size; names "
        "and formats are kept. Files that cannot be read are reported and skipped (exit status 1).",
        epilog="example: srpkd translate runs/h2z/latest_net_G_A.pth photos/ zebras/ --batch_size 4",
    )
    result.add_argument("weights", help="the generator: .pth or .safetensors; its architecture is read off the file")
    result.add_argument("in_folder", help="the images")
    result.add_argument("out_folder", help="where the results go")
    result.add_argument("--batch_size", type=positive, default=1, help="images a pass, at most (default: %(default)s)")
    result.add_argument("--size", type=positive, help="scale images to SIZE x SIZE first (default: as they are)")
    result.add_argument(
        "--device", type=device, default=default_device(), help="cpu, cuda, cuda:1, ... (default here: %(default)s)"
    )
    result.add_argument("--force", action="store_true", help="replace files that exist")
    result.add_argument("--train_mode_norm", action="store_true", help=TRAIN_MODE_NORM)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        net = load_generator(options.weights, train_mode_norm=options.train_mode_norm).to(options.device)
        written, skipped = translate_folder(
            net,
            options.in_folder,
            options.out_folder,
            batch_size=options.batch_size,
            size=options.size,
            force=options.force,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    print(f"{len(written)} images written to {options.out_folder}" + (f", {len(skipped)} skipped" if skipped else ""))
    sys.exit(1 if skipped else 0)


if __name__ == "__main__":
    main()
