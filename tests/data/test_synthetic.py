"""Synthetic scenes: their statistics, datasets of them, and files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from srpkd.data.folders import open_dataset
from srpkd.data.synthetic import (
    PALETTE,
    SyntheticDataset,
    SyntheticScenes,
    _style,
    classes_of,
    generate_scenes,
    main,
    write_synthetic,
)
from srpkd.data.validate import validate_dataset

VARIANTS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread_throughout():
    """A second thread does not speed up small images, and slows them down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes_of_variants(one_thread_throughout) -> dict[int, tuple[SyntheticScenes, SyntheticScenes]]:
    """(200 training scenes, 40 test scenes) of each variant."""
    return {v: (generate_scenes(200, variant=v), generate_scenes(40, seed=1, variant=v)) for v in VARIANTS}


def class_pairs(variant: int) -> list[tuple[int, int]]:
    """Pairs of classes that have the same mean colour."""
    colours = _style(variant)[0]
    return [(i, j) for i in range(6) for j in range(i + 1, 6) if torch.equal(colours[i], colours[j])]


def pixels_by_class(scenes: SyntheticScenes) -> list[torch.Tensor]:
    pixels = scenes.photos.permute(0, 2, 3, 1)
    return [pixels[scenes.classes == k] for k in range(6)]


def test_shapes_and_ranges():
    scenes = generate_scenes(5, size=48, seed=3)
    assert scenes.photos.shape == scenes.labels.shape == (5, 3, 48, 48)
    assert scenes.photos.dtype == scenes.labels.dtype == torch.float32
    assert scenes.classes.shape == (5, 48, 48) and scenes.classes.dtype == torch.int64
    for images in (scenes.photos, scenes.labels):
        assert images.is_contiguous() and images.min() >= -1 and images.max() <= 1
    assert PALETTE.shape == (6, 3) and PALETTE.dtype == torch.uint8
    assert len(scenes[1:3]) == 2 and torch.equal(scenes[1:3].classes, scenes.classes[1:3])
    with pytest.raises(TypeError, match="expected a slice"):
        scenes[0]


def test_too_few_or_too_small_scenes():
    with pytest.raises(ValueError, match="count=0: expected an integer >= 1"):
        generate_scenes(0)
    with pytest.raises(ValueError, match="size=8: expected an integer >= 16"):
        generate_scenes(1, size=8)


def test_scenes_depend_only_on_the_arguments():
    torch.manual_seed(0)
    first = generate_scenes(4, seed=7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = generate_scenes(4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    assert torch.equal(first.photos, second.photos) and torch.equal(first.classes, second.classes)
    for other in (generate_scenes(4, seed=8), generate_scenes(4, seed=7, variant=1)):
        assert not torch.equal(first.classes, other.classes)
        assert not torch.equal(first.photos, other.photos)


@pytest.mark.parametrize(
    ("variant", "pixels_of_classes", "products"),
    [
        (0, [92, 80, 72, 81, 55, 132], (-22.8956, 22.4917)),
        (1, [72, 137, 111, 58, 45, 89], (-14.8984, -50.8294)),
        (2, [56, 78, 113, 101, 108, 56], (-242.0252, 53.3896)),
    ],
)
def test_scenes_are_those_of_the_recorded_results(variant, pixels_of_classes, products):
    scenes = generate_scenes(2, 16, seed=3, variant=variant)
    assert torch.bincount(scenes.classes.flatten()).tolist() == pixels_of_classes
    weights = torch.linspace(-1, 2, scenes.photos.numel()).sin()
    found = [float(weights @ images.flatten()) for images in (scenes.photos, scenes.labels)]
    assert found == pytest.approx(products, abs=1e-3)


def test_classes_of_undoes_paint():
    scenes = generate_scenes(3, size=32)
    assert torch.equal(classes_of(scenes.labels), scenes.classes)
    # also after rounding to 8 bits, and with errors of up to a fifth of the range
    assert torch.equal(classes_of(((scenes.labels + 1) * 127.5).round().byte() / 127.5 - 1), scenes.classes)
    assert torch.equal(classes_of(scenes.labels + 0.4 * torch.rand(scenes.labels.shape) - 0.2), scenes.classes)


def test_all_classes_are_frequent(scenes_of_variants):
    for train, _ in scenes_of_variants.values():
        classes = train.classes
        present = torch.stack([(classes == k).flatten(1).any(1).float().mean() for k in range(6)])
        share = torch.bincount(classes.flatten(), minlength=6) / classes.numel()
        assert present.min() > 0.9, present
        assert share.min() > 0.1, share


def test_layout_and_light_vary():
    scenes = generate_scenes(30)
    same = (scenes.classes[:, None] == scenes.classes).float().mean((2, 3)).fill_diagonal_(0)
    assert same.max() < 0.6  # 1/6 by chance
    assert scenes.photos.mean((1, 2, 3)).std() > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_class_pairs_have_the_same_colour_and_contrast(scenes_of_variants, variant):
    pixels = pixels_by_class(scenes_of_variants[variant][0])
    means = torch.stack([p.mean(0) for p in pixels])
    spreads = torch.stack([p.std(0) for p in pixels])
    pairs = class_pairs(variant)
    assert sorted(sum(pairs, ())) == list(range(6))
    distance = torch.cdist(means, means)
    for i, j in pairs:
        # in [-1, 1]: 0.05 is six of 255 levels; other classes differ by at least four times as much
        assert distance[i, j] < 0.05
        assert min(distance[i, k] for k in range(6) if k not in (i, j)) > 4 * 0.05
        assert (spreads[i] / spreads[j] - 1).abs().max() < 0.1


def test_variants_differ_in_class_pairs_and_textures():
    assert len({tuple(class_pairs(v)) for v in range(8)}) > 3
    assert len({tuple(_style(v)[1]) for v in range(8)}) == 8
    assert class_pairs(0) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_colour_does_not_determine_the_class(scenes_of_variants, variant):
    """The best classifier by a pixel's colour, a 16 x 16 x 16 histogram of 200 scenes, is right for about half."""
    train, test = scenes_of_variants[variant]

    def cells(scenes: SyntheticScenes) -> torch.Tensor:
        r, g, b = ((scenes.photos + 1) * 8).long().clamp(0, 15).unbind(1)
        return (r * 16 + g) * 16 + b

    votes = torch.bincount((cells(train) * 6 + train.classes).flatten(), minlength=16**3 * 6).view(-1, 6)
    accuracy = (votes.argmax(1)[cells(test)] == test.classes).float().mean().item()
    assert 0.3 < accuracy < 0.6, accuracy  # more than by chance, which is 0.17


@pytest.mark.parametrize("variant", VARIANTS)
def test_local_statistics_determine_the_class(scenes_of_variants, variant):
    """A linear classifier by colour and a few gradient energies, averaged over a neighbourhood, is far better."""

    def features(scenes: SyntheticScenes) -> torch.Tensor:
        gray = scenes.photos.mean(1, keepdim=True)
        colour = F.avg_pool2d(scenes.photos, 9, 1, 4, count_include_pad=False)
        padded = F.pad(gray, (4,) * 4, mode="reflect")
        size = gray.shape[-1]
        steps = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 2), (2, -2), (0, 3), (3, 0), (0, 4), (4, 0)]
        shifted = [padded[:, :, 4 + dy :, 4 + dx :][:, :, :size, :size] for dy, dx in steps]
        energy = F.avg_pool2d(torch.cat([(gray - s).square() for s in shifted], 1), 9, 1, 4)
        # relative to their sum, to remove the effect of contrast and light
        energy = (energy / energy.sum(1, keepdim=True)).log()
        colour = colour - colour.mean((2, 3), keepdim=True)
        both = torch.cat([energy, colour, torch.ones_like(gray)], 1).permute(0, 2, 3, 1).flatten(0, 2)
        return both.double()

    train, test = scenes_of_variants[variant]
    x, y = features(train[:40]), F.one_hot(train[:40].classes.flatten(), 6).double()
    weights = torch.linalg.solve(x.T @ x, x.T @ y)
    accuracy = ((features(test) @ weights).argmax(1) == test.classes.flatten()).float().mean().item()
    assert accuracy > 0.7, accuracy


def test_aligned_dataset():
    scenes = generate_scenes(4, size=16)
    data = SyntheticDataset(scenes)
    assert len(data) == 4 and len(list(data)) == 4  # iteration terminates
    item = data[2]
    assert torch.equal(item["A"], scenes.photos[2]) and torch.equal(item["B"], scenes.labels[2])
    assert (item["A_path"], item["B_path"]) == ("photo/00002", "label/00002")
    back = SyntheticDataset(scenes, direction="BtoA")[2]
    assert torch.equal(back["A"], item["B"]) and torch.equal(back["B"], item["A"])
    assert back["A_path"] == "label/00002"


def test_only_aligned_images_are_mirrored_together():
    scenes = generate_scenes(2, size=16)

    def mirrored(data, side, original) -> list[bool]:
        torch.manual_seed(0)
        images = [data[0][side] for _ in range(40)]
        assert all(torch.equal(i, original) or torch.equal(i, original.flip(-1)) for i in images)
        return [torch.equal(i, original.flip(-1)) for i in images]

    paired = SyntheticDataset(scenes, flip=True)
    a, b = mirrored(paired, "A", scenes.photos[0]), mirrored(paired, "B", scenes.labels[0])
    assert a == b and 5 < sum(a) < 35
    unpaired = SyntheticDataset(scenes, aligned=False, flip=True)
    assert mirrored(unpaired, "A", scenes.photos[0]) != mirrored(unpaired, "B", scenes.labels[1])


def test_unpaired_sides_show_different_scenes():
    scenes = generate_scenes(9, size=16)
    data = SyntheticDataset(scenes, aligned=False)
    assert len(data) == 5
    torch.manual_seed(0)
    drawn = [data[i % 5] for i in range(100)]
    for item in drawn:
        assert any(torch.equal(item["A"], photo) for photo in scenes.photos[:4])
        assert any(torch.equal(item["B"], label) for label in scenes.labels[4:])
    assert len({item["B_path"] for item in drawn}) == 5
    assert len({item["B_path"] for item in drawn if item["A_path"] == "photo/00001"}) > 2  # drawn at random
    serial = SyntheticDataset(scenes, aligned=False, serial_batches=True)
    assert [serial[i]["B_path"] for i in range(5)] == [f"label/{i:05d}" for i in range(5)]
    assert serial[4]["A_path"] == "photo/00000"  # the smaller side repeats


def test_invalid_arguments_of_a_dataset():
    scenes = generate_scenes(1, size=16)
    assert len(SyntheticDataset(scenes)) == 1
    with pytest.raises(ValueError, match="AtoB"):
        SyntheticDataset(scenes, direction="AB")
    with pytest.raises(ValueError, match="two scenes"):
        SyntheticDataset(scenes, aligned=False)


def test_written_aligned_images_are_the_scenes(tmp_path):
    write_synthetic(tmp_path / "w", 3, 2, size=32, seed=5)
    scenes = generate_scenes(5, size=32, seed=5)
    assert validate_dataset(tmp_path / "w", "aligned", preprocess="none", size_multiple=4).counts == {"train": 3}
    data = open_dataset(tmp_path / "w", "aligned", preprocess="none", no_flip=True)
    tests = open_dataset(tmp_path / "w", "aligned", "test", preprocess="none")
    assert (len(data), len(tests)) == (3, 2)
    for i, item in enumerate([tests[0], tests[1], data[0], data[1], data[2]]):
        torch.testing.assert_close(item["A"], scenes.photos[i], atol=0.5 / 127.5 + 1e-6, rtol=0)
        assert torch.equal(classes_of(item["B"][None])[0], scenes.classes[i])


def test_written_unaligned_training_sets_show_different_scenes(tmp_path):
    write_synthetic(tmp_path, 3, 2, size=32, layout="unaligned")
    scenes = generate_scenes(8, size=32)
    load = {"preprocess": "none", "no_flip": True, "serial_batches": True}
    data = open_dataset(tmp_path, "unaligned", **load)
    for i in range(3):
        torch.testing.assert_close(data[i]["A"], scenes.photos[2 + i], atol=0.5 / 127.5 + 1e-6, rtol=0)
        assert torch.equal(classes_of(data[i]["B"][None])[0], scenes.classes[5 + i])
    tests = open_dataset(tmp_path, "unaligned", "test", **load)
    assert os.path.basename(tests[1]["A_path"]) == os.path.basename(tests[1]["B_path"])
    assert torch.equal(classes_of(tests[1]["B"][None])[0], scenes.classes[1])
    with pytest.raises(ValueError, match="layout"):
        write_synthetic(tmp_path, layout="single")


def test_command_line(tmp_path, capsys):
    main([str(tmp_path), "--train", "2", "--test", "1", "--size", "16", "--variant", "2"])
    assert "2 training and 1 test scenes" in capsys.readouterr().out
    with Image.open(tmp_path / "train" / "00001.png") as image:
        assert image.size == (32, 16) and image.mode == "RGB"
        pixels = np.asarray(image)
    expected = generate_scenes(3, size=16, variant=2)
    np.testing.assert_allclose(pixels[:, :16] / 127.5 - 1, expected.photos[2].permute(1, 2, 0), atol=0.004)


def test_commands_with_synthetic_images_need_no_torchvision_and_give_no_warning():
    """To import it takes as long as to import torch."""
    code = """
import runpy, sys, warnings
sys.modules.update(torchvision=None)
warnings.simplefilter("error", RuntimeWarning)  # python -m warns of a module that its package has imported
sys.argv = ["synthetic", "--help"]
try:
    runpy.run_module("srpkd.data.synthetic", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit", end.code)
from srpkd.data.synthetic import generate_scenes
print(len(generate_scenes(1, size=16)))
import srpkd.train
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--layout" in out
    assert out.splitlines()[-2:] == ["exit 0", "1"]
