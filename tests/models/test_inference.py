"""Inference on images of any size, and on folders of any formats."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from threading import Barrier
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sample_images import ramps, save, save_mixed

from srpkd.finite import NonFiniteError
from srpkd.models import inference
from srpkd.models.inference import pad_images, translate, translate_folder
from srpkd.models.networks import define_generator, size_multiple


@pytest.fixture
def folder(tmp_path):
    return save_mixed(tmp_path / "photos")


GENERATORS = {
    "resnet": lambda: define_generator("resnet_1blocks", ngf=2, init_gain=0.2),
    "unet": lambda: define_generator("unet_16", ngf=2, dropout=True, init_gain=0.2),
    "grey": lambda: define_generator("resnet_1blocks", 1, 1, ngf=2, norm="batch", init_gain=0.2),
    "grey to RGB": lambda: define_generator("resnet_1blocks", 1, 3, ngf=2, init_gain=0.2),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_names_sizes_and_formats_are_kept(folder, tmp_path, kind):
    net = GENERATORS[kind]()
    written, skipped, *_ = translate_folder(net, folder, tmp_path / "out")
    assert not skipped and net.training
    names = {path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix != ".txt"}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")} == names
    assert sorted(written) == sorted(str(tmp_path / "out" / name) for name in names)
    for name in names:
        with Image.open(folder / name) as before, Image.open(tmp_path / "out" / name) as after:
            assert (after.format, after.size) == (before.format, before.size)
            assert after.mode == ("L" if kind == "grey" else "RGB") or after.format == "WEBP"


def test_pixels_are_those_of_the_network(folder, tmp_path):
    net = GENERATORS["resnet"]()
    translate_folder(net, folder, tmp_path / "out")
    pixels = torch.from_numpy(np.array(Image.open(folder / "a.png")))
    with torch.no_grad():
        output = net.eval()(pixels.permute(2, 0, 1)[None] / 127.5 - 1)[0]
    expected = ((output + 1) * 127.5).round().permute(1, 2, 0)
    assert expected.std() > 1  # not uniform
    np.testing.assert_allclose(np.array(Image.open(tmp_path / "out" / "a.png")), expected, atol=1)


def test_results_do_not_depend_on_the_batch_size(folder, tmp_path):
    net = GENERATORS["resnet"]()
    translate_folder(net, folder, tmp_path / "one")
    sizes = []
    net.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    translate_folder(net, folder, tmp_path / "many", batch_size=2)
    assert sizes == [2, 1, 1, 1, 1, 1]  # a, b and c have the same size
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "many" / path.relative_to(tmp_path / "one")
        np.testing.assert_allclose(*(np.array(Image.open(p)).astype(int) for p in (path, other)), atol=1)


@pytest.mark.parametrize("kind", ["resnet", "unet"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 16), (17, 33), (32, 32)])
def test_any_size(kind, shape):
    net = GENERATORS[kind]().eval()
    images = torch.rand(2, 3, *shape) * 2 - 1
    output = translate(net, images)
    assert output.shape == images.shape and output.isfinite().all()
    bottom, right = (max(8, -(-length // size_multiple(net)) * size_multiple(net)) - length for length in shape)
    if bottom < shape[0] and right < shape[1]:
        with torch.no_grad():
            expected = net(F.pad(images, (0, right, 0, bottom), mode="reflect"))
        assert torch.equal(output, expected[:, :, : shape[0], : shape[1]])


def test_the_padding_of_small_images_is_reflected_again():
    assert pad_images(torch.arange(3).view(1, 1, 1, 3), 4)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]


@pytest.mark.parametrize("target", [".", "results"])
def test_target_inside_the_source(folder, target):
    with pytest.raises(ValueError, match="is inside"):
        translate_folder(GENERATORS["resnet"](), folder, folder / target, force=True)
    assert not (folder / "results").exists()


def test_size_and_crop(folder, tmp_path):
    net = GENERATORS["resnet"]()
    Image.new("RGBA", (20, 12), (90, 90, 90, 9)).save(folder / "alpha.png")

    def left(image, path):
        if path.endswith("d.bmp"):
            raise ValueError(f"{path}: odd")
        return image.crop((0, 0, 8, 8))

    written, skipped, *_ = translate_folder(net, folder, tmp_path / "out", size=12, crop=left)
    assert {Image.open(path).size for path in written} == {(12, 12)}
    assert Image.open(tmp_path / "out/alpha.png").getchannel("A").getextrema() == (9, 9)
    assert skipped == [f"{folder / 'd.bmp'}: odd"]


def test_invalid_folders_and_networks(folder, tmp_path):
    net = GENERATORS["resnet"]()
    with pytest.raises(FileNotFoundError, match="not a folder"):
        translate_folder(net, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images"):
        translate_folder(net, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="goes from 2 to 3 channels; image files have 1 or 3"):
        translate_folder(define_generator("unet_16", 2, 3, ngf=1), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "on_cpu"), [(float("nan"), True), (float("inf"), True), (float("inf"), False)])
def test_outputs_that_are_not_finite_are_not_written(folder, tmp_path, monkeypatch, value, on_cpu):
    monkeypatch.setattr(inference, "_on_cpu", lambda _: on_cpu)
    net = GENERATORS["resnet"]()
    outputs = []

    def spoil(_module, _inputs, output):
        outputs.append(output)
        return output.index_fill(0, torch.tensor([1]), value) if len(output) > 1 else output

    net.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"output for \S+b\.jpg is not finite .*\. 1 of 7 images are written"):
        translate_folder(net, folder, tmp_path / "out", batch_size=8)
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.png"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_images_that_are_too_large_for_the_memory_are_skipped(tmp_path, error):
    """Batches that are too large run image by image; a file with several frames is named once, and its rest not run."""
    photos = tmp_path / "photos"
    for name, width in {"a.png": 32, "b.png": 32, "c.png": 64, "d.png": 64, "e.png": 32}.items():
        save(photos / name, ramps(width))
    pages = [Image.fromarray(ramps(width).astype(np.uint8)) for width in (64, 32, 96)]
    save(photos / "f.tif", ramps(64), save_all=True, append_images=pages)
    net = GENERATORS["resnet"]()
    everything = translate_folder(net, photos, tmp_path / "all", all_frames=True)
    assert len(everything.written) == 6

    def fail(_module, inputs):
        if inputs[0].numel() > 3 * 32 * 32:
            raise error

    net.register_forward_pre_hook(fail)
    result = translate_folder(net, photos, tmp_path / "out", batch_size=2, all_frames=True)
    assert [Path(path).name for path in result.written] == ["a.png", "b.png", "e.png"]
    for path in result.written:
        difference = np.subtract(Image.open(path), Image.open(tmp_path / "all" / Path(path).name), dtype=np.int16)
        assert abs(difference).max() <= 1  # batches of another size round differently
    text = (
        "the network needs more memory for 64 x 32 pixels than cpu has free: use a smaller --size, or scale the image"
    )
    assert result.skipped == [f"{photos / name}: {text} down" for name in ("c.png", "d.png", "f.tif")]


def test_other_errors_of_the_network_are_raised(folder, tmp_path):
    net = GENERATORS["resnet"]()
    net.register_forward_pre_hook(Mock(side_effect=RuntimeError("another reason")))
    with pytest.raises(RuntimeError, match="another reason"):
        translate_folder(net, folder, tmp_path / "out")


def test_several_files_are_read_and_written_at_a_time(folder, tmp_path, monkeypatch):
    """A GPU would wait for them."""
    monkeypatch.setattr(inference, "_on_cpu", lambda _: False)

    def first_two_together(name):
        function, both, calls = getattr(inference, name), Barrier(2), count()

        def together(*arguments):
            if next(calls) < 2:
                both.wait(timeout=60)
            return function(*arguments)

        monkeypatch.setattr(inference, name, together)

    first_two_together("read_source")
    first_two_together("encode")
    written, skipped, *_ = translate_folder(GENERATORS["resnet"](), folder, tmp_path / "out")
    assert len(written) == 7 and not skipped


def test_results_that_exist_are_found_by_listing_their_folders(folder, tmp_path, monkeypatch):
    """On a network drive, a look at each takes much longer. A name in another form may be that of the same file."""
    net = GENERATORS["resnet"]()
    translate_folder(net, folder, tmp_path / "out")
    (tmp_path / "out/b.jpg").rename(tmp_path / "out/B.JPG")
    (tmp_path / "out/d.bmp").unlink()
    exists, looked_at = Path.exists, []

    def counting(path, **others):
        looked_at.append(path.name)
        return path.name == "b.jpg" or exists(path, **others)  # as if the file system did not tell the cases apart

    monkeypatch.setattr(Path, "exists", counting)
    with pytest.raises(FileExistsError, match="6 of the results exist already"):
        translate_folder(net, folder, tmp_path / "out")
    assert [name for name in looked_at if name != "out"] == ["b.jpg"]


def test_names_that_differ_only_in_case(folder, tmp_path, monkeypatch):
    """On a file system that does not tell them apart, one result would replace the other."""
    net = GENERATORS["resnet"]()
    for name in ("a.png", "A.PNG"):
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name)
    monkeypatch.setattr(inference, "is_case_sensitive", lambda _: False)
    with pytest.raises(ValueError, match=r"photos/A.PNG and .*photos/a.png differ only in case, and would be one file"):
        translate_folder(net, folder, tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    translate_folder(net, folder, tmp_path / "out")
    assert {"a.png", "A.PNG"} <= set(os.listdir(tmp_path / "out"))
