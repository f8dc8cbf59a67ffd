"""Folders and the doctor, on small image files made here. A pixel's colour says where it came from."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from srpkd.data import validate
from srpkd.data.folders import CHOICES, DataError, image_files, open_dataset
from srpkd.data.validate import validate_dataset


def save(path, array, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)
    return str(path)


def plain(path, size=(32, 32), colour=(100, 100, 100)) -> str:
    return save(path, np.full((size[1], size[0], 3), colour))


def ramps(width=32, height=32, blue=0) -> np.ndarray:
    """(H, W, 3): red tells the column, green the row, so that any crop and any flip can be read off."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 4, np.full_like(x, blue)], -1)


def columns_and_rows(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    levels = ((image + 1) * 127.5).round()
    return levels[0] / 4, levels[1] / 4


@pytest.fixture
def unaligned(tmp_path):
    for i in range(3):
        plain(tmp_path / "trainA" / f"{i}.png", colour=(10 * i, 0, 0))
    for i in range(5):
        plain(tmp_path / "trainB" / f"{i}.png", colour=(0, 10 * i, 0))
    for side in "AB":
        plain(tmp_path / f"test{side}" / "0.png")
    return tmp_path


@pytest.fixture
def aligned(tmp_path):
    for i in range(4):
        pair = np.concatenate([ramps(blue=0), ramps(blue=255)], 1)
        save(tmp_path / "train" / f"{i}.png", pair)
    return tmp_path


SMALL = {"load_size": 32, "crop_size": 32, "no_flip": True}


# ---------------------------------------------------------------- folders


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


def test_unaligned_draws_b_at_random_in_training_only(unaligned):
    data = open_dataset(unaligned, "unaligned", **SMALL)
    torch.manual_seed(0)
    drawn = [data[0] for _ in range(60)]
    assert {os.path.basename(item["B_path"]) for item in drawn} == {f"{i}.png" for i in range(5)}
    assert {item["A_path"] for item in drawn} == {str(unaligned / "trainA" / "0.png")}
    for i in range(1, 3):
        plain(unaligned / "testB" / f"{i}.png")
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
def test_a_pair_shares_crop_and_flip(aligned, preprocess):
    """The ramps in A and in B must agree pixel by pixel, whatever was drawn."""
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


def test_no_flip_and_equal_sizes_leave_the_image_as_it_is(aligned):
    data = open_dataset(aligned, "aligned", **SMALL)
    expected = torch.from_numpy(ramps().astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    for _ in range(5):
        torch.testing.assert_close(data[0]["A"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preprocess", CHOICES["preprocess"])
def test_tests_draw_nothing(aligned, preprocess):
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
def test_sizes_of_each_preprocessing(tmp_path, preprocess, shape):
    plain(tmp_path / "0.png", size=(46, 30))
    item = open_dataset(tmp_path, "single", preprocess=preprocess, load_size=40, crop_size=24)[0]
    assert item["A"].shape == (3, *shape)


def test_scale_width_is_at_least_as_high_as_the_crop(tmp_path):
    plain(tmp_path / "0.png", size=(60, 20))
    item = open_dataset(tmp_path, "single", preprocess="scale_width", load_size=30, crop_size=24)[0]
    assert item["A"].shape == (3, 24, 30)


def test_resize_is_pillow_bicubic_with_antialiasing(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3))
    path = save(tmp_path / "0.png", array)
    item = open_dataset(tmp_path, "single", load_size=20, crop_size=20, no_flip=True)[0]
    with Image.open(path) as image:
        expected = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC), dtype=np.float32)
    torch.testing.assert_close(item["A"], torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)


def test_one_channel_is_gray(aligned, unaligned):
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
def test_any_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(tmp_path / f"0.{suffix}")
    item = open_dataset(tmp_path, "single", **SMALL)[0]
    assert item["A"].shape == (3, 32, 32) and item["A"].min() > 0.95


def test_single_reads_the_folder_or_its_phase(tmp_path):
    plain(tmp_path / "deep" / "er" / "0.png")
    data = open_dataset(tmp_path, "single", **SMALL)
    assert set(data[0]) == {"A", "A_path"} and data[0]["A_path"].endswith("0.png")
    for i in range(2):
        plain(tmp_path / "test" / f"{i}.png")
    assert len(open_dataset(tmp_path, "single", "test", **SMALL)) == 2
    assert len(open_dataset(tmp_path, "single", **SMALL)) == 3


def test_image_files_are_sorted_and_found_in_subfolders(tmp_path):
    names = ["b/2.JPG", "a/x.Png", "z.tiff", "b/1.jpeg", "c.webp"]
    for name in names:
        plain(tmp_path / name)
    for name in ("notes.txt", "b/._1.jpg", ".hidden.png", ".git/0.png", "jpg"):  # none of these is an image
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert image_files(tmp_path) == [str(tmp_path / name) for name in sorted(names)]
    assert image_files(tmp_path / "nowhere") == []


def test_links_are_followed_but_not_in_circles(tmp_path):
    plain(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    assert image_files(tmp_path / "data") == [str(tmp_path / "data" / "link" / "0.png")]


def test_max_dataset_size_keeps_the_first(unaligned):
    data = open_dataset(unaligned, "unaligned", max_dataset_size=2, serial_batches=True, **SMALL)
    assert [os.path.basename(item["B_path"]) for item in data] == ["0.png", "1.png"]


@pytest.mark.parametrize("mode", ["aligned", "unaligned"])
def test_random_items_follow_torchs_seed_alone(tmp_path, mode):
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
def test_workers_are_reproducible_under_a_seed(tmp_path, mode):
    rng = np.random.default_rng(0)
    for i in range(6):
        for folder in ("train", "trainA", "trainB"):
            save(tmp_path / folder / f"{i}.png", rng.integers(0, 256, (24, 48, 3)))
    data = open_dataset(tmp_path, mode, load_size=28, crop_size=16)

    def epoch(seed: int) -> torch.Tensor:
        loader = DataLoader(data, 2, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(seed))
        return torch.cat([torch.cat([batch["A"], batch["B"]]) for batch in loader])

    first = epoch(0)
    assert first.shape == (12, 3, 16, 16)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))


def test_a_dataset_can_be_sent_to_spawned_workers(aligned):
    data = open_dataset(aligned, "aligned", preprocess="scale_width_and_crop", load_size=32, crop_size=16)
    copy = pickle.loads(pickle.dumps(data))
    torch.manual_seed(0)
    expected = data[1]["B"]
    torch.manual_seed(0)
    assert torch.equal(copy[1]["B"], expected)


def test_exif_orientation_is_not_applied(tmp_path):
    image = Image.fromarray(np.full((8, 16, 3), 200, dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    image.save(tmp_path / "0.jpg", exif=exif)
    assert open_dataset(tmp_path, "single", preprocess="none")[0]["A"].shape == (3, 8, 16)


def test_open_dataset_refuses(tmp_path, unaligned):
    with pytest.raises(ValueError, match="dataset_mode is one of unaligned, aligned, single; received 'pairs'"):
        open_dataset(unaligned, "pairs")
    with pytest.raises(ValueError, match="direction"):
        open_dataset(unaligned, "unaligned", direction="AB")
    with pytest.raises(ValueError, match="preprocess"):
        open_dataset(unaligned, "unaligned", preprocess="resize")
    with pytest.raises(FileNotFoundError, match="valA: no such folder"):
        open_dataset(unaligned, "unaligned", "val")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train: no images"):
        open_dataset(tmp_path, "aligned")


@pytest.mark.parametrize("phase", ["train", "test"])
def test_an_image_smaller_than_the_crop_is_an_error_with_its_name(tmp_path, phase):
    plain(tmp_path / phase / "small.png", size=(16, 64))
    with pytest.raises(ValueError, match=r"small.png: 16 x 64 pixels are too few for crop_size 32"):
        open_dataset(tmp_path, "single", phase, preprocess="crop", crop_size=32)[0]


def test_an_odd_pair_is_an_error_with_its_name(tmp_path):
    plain(tmp_path / "train" / "odd.png", size=(33, 16))
    with pytest.raises(ValueError, match=r"odd.png: 33 pixels wide"):
        open_dataset(tmp_path, "aligned", **SMALL)[0]


def test_unreadable_files_are_errors_with_their_names(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.png: not an image"):
        open_dataset(tmp_path, "single")[0]
    (tmp_path / "text.png").unlink()
    path = Path(plain(tmp_path / "bomb.png", size=(64, 64)))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match=r"bomb.png: far too large .* scale it down"):
            open_dataset(tmp_path, "single")[0]
        with pytest.raises(DataError, match=r"1 of 1 images cannot be read: bomb.png \(far too large"):
            validate_dataset(tmp_path, "single")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"bomb.png: damaged or cut short"):
        open_dataset(tmp_path, "single")[0]


# ---------------------------------------------------------------- doctor


def problems(*arguments, **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        validate_dataset(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def problem(*arguments, **options) -> str:
    (only,) = problems(*arguments, **options)
    return only


def test_report_of_sound_folders(unaligned, aligned):
    plain(unaligned / "trainB" / "large.png", size=(48, 40))
    report = validate_dataset(unaligned, "unaligned", load_size=40, crop_size=36, size_multiple=4)
    assert report.counts == {"trainA": 3, "trainB": 6}
    assert report.sizes == {(32, 32): 8, (48, 40): 1}
    assert report.network_sizes == [(36, 36)] and report.decoded == 9
    assert str(report) == (
        "3 images in trainA and 6 images in trainB, 32 x 32 to 48 x 40 pixels, all decoded without error; "
        "the network gets 36 x 36"
    )
    assert validate_dataset(aligned, "aligned", preprocess="none", size_multiple=32).network_sizes == [(32, 32)]
    assert validate_dataset(unaligned / "trainA", "single", preprocess="none", max_dataset_size=2).counts == {
        "trainA": 2
    }
    assert validate_dataset(unaligned, "unaligned", "test", crop_size=16).network_sizes == [(16, 16)]


def test_what_the_doctor_passes_can_be_read_at_the_size_it_says(tmp_path):
    for i, size in enumerate([(46, 30), (64, 64), (35, 71)]):
        plain(tmp_path / f"{i}.png", size=size)
    for preprocess in CHOICES["preprocess"]:
        for phase in ("train", "test"):
            options = {"preprocess": preprocess, "load_size": 40, "crop_size": 28}
            report = validate_dataset(tmp_path, "single", phase, **options)
            data = open_dataset(tmp_path, "single", phase, **options)
            assert {tuple(item["A"].shape[:0:-1]) for item in data} == set(report.network_sizes)


def test_doctor_draws_nothing(unaligned):
    before = torch.get_rng_state()
    validate_dataset(unaligned, "unaligned")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_dataroot(unaligned):
    told = problem(unaligned.parent / (unaligned.name + "x"), "unaligned")
    assert "does not exist" in told and f"did you mean {unaligned}?" in told
    assert "has testA, testB, trainA, trainB" in problem(unaligned / "qqq" / "zzz", "unaligned")
    assert "is a file" in problem(unaligned / "trainA" / "0.png", "unaligned")


@pytest.mark.parametrize(
    ("instead", "hints"),
    [
        (("train_A", "train_B"), ["rename train_A to trainA", "rename train_B to trainB"]),
        (("Train-A", "trainB"), ["rename Train-A to trainA"]),
        (("trianA", "trainB"), ["rename trianA to trainA"]),
        (("trainingA", "trainingB"), ["rename trainingA to trainA", "rename trainingB to trainB"]),
        (("train/A", "train/B"), ["rename train/A to trainA", "rename train/B to trainB"]),
        (("A", "B"), ["rename A to trainA", "rename B to trainB"]),
        (("testA", "trainB"), []),
        (("inner/trainA", "inner/trainB"), ["use --dataroot {root}/inner"]),
        (("train",), ["looks like an aligned data set: use --dataset_mode aligned"]),
        ((".",), ["use --dataset_mode single"]),
    ],
)
def test_missing_folders_of_unaligned(tmp_path, instead, hints):
    for folder in instead:
        plain(tmp_path / folder / "0.png", size=(64, 32))
    told = problem(tmp_path, "unaligned")
    assert "has no trainA" in told
    assert ("trainB" in told.split(";")[0]) == ("trainB" not in instead)
    assert instead == (".",) or f"it has {sorted(instead)[0].split('/')[0]}" in told
    for hint in hints:
        assert hint.format(root=tmp_path) in told
    assert told.count("rename") == sum("rename" in hint for hint in hints)
    assert ("dataset_mode" in told) == any("dataset_mode" in hint for hint in hints)


def test_missing_folder_of_aligned(unaligned, tmp_path):
    told = problem(unaligned, "aligned")
    assert "has no train;" in told and "it has testA, testB, trainA, trainB" in told
    assert "use --dataset_mode unaligned" in told
    empty = tmp_path / "new"
    empty.mkdir()
    assert "it has no folders" in problem(empty, "aligned")
    (empty / "__").mkdir()
    assert "rename" not in problem(empty, "aligned")
    plain(empty / "Train" / "0.png")
    assert "rename Train to train" in problem(empty, "aligned")


def test_empty_folder(tmp_path):
    (tmp_path / "trainA").mkdir()
    (tmp_path / "trainB" / "deep").mkdir(parents=True)
    for name in ("a.gif", "b.gif", "deep/c.npy"):
        (tmp_path / "trainB" / name).write_bytes(b"")
    first, second = problems(tmp_path, "unaligned")
    assert "trainA: no images (.jpg" in first and "it is empty" in first
    assert "trainB: no images" in second and "it has 2 .gif, 1 .npy" in second


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_images_are_named(tmp_path, suffix):
    rng = np.random.default_rng(0)
    paths = [Path(save(tmp_path / f"{i}.{suffix}", rng.integers(0, 256, (40, 40, 3)))) for i in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size * 2 // 3])
    paths[3].write_bytes(b"<html>404</html>")
    told = problem(tmp_path, "single")
    assert "2 of 4 images cannot be read" in told
    assert f"1.{suffix} (damaged or cut short" in told and f"3.{suffix} (not an image" in told
    assert f"0.{suffix}" not in told and f"2.{suffix}" not in told


def test_a_large_folder_is_decoded_in_part_but_every_header_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 5)
    for i in range(12):
        plain(tmp_path / f"{i:02d}.png")
    report = validate_dataset(tmp_path, "single")
    assert report.decoded == 5 and "5 decoded without error" in str(report)
    for i in range(12):  # wherever it is
        path = tmp_path / f"{i:02d}.png"
        whole = path.read_bytes()
        for broken in (b"", whole[: len(whole) // 2]):
            path.write_bytes(broken)
            assert f"{i:02d}.png (" in problem(tmp_path, "single")
        path.write_bytes(whole)


def test_the_decoded_part_of_a_large_folder_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 3)
    for i in range(9):
        path = Path(save(tmp_path / f"{i}.jpg", np.random.default_rng(i).integers(0, 256, (40, 40, 3))))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])  # which a JPEG's header does not show
    told = problem(tmp_path, "single")
    assert "3 of 9 images" in told
    assert [i for i in range(9) if f"{i}.jpg" in told] == [0, 3, 6]


def test_sixteen_bits(tmp_path):
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(tmp_path / "0.png")
    assert "1 of 1 images have more than 8 bits per channel" in problem(tmp_path, "single")


def test_aligned_images_that_are_no_pairs(aligned):
    plain(aligned / "train" / "odd.png", size=(63, 20))
    plain(aligned / "train" / "square.png", size=(64, 64))
    told = problem(aligned, "aligned")
    assert "2 of 6 images are not A and B of one size side by side" in told
    assert "odd.png (63 x 20), square.png (64 x 64)" in told


def test_crop_larger_than_the_image(aligned, unaligned):
    told = problem(aligned, "aligned", preprocess="crop", crop_size=40)
    assert "4 of 4 images are smaller than --crop_size 40, which needs 80 x 40 at least" in told
    assert "0.png (64 x 32)" in told
    assert validate_dataset(aligned, "aligned", preprocess="crop", crop_size=32).network_sizes == [(32, 32)]
    first, second = problems(unaligned, "unaligned", preprocess="crop", crop_size=33)
    assert "3 of 3 images are smaller" in first and "5 of 5 images are smaller" in second


@pytest.mark.parametrize("preprocess", ["resize_and_crop", "scale_width_and_crop"])
def test_crop_larger_than_load_size(aligned, preprocess):
    options = {"preprocess": preprocess, "load_size": 128, "crop_size": 256}
    assert "--crop_size 256 is larger than --load_size 128" in problem(aligned, "aligned", **options)
    (aligned / "train").rename(aligned / "test")  # where the load_size is the crop_size
    assert validate_dataset(aligned, "aligned", "test", **options).network_sizes == [(256, 256)]


@pytest.mark.parametrize(("multiple", "use"), [(4, "use 248 or 252"), (256, "use 256"), (128, "use 128 or 256")])
def test_crop_size_that_is_no_multiple(aligned, multiple, use):
    told = problem(aligned, "aligned", crop_size=250, size_multiple=multiple)
    assert f"--crop_size 250 is no multiple of {multiple}" in told and told.endswith(use)


def test_sizes_that_are_no_multiple_without_a_crop(tmp_path):
    plain(tmp_path / "a.png", size=(64, 64))
    plain(tmp_path / "b.png", size=(66, 40))  # becomes 64 x 40
    told = problem(tmp_path, "single", preprocess="none", size_multiple=64)
    assert "1 of 2 images reach the network with sides that are no multiple of 64" in told
    assert "b.png (64 x 40)" in told and "use --preprocess resize_and_crop" in told
    assert validate_dataset(tmp_path, "single", preprocess="none", size_multiple=4).network_sizes == [
        (64, 40),
        (64, 64),
    ]
    told = problem(tmp_path, "single", preprocess="scale_width", load_size=32, crop_size=16, size_multiple=4)
    assert "b.png (32 x 19)" in told and "use --preprocess scale_width_and_crop" in told


def test_sizes_that_differ_within_a_batch(tmp_path):
    plain(tmp_path / "a.png", size=(64, 64))
    plain(tmp_path / "b.png", size=(64, 40))
    told = problem(tmp_path, "single", preprocess="none", batch_size=2)
    assert "a batch of 2 cannot hold images of 64 x 40 to 64 x 64" in told
    assert validate_dataset(tmp_path, "single", preprocess="none", batch_size=1)
    assert validate_dataset(tmp_path, "single", batch_size=2)


def test_options_that_cannot_be(aligned):
    first, second = problems(aligned, "alined", direction="AB", load_size=0)[:2]
    assert "--dataset_mode is one of unaligned, aligned, single; received 'alined' (did you mean aligned?)" in first
    assert "--direction is one of AtoB, BtoA; received 'AB'" in second
    assert "--preprocess" in problem(aligned, "aligned", preprocess="resize")
    for name in ("load_size", "crop_size", "size_multiple"):
        assert f"--{name} must be a whole number of at least 1; received 0" in problem(aligned, "aligned", **{name: 0})


def test_all_problems_come_at_once(tmp_path):
    plain(tmp_path / "trainA" / "small.png", size=(16, 16))
    plain(tmp_path / "trainA" / "good.png", size=(64, 64))
    (tmp_path / "trainA" / "bad.png").write_bytes(b"")
    (tmp_path / "trainB").mkdir()
    with pytest.raises(DataError) as caught:
        validate_dataset(tmp_path, "unaligned", preprocess="crop", crop_size=30, size_multiple=4)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The data set {tmp_path} (unaligned, train) cannot be used:"
    kinds = ["no multiple of 4", "cannot be read: bad.png", "smaller than --crop_size 30", "trainB: no images"]
    assert len(lines) == 1 + len(kinds)
    for number, (line, kind) in enumerate(zip(lines[1:], kinds), 1):
        assert line.startswith(f"  {number}. ") and kind in line


def test_long_lists_are_cut(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"")
    told = problem(tmp_path, "single", max_report=3)
    assert "7 of 7" in told and "2.png" in told and "3.png" not in told and told.endswith("and 4 more")


def test_a_data_error_of_one_sentence():
    error = DataError("Too small.")
    assert str(error) == "Too small." and error.problems == []
    assert str(pickle.loads(pickle.dumps(error))) == "Too small."
