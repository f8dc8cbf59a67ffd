"""Datasets of image folders. A pixel's colour tells which file and position it comes from."""

import os
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import ramps, save, save_deep, save_plain
from torch.utils.data import DataLoader

from srpkd.data.folders import CHOICES, open_dataset
from srpkd.data.images import DataError
from srpkd.data.layouts import find_layout
from srpkd.data.validate import validate_dataset

SMALL = {"load_size": 32, "crop_size": 32, "no_flip": True}


def columns_and_rows(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    levels = ((image + 1) * 127.5).round()
    return levels[0] / 4, levels[1] / 4


def test_unaligned_items(unaligned):
    data = open_dataset(unaligned, "unaligned", serial_batches=True, **SMALL)
    assert len(data) == 5 and len(list(data)) == 5
    item = data[4]
    assert set(item) == {"A", "B", "A_path", "B_path"}
    assert type(item["A"]) is torch.Tensor and item["A"].dtype == torch.float32
    assert item["A"].shape == item["B"].shape == (3, 32, 32)
    assert item["A_path"] == str(unaligned / "trainA" / "1.png")  # 4 modulo 3
    assert item["B_path"] == str(unaligned / "trainB" / "4.png")
    torch.testing.assert_close(item["A"][:, 0, 0], torch.tensor([10, 0, 0]) / 127.5 - 1)
    torch.testing.assert_close(item["B"][:, 0, 0], torch.tensor([0, 40, 0]) / 127.5 - 1)
    for index in (5, -1):
        with pytest.raises(IndexError):
            data[index]


def test_unaligned_draws_b_at_random_only_in_training(unaligned):
    data = open_dataset(unaligned, "unaligned", **SMALL)
    torch.manual_seed(0)
    drawn = [data[0] for _ in range(60)]
    assert {os.path.basename(item["B_path"]) for item in drawn} == {f"{i}.png" for i in range(5)}
    assert {item["A_path"] for item in drawn} == {str(unaligned / "trainA" / "0.png")}
    for i in range(1, 3):
        save_plain(unaligned / "testB" / f"{i}.png")
    tests = open_dataset(unaligned, "unaligned", "test", **SMALL)
    assert {tests[1]["B_path"] for _ in range(20)} == {str(unaligned / "testB" / "1.png")}


def test_unaligned_b_to_a_swaps_everything(unaligned):
    there = open_dataset(unaligned, "unaligned", serial_batches=True, **SMALL)
    back = open_dataset(unaligned, "unaligned", direction="BtoA", serial_batches=True, **SMALL)
    assert len(back) == len(there)
    for x, y in zip(there, back):
        assert torch.equal(x["A"], y["B"]) and torch.equal(x["B"], y["A"])
        assert (x["A_path"], x["B_path"]) == (y["B_path"], y["A_path"])


def test_aligned_halves_and_direction(aligned):
    item = open_dataset(aligned, "aligned", **SMALL)[0]
    assert (item["A"][2] == -1).all() and (item["B"][2] == 1).all()  # left, right
    assert torch.equal(item["A"][:2], item["B"][:2])
    assert item["A_path"] == item["B_path"] == str(aligned / "train" / "0.png")
    back = open_dataset(aligned, "aligned", direction="BtoA", **SMALL)[0]
    assert torch.equal(back["A"], item["B"]) and torch.equal(back["B"], item["A"])


@pytest.mark.parametrize("preprocess", ["crop", "resize_and_crop", "scale_width_and_crop"])
def test_aligned_images_share_crop_and_flip(aligned, preprocess):
    """The ramps of A and B are equal in every pixel, for every random crop and flip."""
    data = open_dataset(aligned, "aligned", preprocess=preprocess, load_size=32, crop_size=20)
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        item = data[0]
        assert item["A"].shape == (3, 20, 20)
        assert torch.equal(item["A"][:2], item["B"][:2])
        columns, rows = columns_and_rows(item["A"])
        flipped = bool(columns[0, 0] > columns[0, 1])
        seen.add((columns.min().item(), rows.min().item(), flipped))
    assert len({x for x, _, _ in seen}) > 4 and len({y for _, y, _ in seen}) > 4
    assert {flipped for _, _, flipped in seen} == {True, False}


def test_unaligned_sides_are_cropped_and_flipped_independently(tmp_path):
    for side in "AB":
        save(tmp_path / f"train{side}" / "0.png", ramps())
    data = open_dataset(tmp_path, "unaligned", load_size=32, crop_size=20)
    torch.manual_seed(0)
    items = [data[0] for _ in range(20)]
    assert sum(torch.equal(item["A"], item["B"]) for item in items) < 5


@pytest.mark.parametrize("form", ["{}/A {}/B", "A/{} B/{}", "{}A {}B", "{}_A {}_B"])
def test_pairs_in_two_folders_equal_pairs_side_by_side(aligned, tmp_path, form):
    two = tmp_path / "two"
    for index in range(4):
        for side, folder in zip((0, 255), form.format("train", "train").split()):
            suffix = "png" if side == 0 or index == 1 else "bmp"  # a suffix may differ
            save(two / folder / f"{index}.{suffix}", ramps(blue=side))
    for options in (
        SMALL,
        {"load_size": 40, "crop_size": 20},
        {"load_size": 40, "crop_size": 20, "direction": "BtoA", "max_dataset_size": 3, "input_nc": 1},
    ):
        one, other = open_dataset(aligned, "aligned", **options), open_dataset(two, "aligned", **options)
        assert len(one) == len(other) == options.get("max_dataset_size", 4)
        for index in range(len(one)):
            torch.manual_seed(index)
            expected = one[index]
            torch.manual_seed(index)
            item = other[index]
            assert torch.equal(item["A"], expected["A"]) and torch.equal(item["B"], expected["B"])
            assert Path(item["A_path"]).stem == Path(item["B_path"]).stem == str(index)
            assert item["A_path"] != item["B_path"]


def test_files_of_a_pair_that_have_another_size(tmp_path):
    save_plain(tmp_path / "trainA/0.png", size=(64, 32))
    save_plain(tmp_path / "trainB/0.png", size=(32, 16))
    for preprocess in ("none", "crop"):
        with pytest.raises(DataError, match=r"trainA/0.png (and|or) .*trainB/0.png"):
            open_dataset(tmp_path, "aligned", preprocess=preprocess, crop_size=16)[0]
    assert open_dataset(tmp_path, "aligned")[0]["B"].shape == (3, 256, 256)


def test_files_that_differ_only_in_their_suffix(tmp_path):
    for name in ("trainA/0.png", "trainA/0.bmp", "trainB/0.png"):
        save_plain(tmp_path / name)
    with pytest.raises(DataError, match=r"trainA: files that differ only in their suffix, 0.bmp, 0.png: rename or rem"):
        open_dataset(tmp_path, "aligned")
    save_plain(tmp_path / "trainB/0.bmp")
    data = open_dataset(tmp_path, "aligned", **SMALL)
    assert [Path(item["A_path"]).name for item in data] == [Path(item["B_path"]).name for item in data]


def test_files_of_a_pair_whose_names_have_two_unicode_forms(tmp_path):
    """macOS may write an e with an accent as two characters."""
    for form, side in (("NFD", "trainA"), ("NFC", "trainB")):
        for name in ("café", "zoé"):
            save_plain(tmp_path / side / f"{unicodedata.normalize(form, name)}.png")
    data = open_dataset(tmp_path, "aligned", **SMALL)
    pairs = [[Path(item[side]).stem for side in ("A_path", "B_path")] for item in data]
    assert [[unicodedata.normalize("NFC", name) for name in pair] for pair in pairs] == [["café"] * 2, ["zoé"] * 2]


def test_images_side_by_side_come_first(aligned):
    for folder in ("trainA", "trainB", "A/train", "B/train"):
        save_plain(aligned / folder / "0.png")
    assert len(open_dataset(aligned, "aligned")) == 4
    for folder in ("A", "B", "C"):  # all sub-folders are searched, as in the public code
        save_plain(aligned / "train" / folder / "0.png", size=(64, 32))
    assert len(open_dataset(aligned, "aligned")) == 7
    assert len(open_dataset(aligned, "unaligned")) == 1


@pytest.mark.parametrize("other", ["AB", "C", "."])
def test_folders_of_sides_are_read_if_they_have_all_images(tmp_path, other):
    for folder in ("A", "B"):
        save_plain(tmp_path / "train" / folder / "0.png")
    (tmp_path / "train/loop").symlink_to(tmp_path / "train")
    assert find_layout(tmp_path, "aligned", "train").names == ["train/A", "train/B"]
    save_plain(tmp_path / "train" / other / "0.png")
    assert find_layout(tmp_path, "aligned", "train").names == ["train"]


def test_val_is_read_if_there_are_no_test_images(tmp_path):
    (tmp_path / "test").mkdir()
    for index in range(3):
        save_plain(tmp_path / "val" / f"{index}.png", size=(64, 32))
    assert len(open_dataset(tmp_path, "aligned", "test")) == 3
    save_plain(tmp_path / "test/0.png", size=(64, 32))
    assert len(open_dataset(tmp_path, "aligned", "test")) == 1
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        open_dataset(tmp_path, "aligned")


def test_no_flip_and_equal_sizes_keep_the_image(aligned):
    data = open_dataset(aligned, "aligned", **SMALL)
    expected = torch.from_numpy(ramps().astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    for _ in range(5):
        torch.testing.assert_close(data[0]["A"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preprocess", CHOICES["preprocess"])
def test_test_phase_is_deterministic(aligned, preprocess):
    (aligned / "train").rename(aligned / "test")
    data = open_dataset(aligned, "aligned", "test", preprocess=preprocess, load_size=40, crop_size=20)
    before = torch.get_rng_state()
    first, *others = [data[0] for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first["A"], other["A"]) for other in others)
    columns, rows = columns_and_rows(first["A"])
    assert (columns.diff(dim=1) > 0).all() and (rows.diff(dim=0) > 0).all()  # never mirrored
    side = {"none": 32, "scale_width": 40}.get(preprocess, 20)
    assert first["A"].shape == (3, side, side)
    if preprocess == "crop":  # the middle 20 of 32
        assert (columns[0, 0], columns[0, -1], rows[0, 0]) == (6, 25, 6)
    elif side == 20:  # the whole image, scaled to the crop
        assert columns[0, 0] < 2 and columns[0, -1] > 29


@pytest.mark.parametrize(
    ("preprocess", "shape"),
    [
        ("resize_and_crop", (24, 24)),
        ("crop", (24, 24)),
        ("scale_width", (26, 40)),  # 30 of 46 rows, in proportion to 40 columns, by flooring
        ("scale_width_and_crop", (24, 24)),
        ("none", (32, 48)),  # to the nearest multiple of four, halves to even: 7.5 to 8 times 4, 11.5 to 12
    ],
)
def test_output_size_of_each_preprocess(tmp_path, side_a, preprocess, shape):
    save_plain(side_a / "0.png", size=(46, 30))
    item = open_dataset(tmp_path, "unaligned", preprocess=preprocess, load_size=40, crop_size=24)[0]
    assert item["A"].shape == (3, *shape)


def test_scale_width_keeps_at_least_the_crop_height(tmp_path, side_a):
    save_plain(side_a / "0.png", size=(60, 20))
    item = open_dataset(tmp_path, "unaligned", preprocess="scale_width", load_size=30, crop_size=24)[0]
    assert item["A"].shape == (3, 24, 30)


def test_resize_is_pillow_bicubic_with_antialiasing(tmp_path, side_a):
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3))
    path = save(side_a / "0.png", array)
    item = open_dataset(tmp_path, "unaligned", load_size=20, crop_size=20, no_flip=True)[0]
    with Image.open(path) as image:
        expected = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC), dtype=np.float32)
    torch.testing.assert_close(item["A"], torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)


def test_one_channel_is_grey(aligned, unaligned):
    for data in (open_dataset(aligned, "aligned", input_nc=1, **SMALL), open_dataset(aligned, "aligned", input_nc=1)):
        item = data[0]
        assert item["A"].shape[0] == 1 and item["B"].shape[0] == 3
    back = open_dataset(aligned, "aligned", direction="BtoA", output_nc=1, **SMALL)[0]
    assert back["A"].shape[0] == 3 and back["B"].shape[0] == 1
    assert (back["A"][2] == 1).all()  # the input is the right half, in colour
    item = open_dataset(unaligned, "unaligned", input_nc=1, output_nc=1, serial_batches=True, **SMALL)[2]
    assert item["A"].shape == item["B"].shape == (1, 32, 32)
    expected = round(0.299 * 20) / 127.5 - 1  # luma of (20, 0, 0)
    torch.testing.assert_close(item["A"], torch.full((1, 32, 32), expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(tmp_path, side_a, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(side_a / f"0.{suffix}")
    item = open_dataset(tmp_path, "unaligned", **SMALL)[0]
    assert item["A"].shape == (3, 32, 32) and item["A"].min() > 0.95


def test_max_dataset_size_keeps_the_first_files(unaligned):
    data = open_dataset(unaligned, "unaligned", max_dataset_size=2, serial_batches=True, **SMALL)
    assert [os.path.basename(item["B_path"]) for item in data] == ["0.png", "1.png"]


@pytest.mark.parametrize("mode", ["aligned", "unaligned"])
def test_random_items_depend_only_on_torch_seed(tmp_path, mode):
    rng = np.random.default_rng(0)
    for i in range(4):
        for folder in ("train", "trainA", "trainB"):
            save(tmp_path / folder / f"{i}.png", rng.integers(0, 256, (32, 64, 3)))
    data = open_dataset(tmp_path, mode, load_size=40, crop_size=20)

    def draw(seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return torch.stack([data[i][side] for i in range(4) for side in "AB"])

    assert torch.equal(draw(3, 0), draw(3, 1))
    assert not torch.equal(draw(3, 0), draw(4, 0))


@pytest.mark.parametrize("mode", ["aligned", "unaligned"])
def test_loader_workers_are_reproducible(tmp_path, mode):
    rng = np.random.default_rng(0)
    for i in range(6):
        for folder in ("train", "trainA", "trainB"):
            save(tmp_path / folder / f"{i}.png", rng.integers(0, 256, (24, 48, 3)))
    data = open_dataset(tmp_path, mode, load_size=28, crop_size=16)

    def epoch(seed: int) -> torch.Tensor:
        loader = DataLoader(
            data,
            2,
            shuffle=True,
            num_workers=2,
            generator=torch.Generator().manual_seed(seed),
            multiprocessing_context="fork",  # the default of Python 3.14 imports torch in each process
        )
        return torch.cat([torch.cat([batch["A"], batch["B"]]) for batch in loader])

    first = epoch(0)
    assert first.shape == (12, 3, 16, 16)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))


def test_dataset_can_be_pickled(aligned):
    data = open_dataset(aligned, "aligned", preprocess="scale_width_and_crop", load_size=32, crop_size=16)
    copy = pickle.loads(pickle.dumps(data))
    torch.manual_seed(0)
    expected = data[1]["B"]
    torch.manual_seed(0)
    assert torch.equal(copy[1]["B"], expected)


def test_exif_orientation_is_applied(tmp_path, side_a):
    image = Image.fromarray(np.full((8, 16, 3), 200, dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    image.save(side_a / "0.jpg", exif=exif)
    assert open_dataset(tmp_path, "unaligned", preprocess="none")[0]["A"].shape == (3, 16, 8)
    assert validate_dataset(tmp_path, "unaligned", preprocess="none").sizes == {(8, 16): 1, (64, 64): 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_precision(tmp_path, side_a, channels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (32, 32, channels), dtype=np.uint16)
    save_deep(side_a / "0.png", pixels)
    for nc in (1, 3):
        item = open_dataset(tmp_path, "unaligned", input_nc=nc, **SMALL)[0]["A"]
        expected = pixels.astype(float) / 32767.5 - 1
        if (channels, nc) == (3, 1):
            expected = expected @ [[0.299], [0.587], [0.114]]
        assert item.dtype == torch.float32 and item.shape == (nc, 32, 32)
        np.testing.assert_allclose(item.permute(1, 2, 0), np.broadcast_to(expected, (32, 32, nc)), atol=2e-7)


def test_crops_flips_and_scaling_are_those_of_8_bits(tmp_path):
    """The same picture with 8 and with 16 bits gives the same tensors, apart from the rounding to 8 bits."""
    pixels = np.random.default_rng(0).integers(60, 200, (30, 60, 3))
    save(tmp_path / "8" / "train" / "0.png", pixels)
    save_deep(tmp_path / "16" / "train" / "0.png", (pixels * 257).astype(np.uint16))
    for preprocess in CHOICES["preprocess"]:
        options = {"preprocess": preprocess, "load_size": 28, "crop_size": 24}
        small, deep = (open_dataset(tmp_path / bits, "aligned", **options) for bits in ("8", "16"))
        for seed in range(4):
            torch.manual_seed(seed)
            one = small[0]
            torch.manual_seed(seed)
            other = deep[0]
            for side in "AB":
                torch.testing.assert_close(one[side], other[side], atol=2.5 / 255, rtol=0)


def test_invalid_arguments(tmp_path, unaligned):
    with pytest.raises(ValueError, match="direction"):
        open_dataset(unaligned, "unaligned", direction="AB")
    with pytest.raises(ValueError, match="preprocess"):
        open_dataset(unaligned, "unaligned", preprocess="resize")
    with pytest.raises(FileNotFoundError, match="valA: no such folder"):
        open_dataset(unaligned, "unaligned", "val")
    (tmp_path / "new/train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="train: no images"):
        open_dataset(tmp_path / "new", "aligned")
    with pytest.raises(DataError, match=r"trainB: 2 of 5 images have no image of the same name in .*trainA: 3.png, 4"):
        open_dataset(unaligned, "aligned")


@pytest.mark.parametrize("phase", ["train", "test"])
def test_image_smaller_than_the_crop(tmp_path, side_a, phase):
    save_plain(side_a / "small.png", size=(16, 64))
    with pytest.raises(ValueError, match=r"small.png: 16 x 64 pixels are smaller than crop_size 32: use a smaller"):
        open_dataset(tmp_path, "unaligned", phase, preprocess="crop", crop_size=32)[0]


def test_aligned_image_of_odd_width(tmp_path):
    save_plain(tmp_path / "train" / "odd.png", size=(33, 16))
    with pytest.raises(ValueError, match=r"odd.png: 33 pixels wide"):
        open_dataset(tmp_path, "aligned", **SMALL)[0]


def test_unreadable_files(tmp_path, side_a):
    (side_a / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.png: not an image"):
        open_dataset(tmp_path, "unaligned")[0]
    (side_a / "text.png").unlink()
    path = Path(save_plain(side_a / "cut.png", size=(64, 64)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut.png: damaged or truncated"):
        open_dataset(tmp_path, "unaligned")[0]
