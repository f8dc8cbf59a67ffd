"""Validation of datasets: reports of valid ones, and the problems of others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import save, save_plain

from srpkd.data import validate
from srpkd.data.folders import CHOICES, open_dataset
from srpkd.data.images import DataError
from srpkd.data.validate import validate_dataset


def problems(*arguments, **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        validate_dataset(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def single_problem(*arguments, **options) -> str:
    (only,) = problems(*arguments, **options)
    return only


def test_report_of_valid_datasets(unaligned, aligned):
    save_plain(unaligned / "trainB" / "large.png", size=(48, 40))
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


def test_valid_images_have_the_reported_size(tmp_path):
    for i, size in enumerate([(46, 30), (64, 64), (35, 71)]):
        save_plain(tmp_path / f"{i}.png", size=size)
    for preprocess in CHOICES["preprocess"]:
        for phase in ("train", "test"):
            options = {"preprocess": preprocess, "load_size": 40, "crop_size": 28}
            report = validate_dataset(tmp_path, "single", phase, **options)
            data = open_dataset(tmp_path, "single", phase, **options)
            assert {tuple(item["A"].shape[:0:-1]) for item in data} == set(report.network_sizes)


def test_validation_draws_no_random_numbers(unaligned):
    before = torch.get_rng_state()
    validate_dataset(unaligned, "unaligned")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_dataroot(unaligned):
    message = single_problem(unaligned.parent / (unaligned.name + "x"), "unaligned")
    assert "does not exist" in message and f"did you mean {unaligned}?" in message
    assert "has testA, testB, trainA, trainB" in single_problem(unaligned / "qqq" / "zzz", "unaligned")
    assert "is a file" in single_problem(unaligned / "trainA" / "0.png", "unaligned")


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
        (("train",), ["looks like an aligned dataset: use --dataset_mode aligned"]),
        ((".",), ["use --dataset_mode single"]),
    ],
)
def test_missing_folders_of_unaligned(tmp_path, instead, hints):
    for folder in instead:
        save_plain(tmp_path / folder / "0.png", size=(64, 32))
    message = single_problem(tmp_path, "unaligned")
    assert "has no trainA" in message
    assert ("trainB" in message.split(";")[0]) == ("trainB" not in instead)
    assert instead == (".",) or f"it has {sorted(instead)[0].split('/')[0]}" in message
    for hint in hints:
        assert hint.format(root=tmp_path) in message
    assert message.count("rename") == sum("rename" in hint for hint in hints)
    assert ("dataset_mode" in message) == any("dataset_mode" in hint for hint in hints)


def test_missing_folder_of_aligned(unaligned, tmp_path):
    message = single_problem(unaligned, "aligned")
    assert "has no train;" in message and "it has testA, testB, trainA, trainB" in message
    assert "use --dataset_mode unaligned" in message
    empty = tmp_path / "new"
    empty.mkdir()
    assert "it has no folders" in single_problem(empty, "aligned")
    (empty / "__").mkdir()
    assert "rename" not in single_problem(empty, "aligned")
    save_plain(empty / "Train" / "0.png")
    assert "rename Train to train" in single_problem(empty, "aligned")


def test_empty_folder(tmp_path):
    (tmp_path / "trainA").mkdir()
    (tmp_path / "trainB" / "deep").mkdir(parents=True)
    for name in ("a.heic", "b.heic", "deep/c.npy"):
        (tmp_path / "trainB" / name).write_bytes(b"")
    first, second = problems(tmp_path, "unaligned")
    assert "trainA: no images (.jpg" in first and "it is empty" in first
    assert "trainB: no images" in second and "it has 2 .heic, 1 .npy" in second


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_images(tmp_path, suffix):
    rng = np.random.default_rng(0)
    paths = [Path(save(tmp_path / f"{i}.{suffix}", rng.integers(0, 256, (40, 40, 3)))) for i in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size * 2 // 3])
    paths[3].write_bytes(b"<html>404</html>")
    message = single_problem(tmp_path, "single")
    assert "2 of 4 images cannot be read" in message
    assert f"1.{suffix} (damaged or truncated" in message and f"3.{suffix} (not an image" in message
    assert f"0.{suffix}" not in message and f"2.{suffix}" not in message


def test_every_header_of_a_large_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 5)
    for i in range(12):
        save_plain(tmp_path / f"{i:02d}.png")
    report = validate_dataset(tmp_path, "single")
    assert report.decoded == 5 and "5 decoded without error" in str(report)
    for i in range(12):  # at every position
        path = tmp_path / f"{i:02d}.png"
        whole = path.read_bytes()
        for broken in (b"", whole[: len(whole) // 2]):
            path.write_bytes(broken)
            assert f"{i:02d}.png (" in single_problem(tmp_path, "single")
        path.write_bytes(whole)


def test_decoded_files_of_a_large_folder_are_evenly_spaced(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 3)
    for i in range(9):
        path = Path(save(tmp_path / f"{i}.jpg", np.random.default_rng(i).integers(0, 256, (40, 40, 3))))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])  # a JPEG's header does not show it
    message = single_problem(tmp_path, "single")
    assert "3 of 9 images" in message
    assert [i for i in range(9) if f"{i}.jpg" in message] == [0, 3, 6]


def test_depth_of_images(tmp_path):
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(tmp_path / "0.png")
    Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32)).save(tmp_path / "1.tif")
    assert validate_dataset(tmp_path, "single").decoded == 2
    Image.fromarray(np.full((32, 32), 300, dtype=np.float32)).save(tmp_path / "2.tif")
    Image.fromarray(np.full((32, 32), 300, dtype=np.int32)).save(tmp_path / "3.tif")
    message = single_problem(tmp_path, "single")
    assert "2 of 4 images cannot be read: 2.tif (values from 300 to 300; expected 8 or 16 bits" in message
    assert "3.tif (int32 numbers; expected 8 or 16 bits" in message


def test_other_files_are_counted(unaligned):
    for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden"):
        (unaligned / "trainA" / name).touch()
    report = validate_dataset(unaligned, "unaligned")
    assert report.counts["trainA"] == 3
    assert str(report).endswith("; 3 other files (2 .heic, 1 .txt) in trainA left out")


def test_further_frames_are_counted(unaligned):
    image = Image.new("RGB", (32, 32))
    for name in ("a.gif", "b.tif"):
        image.save(unaligned / "trainA" / name, save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
    report = str(validate_dataset(unaligned, "unaligned"))
    assert f"; 2 images have further pages or frames, which are not used, such as {unaligned}/trainA/a.gif" in report


def test_aligned_images_that_are_not_pairs(aligned):
    save_plain(aligned / "train" / "odd.png", size=(63, 20))
    save_plain(aligned / "train" / "square.png", size=(64, 64))
    message = single_problem(aligned, "aligned")
    assert "2 of 6 images are not A and B of the same size side by side" in message
    assert "odd.png (63 x 20), square.png (64 x 64)" in message


def test_crop_larger_than_the_image(aligned, unaligned):
    message = single_problem(aligned, "aligned", preprocess="crop", crop_size=40)
    assert "4 of 4 images are smaller than --crop_size 40, which needs at least 80 x 40" in message
    assert "0.png (64 x 32)" in message
    assert validate_dataset(aligned, "aligned", preprocess="crop", crop_size=32).network_sizes == [(32, 32)]
    first, second = problems(unaligned, "unaligned", preprocess="crop", crop_size=33)
    assert "3 of 3 images are smaller" in first and "5 of 5 images are smaller" in second


@pytest.mark.parametrize("preprocess", ["resize_and_crop", "scale_width_and_crop"])
def test_crop_larger_than_load_size(aligned, preprocess):
    options = {"preprocess": preprocess, "load_size": 128, "crop_size": 256}
    assert "--crop_size 256 is larger than --load_size 128" in single_problem(aligned, "aligned", **options)
    (aligned / "train").rename(aligned / "test")  # where the load_size is the crop_size
    assert validate_dataset(aligned, "aligned", "test", **options).network_sizes == [(256, 256)]


@pytest.mark.parametrize(("multiple", "use"), [(4, "use 248 or 252"), (256, "use 256"), (128, "use 128 or 256")])
def test_crop_size_that_is_not_a_multiple(aligned, multiple, use):
    message = single_problem(aligned, "aligned", crop_size=250, size_multiple=multiple)
    assert f"--crop_size 250 is not a multiple of {multiple}" in message and message.endswith(use)


def test_image_sizes_that_are_not_multiples(tmp_path):
    save_plain(tmp_path / "a.png", size=(64, 64))
    save_plain(tmp_path / "b.png", size=(66, 40))  # becomes 64 x 40
    message = single_problem(tmp_path, "single", preprocess="none", size_multiple=64)
    assert "1 of 2 images give the network an input whose sides are not multiples of 64" in message
    assert "b.png (64 x 40)" in message and "use --preprocess resize_and_crop" in message
    assert validate_dataset(tmp_path, "single", preprocess="none", size_multiple=4).network_sizes == [
        (64, 40),
        (64, 64),
    ]
    message = single_problem(tmp_path, "single", preprocess="scale_width", load_size=32, crop_size=16, size_multiple=4)
    assert "b.png (32 x 19)" in message and "use --preprocess scale_width_and_crop" in message


def test_different_sizes_in_a_batch(tmp_path):
    save_plain(tmp_path / "a.png", size=(64, 64))
    save_plain(tmp_path / "b.png", size=(64, 40))
    message = single_problem(tmp_path, "single", preprocess="none", batch_size=2)
    assert "a batch of 2 needs images of one size; --preprocess none gives 64 x 40 to 64 x 64" in message
    assert validate_dataset(tmp_path, "single", preprocess="none", batch_size=1)
    assert validate_dataset(tmp_path, "single", batch_size=2)


def test_invalid_arguments(aligned):
    first, second = problems(aligned, "alined", direction="AB", load_size=0)[:2]
    assert "--dataset_mode='alined' is not one of 'unaligned', 'aligned', 'single'; did you mean 'aligned'?" in first
    assert "--direction='AB' is not one of 'AtoB', 'BtoA'" in second
    assert "--preprocess" in single_problem(aligned, "aligned", preprocess="resize")
    for name in ("load_size", "crop_size", "size_multiple"):
        assert f"--{name}=0: expected an integer >= 1" in single_problem(aligned, "aligned", **{name: 0})


def test_all_problems_are_listed(tmp_path):
    save_plain(tmp_path / "trainA" / "small.png", size=(16, 16))
    save_plain(tmp_path / "trainA" / "good.png", size=(64, 64))
    (tmp_path / "trainA" / "bad.png").write_bytes(b"")
    (tmp_path / "trainB").mkdir()
    with pytest.raises(DataError) as caught:
        validate_dataset(tmp_path, "unaligned", preprocess="crop", crop_size=30, size_multiple=4)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The dataset {tmp_path} (unaligned, train) cannot be used:"
    kinds = ["not a multiple of 4", "cannot be read: bad.png", "smaller than --crop_size 30", "trainB: no images"]
    assert len(lines) == 1 + len(kinds)
    for number, (line, kind) in enumerate(zip(lines[1:], kinds), 1):
        assert line.startswith(f"  {number}. ") and kind in line


def test_long_lists_are_shortened(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"")
    message = single_problem(tmp_path, "single", max_report=3)
    assert "7 of 7" in message and "2.png" in message and "3.png" not in message and message.endswith("and 4 more")
