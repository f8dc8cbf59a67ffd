"""Validation of datasets: reports of valid ones, and the problems of others."""

import errno
import os
import re
import shutil
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
        "train images (unpaired images): 3 images in trainA and 6 images in trainB, 32 x 32 to 48 x 40 "
        "pixels, all decoded without error; the network gets 36 x 36"
    )
    assert validate_dataset(aligned, "aligned", preprocess="none", size_multiple=32).network_sizes == [(32, 32)]
    limited = validate_dataset(unaligned, "unaligned", preprocess="none", max_dataset_size=2)
    assert limited.counts == {"trainA": 2, "trainB": 2}
    assert validate_dataset(unaligned, "unaligned", "test", crop_size=16).network_sizes == [(16, 16)]


def test_long_validation_shows_its_progress(unaligned, monkeypatch, capsys):
    """The headers of 200,000 files on a network drive take minutes."""
    options = {"preprocess": "none", "progress": True}
    validate_dataset(unaligned, "unaligned", **options)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(validate, "BAR_DELAY", 0)
    validate_dataset(unaligned, "unaligned", **options)
    assert "validating trainB" in capsys.readouterr().err
    validate_dataset(unaligned, "unaligned", preprocess="none")
    assert capsys.readouterr().err == ""


def test_valid_images_have_the_reported_size(tmp_path, side_a):
    for i, size in enumerate([(46, 30), (64, 64), (35, 71)]):
        save_plain(side_a / f"{i}.png", size=size)
    for preprocess in CHOICES["preprocess"]:
        for phase in ("train", "test"):
            options = {"preprocess": preprocess, "load_size": 40, "crop_size": 28}
            report = validate_dataset(tmp_path, "unaligned", phase, **options)
            data = open_dataset(tmp_path, "unaligned", phase, **options)
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


def test_hints_pass_over_folders_that_cannot_be_listed(unaligned, monkeypatch):
    """The root of a disk has a folder lost+found."""
    (unaligned / "trainA").rename(unaligned / "elsewhere")
    (unaligned / "lost+found").mkdir()
    access, listed = os.access, Path.iterdir

    def refuse(path):
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found" and access(path, mode))
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "has no trainA; it has elsewhere, testA, testB, trainB" in single_problem(unaligned, "unaligned")


@pytest.mark.parametrize(
    ("instead", "hints"),
    [
        (("Train-A", "trainB"), ["rename Train-A to trainA"]),
        (("trianA", "trainB"), ["rename trianA to trainA"]),
        (("trainingA", "trainingB"), ["rename trainingA to trainA and rename trainingB to trainB"]),
        (("Train/a", "Train/b"), ["rename Train/a to trainA and rename Train/b to trainB"]),
        (("A", "B"), ["rename A to trainA and rename B to trainB"]),
        (("A", "trainB"), ["rename A to trainA"]),
        (("A",), []),
        (("testA", "trainB"), []),
        (("inner/trainA", "inner/trainB"), ["use --dataroot {root}/inner"]),
        (("A/trainA", "A/trainB"), ["use --dataroot {root}/A"]),
        (("inner/train", "other"), []),
        (("train",), ["looks like an aligned dataset: use --dataset_mode aligned"]),
        ((".",), ["move those of A into {root}/trainA and those of B into {root}/trainB"]),
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
        assert message.endswith(hint.format(root=tmp_path))
    assert ("use --" in message or "rename" in message or "move" in message) == bool(hints)
    follow(message, tmp_path, "unaligned", "train")


def follow(message: str, root: Path, mode: str, phase: str) -> None:
    """Do what a message suggests, and expect a dataset that can be used."""
    for old, new in re.findall(r"rename (\S+) to (\w+)", message):
        (root / old).rename(root / new)
    mode = (re.findall(r"--dataset_mode (\w+)", message) or [mode])[0]
    used = (re.findall(r"--dataroot (\S+)", message) or [root])[0]
    if moves := re.findall(r"(?:into|and those of \w into) (\S+)", message):
        files = [path for path in root.iterdir() if path.is_file()]
        for target in moves:
            Path(target).mkdir()
            for file in files:
                shutil.copy(file, target)
    if moves or "rename" in message or "use --" in message:
        validate_dataset(used, mode, phase)


@pytest.mark.parametrize(
    ("instead", "size", "hint"),
    [
        (("Train",), (64, 32), "rename Train to train"),
        (("Train",), (32, 32), "rename Train to train, after fixing this: .*not A and B of the same size side by side"),
        (("A", "B"), (32, 32), "rename A to trainA and rename B to trainB"),
        (("inner/A/train", "inner/B/train"), (32, 32), "use --dataroot {root}/inner"),
        (("inner/train", "other/train"), (64, 32), "use --dataroot {root}/inner or --dataroot {root}/other"),
        (("inner/train",), (32, 32), "use --dataroot {root}/inner, after fixing this: .*not A and B"),
        ((".",), (64, 32), "move those for training into {root}/train"),
        ((".",), (32, 32), "move those of A into {root}/trainA and those of B into {root}/trainB"),
    ],
)
def test_missing_folders_of_aligned(tmp_path, instead, size, hint):
    for folder in instead:
        save_plain(tmp_path / folder / "0.png", size=size)
    message = single_problem(tmp_path, "aligned")
    assert f"dataroot {tmp_path} has no train, and no trainA and no trainB; it has " in message
    assert re.search(hint.format(root=tmp_path), message)
    if "after fixing" not in message:
        follow(message, tmp_path, "aligned", "train")


@pytest.mark.parametrize(("mode", "folder"), [("unaligned", "trainA"), ("unaligned", "B/train"), ("aligned", "train")])
def test_a_folder_of_images_for_the_data_root(tmp_path, mode, folder):
    for name in {folder, folder.replace("A", "B"), folder.replace("B", "A")}:
        save_plain(tmp_path / name / "0.png", size=(64, 32))
    message = single_problem(tmp_path / folder, mode)
    assert message.endswith(f"it has no folders; use --dataroot {tmp_path}")
    follow(message, tmp_path / folder, mode, "train")


def test_a_missing_side_is_named(tmp_path):
    for mode in ("aligned", "unaligned"):
        for index, (folder, missing) in enumerate(
            [("trainA", "trainB"), ("train_B", "train_A"), ("train/A", "train/B"), ("B/train", "A/train")]
        ):
            root = tmp_path / f"{mode}{index}"
            save_plain(root / folder / "0.png", size=(64, 32))
            assert f"has no {missing}; it has {folder.split('/')[0]}" in single_problem(root, mode)


def test_folders_of_another_phase_are_not_suggested(tmp_path):
    for folder in ("A/train", "B/test"):
        save_plain(tmp_path / folder / "0.png")
    for mode in ("aligned", "unaligned"):
        assert single_problem(tmp_path, mode).endswith("has no B/train; it has A, B")
    save_plain(tmp_path / "new/train/A/0.png", size=(64, 32))
    assert single_problem(tmp_path / "new", "aligned").endswith("has no train/B; it has train")


@pytest.mark.parametrize("folders", [("trainA", "trainB"), ("train/A", "train/B"), ("A/train", "B/train")])
def test_pairs_next_to_images_that_are_no_pairs(tmp_path, folders):
    for folder in (*folders, "train"):
        save_plain(tmp_path / folder / "0.png")
    hint = problems(tmp_path, "aligned")[-1]
    assert hint == (
        f"{' and '.join(folders)} have pairs that can be used: to read them, move the other images out of "
        f"{tmp_path / 'train'}"
    )
    (tmp_path / "train/0.png").unlink()
    assert list(validate_dataset(tmp_path, "aligned").counts) == list(folders)


def test_folders_without_any_image(tmp_path):
    empty = tmp_path / "new"
    empty.mkdir()
    assert "it has no folders" in single_problem(empty, "aligned")
    (empty / "__").mkdir()
    assert "rename" not in single_problem(empty, "aligned")


@pytest.mark.parametrize("form", ["{}/A {}/B", "A/{} B/{}", "{}A {}B", "{}_A {}_B"])
@pytest.mark.parametrize("phase", ["train", "test"])
def test_report_of_pairs_in_two_folders(tmp_path, form, phase):
    folders = form.format(phase, phase).split()
    for name in ("0.png", "deep/1.png"):
        for folder in folders:
            save_plain(tmp_path / folder / name)
    report = validate_dataset(tmp_path, "aligned", phase)
    assert report.counts == dict.fromkeys(folders, 2)
    assert str(report).startswith(
        f"{phase} images (pairs by file name): 2 images in {folders[0]} and 2 images in {folders[1]}, 32 x 32 pixels"
    )
    unpaired = validate_dataset(tmp_path, "unaligned", phase)
    assert unpaired.counts == report.counts and "unpaired images" in str(unpaired)
    for folder, others in (folders, folders[::-1]):
        save_plain(tmp_path / folder / "alone.png")
        first, second = problems(tmp_path, "aligned", phase)
        assert f"1 of 3 images have no image of the same name in {tmp_path / others}: alone.png" in first
        assert "can be used without pairs: use --model cycle_gan --dataset_mode unaligned" in second
        assert validate_dataset(tmp_path, "unaligned", phase)
        (tmp_path / folder / "alone.png").unlink()


def test_pairs_of_different_sizes(tmp_path):
    for index, sizes in enumerate([((64, 48), (64, 48)), ((64, 48), (32, 24)), ((33, 50), (66, 101))]):
        for folder, size in zip("AB", sizes):
            save_plain(tmp_path / "train" / folder / f"{index}.png", size=size)
    assert validate_dataset(tmp_path, "aligned").network_sizes == [(256, 256)]
    message = problems(tmp_path, "aligned", preprocess="none", crop_size=512)[0]
    assert "train/A and train/B: 2 of 3 pairs are two images of different sizes: use --preprocess resize_and_crop " in (
        message
    )
    assert "--load_size 512" in message and "1.png (64 x 48 and 32 x 24), 2.png (33 x 50 and 66 x 101)" in message
    assert validate_dataset(tmp_path, "aligned", load_size=512, crop_size=512)
    save_plain(tmp_path / "train/A/3.png", size=(64, 48))
    save_plain(tmp_path / "train/B/3.png", size=(48, 64))
    message = problems(tmp_path, "aligned")[0]
    assert "1 of 4 pairs are two images of different shapes: scale the files of a pair to the same size: 3.png" in (
        message
    )
    (tmp_path / "train/B/0.png").write_bytes(b"")
    unreadable, differing = problems(tmp_path, "aligned")
    assert "1 of 4 images cannot be read: 0.png" in unreadable and differing == message


def test_val_serves_as_test(aligned, unaligned):
    (aligned / "train").rename(aligned / "val")
    for side in "AB":
        shutil.rmtree(aligned / f"test{side}")
    assert "test images (from val, pairs side by side, A left and B right): 4 images in val" in str(
        validate_dataset(aligned, "aligned", "test", crop_size=32)
    )
    assert problems(unaligned, "unaligned", "test")
    for side in "AB":
        save_plain(unaligned / f"val{side}" / "0.png")
    assert validate_dataset(unaligned, "unaligned", "test").counts == {"valA": 1, "valB": 1}


def test_suggested_sizes_can_be_used(tmp_path, side_a):
    """Every option that a message suggests, followed."""
    save_plain(side_a / "a.png", size=(60, 45))
    save_plain(side_a / "b.png", size=(33, 70))
    for preprocess in CHOICES["preprocess"]:
        for load_size, crop_size, multiple in [(286, 286, 4), (20, 50, 16), (286, 50, 32), (286, 45, 64), (45, 5, 1)]:
            options = {"preprocess": preprocess, "load_size": load_size, "crop_size": crop_size}
            for _ in range(4):  # a problem may hide another one
                try:
                    validate_dataset(tmp_path, "unaligned", size_multiple=multiple, **options)
                    break
                except DataError as error:
                    found = error.problems
                assert len(found) <= 3
                advice = found[-1].split("use ")[-1].replace("a smaller --crop_size or a larger --load_size", "")
                flags = re.findall(r"--(\w+) (\w+)", advice.split(":")[0])
                if not flags and (size := re.match(r"(\d+)", advice)):
                    flags = [("crop_size", size[1])]
                elif not flags:
                    flags = [("load_size", str(crop_size))]
                options |= {name: int(value) if value.isdigit() else value for name, value in flags}
            else:
                raise AssertionError(f"{found} after {options}")


def test_empty_folder(tmp_path):
    (tmp_path / "trainA").mkdir()
    (tmp_path / "trainB" / "deep").mkdir(parents=True)
    for name in ("a.heic", "b.heic", "deep/c.npy"):
        (tmp_path / "trainB" / name).write_bytes(b"")
    first, second = problems(tmp_path, "unaligned")
    assert "trainA: no images (.jpg" in first and "it has no files" in first
    assert "trainB: no images" in second and "it has 3 other files (2 .heic, 1 .npy)" in second


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_images(tmp_path, side_a, suffix):
    rng = np.random.default_rng(0)
    paths = [Path(save(side_a / f"{i}.{suffix}", rng.integers(0, 256, (40, 40, 3)))) for i in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size * 2 // 3])
    paths[3].write_bytes(b"<html>404</html>")
    message = single_problem(tmp_path, "unaligned")
    assert "2 of 4 images cannot be read" in message
    assert f"1.{suffix} (damaged or truncated" in message and f"3.{suffix} (not an image" in message
    assert f"0.{suffix}" not in message and f"2.{suffix}" not in message


def test_every_header_of_a_large_folder_is_read(tmp_path, side_a, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 5)
    for i in range(12):
        save_plain(side_a / f"{i:02d}.png")
    report = validate_dataset(tmp_path, "unaligned")
    assert report.decoded == 6 and "6 decoded without error" in str(report)
    for i in range(12):  # at every position
        path = side_a / f"{i:02d}.png"
        whole = path.read_bytes()
        for broken in (b"", whole[: len(whole) // 2]):
            path.write_bytes(broken)
            assert f"{i:02d}.png (" in single_problem(tmp_path, "unaligned")
        path.write_bytes(whole)


def test_decoded_files_of_a_large_folder_are_evenly_spaced(tmp_path, side_a, monkeypatch):
    monkeypatch.setattr(validate, "DECODED", 3)
    for i in range(9):
        path = Path(save(side_a / f"{i}.jpg", np.random.default_rng(i).integers(0, 256, (40, 40, 3))))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])  # a JPEG's header does not show it
    message = single_problem(tmp_path, "unaligned")
    assert "3 of 9 images" in message
    assert [i for i in range(9) if f"{i}.jpg" in message] == [0, 3, 6]


def test_depth_of_images(tmp_path, side_a):
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(side_a / "0.png")
    Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32)).save(side_a / "1.tif")
    assert validate_dataset(tmp_path, "unaligned").decoded == 3
    Image.fromarray(np.full((32, 32), 300, dtype=np.float32)).save(side_a / "2.tif")
    Image.fromarray(np.full((32, 32), 300, dtype=np.int32)).save(side_a / "3.tif")
    message = single_problem(tmp_path, "unaligned")
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
    assert "0.png (64 x 32)" in message and "80 x 40: use --crop_size 32, or --preprocess" in message
    message = single_problem(aligned, "aligned", preprocess="crop", crop_size=64, size_multiple=64)
    assert "128 x 64: use --preprocess" in message
    options = {"preprocess": "crop", "load_size": 16, "crop_size": 32}  # which needs no load_size
    assert validate_dataset(aligned, "aligned", **options).network_sizes == [(32, 32)]
    first, second = problems(unaligned, "unaligned", preprocess="crop", crop_size=33)
    assert "3 of 3 images are smaller than --crop_size 33, which needs at least 33 x 33" in first
    assert "5 of 5 images are smaller" in second


@pytest.mark.parametrize("preprocess", ["resize_and_crop", "scale_width_and_crop"])
def test_crop_larger_than_load_size(aligned, preprocess):
    options = {"preprocess": preprocess, "load_size": 128, "crop_size": 256}
    assert "--crop_size 256 is larger than --load_size 128" in single_problem(aligned, "aligned", **options)
    (aligned / "train").rename(aligned / "test")  # where the load_size is the crop_size
    assert validate_dataset(aligned, "aligned", "test", **options).network_sizes == [(256, 256)]


@pytest.mark.parametrize(
    ("load_size", "multiple", "use"),
    [
        (252, 4, "use 248 or 252"),
        (251, 4, "use 248 or 252 with --load_size 252"),
        (286, 256, "use 256"),
        (286, 128, "use 128 or 256"),
    ],
)
def test_crop_size_that_is_not_a_multiple(aligned, load_size, multiple, use):
    message = single_problem(aligned, "aligned", load_size=load_size, crop_size=250, size_multiple=multiple)
    assert f"--crop_size 250 is not a multiple of {multiple}" in message and message.endswith(use)


def test_image_sizes_that_are_not_multiples(tmp_path, side_a):
    save_plain(side_a / "a.png", size=(64, 64))
    save_plain(side_a / "b.png", size=(66, 40))  # becomes 64 x 40
    message = single_problem(tmp_path, "unaligned", preprocess="none", size_multiple=64)
    assert "1 of 2 images give the network an input whose sides are not multiples of 64" in message
    assert "use --preprocess resize_and_crop: b.png (64 x 40)" in message
    assert validate_dataset(tmp_path, "unaligned", preprocess="none", size_multiple=4).network_sizes == [
        (64, 40),
        (64, 64),
    ]
    sizes = {"load_size": 32, "crop_size": 18, "size_multiple": 4}
    message = single_problem(tmp_path, "unaligned", preprocess="scale_width", **sizes)
    assert "b.png (32 x 19)" in message and "use --preprocess scale_width_and_crop --crop_size 16:" in message


def test_different_sizes_in_a_batch(tmp_path, side_a):
    save_plain(side_a / "a.png", size=(64, 64))
    save_plain(side_a / "b.png", size=(64, 40))
    message = single_problem(tmp_path, "unaligned", preprocess="none", batch_size=2)
    assert "a batch of 2 needs images of one size; --preprocess none gives 64 x 40 to 64 x 64" in message
    assert validate_dataset(tmp_path, "unaligned", preprocess="none", batch_size=1)
    assert validate_dataset(tmp_path, "unaligned", batch_size=2)


def test_invalid_arguments(aligned):
    first, second = problems(aligned, "alined", direction="AB", load_size=0)[:2]
    assert "--dataset_mode='alined' is not one of 'unaligned', 'aligned'; did you mean 'aligned'?" in first
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


def test_long_lists_are_shortened(tmp_path, side_a):
    for i in range(14):
        (side_a / f"{i:02d}.png").write_bytes(b"")
    message = single_problem(tmp_path, "unaligned")
    assert "14 of 14" in message and "09.png" in message and "10.png" not in message
    assert message.endswith("and 4 more; fix or remove them")
