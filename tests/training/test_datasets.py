"""Data sets and loaders, as the options describe them."""

import shutil
import subprocess
import sys

import pytest
import torch
from runs import CYCLE_GAN, PIX2PIX, SIZE, TEACHER, TINY
from sample_images import save_plain

from srpkd.training import datasets
from srpkd.training.config import parse_arguments
from srpkd.training.options import teacher_config


def test_all_images_of_all_stages_are_validated(refusal, unpaired, tmp_path):
    shutil.copytree(unpaired, tmp_path / "images")
    (tmp_path / "images/trainA/00004.png").write_bytes(b"broken")
    arguments = [
        "--dataroot=images",
        *CYCLE_GAN,
        *TINY,
        *TEACHER,
        "--max_dataset_size=2",
        "--teacher_max_dataset_size=5",
    ]
    assert "00004.png" in refusal(*arguments)
    config = parse_arguments([argument.replace("=5", "=4") for argument in arguments])
    assert "4 images in trainA" in datasets.validate_data(config, [config, teacher_config(config)], {}).text


def test_a_refusal_of_pix2pix_on_unpaired_images_names_options_that_work(refusal, run, unpaired, tmp_path):
    shutil.copytree(unpaired, tmp_path / "images")
    (tmp_path / "images/trainA/00000.png").rename(tmp_path / "images/trainA/zebra.png")
    arguments = ["--dataroot=images", *CYCLE_GAN, *TINY]
    for mode in ([], ["--dataset_mode=aligned"]):
        message = refusal(*arguments, "--model=pix2pix", *mode)
        assert "1 of 5 images have no image of the same name in images/trainB: zebra.png" in message
        assert message.endswith("use --model cycle_gan --dataset_mode unaligned")
    run(*arguments, *mode, "--model=cycle_gan", "--dataset_mode=unaligned")


def test_a_refusal_of_pix2pix_on_pairs_names_a_folder_that_works(refusal, run, tmp_path):
    for phase in ("train", "test"):
        for side in "AB":
            save_plain(tmp_path / "D/inner" / side / phase / "0.png")
    arguments = ["--model=pix2pix", "--load_size=18", "--crop_size=16", *TINY]
    assert refusal("--dataroot=D", *arguments).endswith("use --dataroot D/inner")
    run("--dataroot=D/inner", *arguments)


def test_only_the_training_images_of_a_batch_need_one_size(unpaired, tmp_path):
    shutil.copytree(unpaired, tmp_path / "images")
    arguments = [f"--dataroot={tmp_path}/images", *CYCLE_GAN, *TINY, "--preprocess=none", "--batch_size=2"]
    config = parse_arguments(arguments)
    save_plain(tmp_path / "images/testA/small.png", (16, 16))
    datasets.validate_data(config, [config], {})
    save_plain(tmp_path / "images/trainA/small.png", (16, 16))
    with pytest.raises(datasets.DataError, match="a batch of 2 needs images of one size"):
        datasets.validate_data(config, [config], {})


def test_generated_test_images_have_the_style_of_those_for_training_and_other_seeds():
    config = parse_arguments([*PIX2PIX, "--synthetic_variant=2", "--no_flip"])
    train, test = (datasets.open_data(config, phase) for phase in ("train", "test"))
    for data, count, seed in ((train, 8, datasets.TRAIN_SEED), (test, 3, datasets.TEST_SEED)):
        assert torch.equal(data.sides[0], datasets.generate_scenes(count, SIZE, seed, 2).photos)
    assert not any(torch.equal(a["B"], b["B"]) for a in train for b in test)
    unpaired = parse_arguments([*PIX2PIX, "--model=cycle_gan"])
    assert [datasets.open_data(unpaired, phase).aligned for phase in ("train", "test")] == [False, True]


def test_damaged_test_images_are_refused(refusal, unpaired, tmp_path):
    shutil.copytree(unpaired, tmp_path / "images")
    (tmp_path / "images/testB/00001.png").write_bytes(b"broken")
    assert "1 of 2 images cannot be read: 00001.png" in refusal("--dataroot=images", *CYCLE_GAN, *TINY)


@pytest.mark.parametrize(
    ("flags", "size_A", "size_B"),
    [
        ("--preprocess=none --crop_size=8", (40, 24), (36, 48)),
        ("--preprocess=none --direction=BtoA", (36, 48), (40, 24)),
        ("--preprocess=none --model=pix2pix", (36, 48), (36, 48)),
        ("--preprocess=scale_width --load_size=12 --crop_size=16", (20, 12), (16, 12)),
        ("--preprocess=scale_width_and_crop --load_size=24 --crop_size=16", (16, 16), (16, 16)),
        ("--preprocess=crop --crop_size=20", (20, 20), (20, 20)),
    ],
)
def test_the_input_size_of_each_direction(oblong, flags, size_A, size_B):
    config = parse_arguments([f"--dataroot={oblong}", *TINY, *flags.split()])
    before = torch.get_rng_state()
    assert (datasets.input_size(config, "G_A"), datasets.input_size(config, "G_B")) == (size_A, size_B)
    assert torch.equal(torch.get_rng_state(), before)
    item = datasets.open_data(config, "train")[0]
    assert (item["A"].shape[1:], item["B"].shape[1:]) == (size_A, size_B)


@pytest.mark.parametrize("module", ["srpkd.training.datasets", "srpkd.data.batches"])
@pytest.mark.core(1)
def test_data_loading_does_not_import_plotting(module):
    program = f"import sys, {module}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), datasets.DataError("a.png: damaged")], ids=repr)
def test_errors_that_are_not_of_loader_processes_pass(error):
    with pytest.raises(type(error)) as caught, datasets.plain_loader_errors():
        raise error
    assert caught.value is error
