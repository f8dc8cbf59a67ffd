import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from srpkd.data.folders import open_dataset
from srpkd.data.synthetic import (
    PALETTE,
    SyntheticScenes,
    _style,
    classes_of,
    generate_scenes,
    main,
    open_synthetic,
    paint,
    write_synthetic,
)
from srpkd.data.validate import validate_dataset

VARIANTS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread_throughout():
    """Small images gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worlds(one_thread_throughout) -> dict[int, tuple[SyntheticScenes, SyntheticScenes]]:
    """(200 scenes to learn from, 40 to be judged on) of each variant."""
    return {v: (generate_scenes(200, variant=v), generate_scenes(40, seed=1, variant=v)) for v in VARIANTS}


def twins(variant: int) -> list[tuple[int, int]]:
    """The pairs of classes that share a mean colour."""
    colours = _style(variant)[0]
    return [(i, j) for i in range(6) for j in range(i + 1, 6) if torch.equal(colours[i], colours[j])]


def pixels_by_class(world: SyntheticScenes) -> list[torch.Tensor]:
    pixels = world.photos.permute(0, 2, 3, 1)
    return [pixels[world.classes == k] for k in range(6)]


def test_shapes_and_ranges():
    world = generate_scenes(5, size=48, seed=3)
    assert world.photos.shape == world.labels.shape == (5, 3, 48, 48)
    assert world.photos.dtype == world.labels.dtype == torch.float32
    assert world.classes.shape == (5, 48, 48) and world.classes.dtype == torch.int64
    for images in (world.photos, world.labels):
        assert images.is_contiguous() and images.min() >= -1 and images.max() <= 1
    assert PALETTE.shape == (6, 3) and PALETTE.dtype == torch.uint8
    assert len(world[1:3]) == 2 and torch.equal(world[1:3].classes, world.classes[1:3])
    with pytest.raises(TypeError, match="slices"):
        world[0]


@pytest.mark.parametrize("arguments", [{"count": 0}, {"count": 1, "size": 8}])
def test_a_world_too_small_is_refused(arguments):
    with pytest.raises(ValueError, match="count >= 1 and size >= 16"):
        generate_scenes(**arguments)


def test_the_arguments_alone_decide():
    torch.manual_seed(0)
    first = generate_scenes(4, seed=7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = generate_scenes(4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)  # nor is the global generator used up
    assert torch.equal(first.photos, second.photos) and torch.equal(first.classes, second.classes)
    for other in (generate_scenes(4, seed=8), generate_scenes(4, seed=7, variant=1)):
        assert not torch.equal(first.classes, other.classes)
        assert not torch.equal(first.photos, other.photos)


def test_classes_of_undoes_paint():
    world = generate_scenes(3, size=32)
    assert torch.equal(classes_of(world.labels), world.classes)
    # also after the trip through 8 bits, and with errors of up to a fifth of the range
    assert torch.equal(classes_of(((world.labels + 1) * 127.5).round().byte() / 127.5 - 1), world.classes)
    assert torch.equal(classes_of(world.labels + 0.4 * torch.rand(world.labels.shape) - 0.2), world.classes)
    # brute force, over every class and pixel
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    distances = torch.stack([(images - paint(torch.full((2, 8, 8), k))).square().sum(1) for k in range(6)])
    assert torch.equal(classes_of(images), distances.argmin(0))


def test_600_pairs_are_quick():
    generate_scenes(8)  # whatever is paid once
    start = time.perf_counter()
    generate_scenes(600)
    assert time.perf_counter() - start < 10  # about 1 s on an idle core; the bound is for a busy machine


def test_all_classes_are_common(worlds):
    for train, _ in worlds.values():
        classes = train.classes
        present = torch.stack([(classes == k).flatten(1).any(1).float().mean() for k in range(6)])
        share = torch.bincount(classes.flatten(), minlength=6) / classes.numel()
        assert present.min() > 0.9, present
        assert share.min() > 0.1, share


def test_layouts_and_lights_differ():
    world = generate_scenes(30)
    same = (world.classes[:, None] == world.classes).float().mean((2, 3)).fill_diagonal_(0)
    assert same.max() < 0.6  # 1/6 by chance
    assert world.photos.mean((1, 2, 3)).std() > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_twins_share_colour_and_contrast(worlds, variant):
    pixels = pixels_by_class(worlds[variant][0])
    means = torch.stack([p.mean(0) for p in pixels])
    spreads = torch.stack([p.std(0) for p in pixels])
    pairs = twins(variant)
    assert sorted(sum(pairs, ())) == list(range(6))
    distance = torch.cdist(means, means)
    for i, j in pairs:
        # in [-1, 1]: 0.05 is six of 255 levels. Others are told apart by several times that
        assert distance[i, j] < 0.05
        assert min(distance[i, k] for k in range(6) if k not in (i, j)) > 4 * 0.05
        assert (spreads[i] / spreads[j] - 1).abs().max() < 0.1


def test_variants_differ_in_twins_and_textures():
    assert len({tuple(twins(v)) for v in range(8)}) > 3
    assert len({tuple(_style(v)[1]) for v in range(8)}) == 8
    assert twins(0) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_colour_alone_does_not_tell_the_class(worlds, variant):
    """The best rule on a pixel's colour, by a 16 x 16 x 16 histogram of 200 scenes, is right for about half."""
    train, test = worlds[variant]

    def cells(world: SyntheticScenes) -> torch.Tensor:
        r, g, b = ((world.photos + 1) * 8).long().clamp(0, 15).unbind(1)
        return (r * 16 + g) * 16 + b

    votes = torch.bincount((cells(train) * 6 + train.classes).flatten(), minlength=16**3 * 6).view(-1, 6)
    accuracy = (votes.argmax(1)[cells(test)] == test.classes).float().mean().item()
    assert 0.3 < accuracy < 0.6, accuracy  # nor is the colour worthless: chance is 0.17


@pytest.mark.parametrize("variant", VARIANTS)
def test_local_statistics_tell_the_class(worlds, variant):
    """A linear rule on the colour and on a few gradient energies, averaged over some pixels, is far better."""

    def features(world: SyntheticScenes) -> torch.Tensor:
        gray = world.photos.mean(1, keepdim=True)
        colour = F.avg_pool2d(world.photos, 9, 1, 4, count_include_pad=False)
        padded = F.pad(gray, (4,) * 4, mode="reflect")
        size = gray.shape[-1]
        steps = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 2), (2, -2), (0, 3), (3, 0), (0, 4), (4, 0)]
        shifted = [padded[:, :, 4 + dy :, 4 + dx :][:, :, :size, :size] for dy, dx in steps]
        energy = F.avg_pool2d(torch.cat([(gray - s).square() for s in shifted], 1), 9, 1, 4)
        # relative to their sum: what contrast and light have in common drops out
        energy = (energy / energy.sum(1, keepdim=True)).log()
        colour = colour - colour.mean((2, 3), keepdim=True)
        both = torch.cat([energy, colour, torch.ones_like(gray)], 1).permute(0, 2, 3, 1).flatten(0, 2)
        return both.double()

    train, test = worlds[variant]
    x, y = features(train[:40]), F.one_hot(train[:40].classes.flatten(), 6).double()
    weights = torch.linalg.solve(x.T @ x, x.T @ y)
    accuracy = ((features(test) @ weights).argmax(1) == test.classes.flatten()).float().mean().item()
    assert accuracy > 0.7, accuracy


def test_open_world_pairs():
    world = generate_scenes(4, size=16)
    data = open_synthetic(world)
    assert len(data) == 4 and len(list(data)) == 4  # iteration ends
    item = data[2]
    assert torch.equal(item["A"], world.photos[2]) and torch.equal(item["B"], world.labels[2])
    assert (item["A_path"], item["B_path"]) == ("photo/00002", "label/00002")
    back = open_synthetic(world, direction="BtoA")[2]
    assert torch.equal(back["A"], item["B"]) and torch.equal(back["B"], item["A"])
    assert back["A_path"] == "label/00002"


def test_open_world_mirrors_pairs_together_and_others_apart():
    world = generate_scenes(2, size=16)

    def mirrored(data, side, original) -> list[bool]:
        torch.manual_seed(0)
        images = [data[0][side] for _ in range(40)]
        assert all(torch.equal(i, original) or torch.equal(i, original.flip(-1)) for i in images)
        return [torch.equal(i, original.flip(-1)) for i in images]

    paired = open_synthetic(world, flip=True)
    a, b = mirrored(paired, "A", world.photos[0]), mirrored(paired, "B", world.labels[0])
    assert a == b and 5 < sum(a) < 35
    unpaired = open_synthetic(world, aligned=False, flip=True)
    assert mirrored(unpaired, "A", world.photos[0]) != mirrored(unpaired, "B", world.labels[1])


def test_open_world_unpaired_sides_are_disjoint_scenes():
    world = generate_scenes(9, size=16)
    data = open_synthetic(world, aligned=False)
    assert len(data) == 5
    torch.manual_seed(0)
    drawn = [data[i % 5] for i in range(100)]
    for item in drawn:
        assert any(torch.equal(item["A"], photo) for photo in world.photos[:4])
        assert any(torch.equal(item["B"], label) for label in world.labels[4:])
    assert len({item["B_path"] for item in drawn}) == 5
    assert len({item["B_path"] for item in drawn if item["A_path"] == "photo/00001"}) > 2  # not the same every time
    serial = open_synthetic(world, aligned=False, serial_batches=True)
    assert [serial[i]["B_path"] for i in range(5)] == [f"label/{i:05d}" for i in range(5)]
    assert serial[4]["A_path"] == "photo/00000"  # the smaller side starts over


def test_open_world_refuses():
    world = generate_scenes(1, size=16)
    with pytest.raises(ValueError, match="AtoB"):
        open_synthetic(world, direction="AB")
    with pytest.raises(ValueError, match="two scenes"):
        open_synthetic(world, aligned=False)


def test_write_world_aligned_is_the_world(tmp_path):
    write_synthetic(tmp_path / "w", 3, 2, size=32, seed=5)
    world = generate_scenes(5, size=32, seed=5)
    assert validate_dataset(tmp_path / "w", "aligned", preprocess="none", size_multiple=4).counts == {"train": 3}
    data = open_dataset(tmp_path / "w", "aligned", preprocess="none", no_flip=True)
    tests = open_dataset(tmp_path / "w", "aligned", "test", preprocess="none")
    assert (len(data), len(tests)) == (3, 2)
    for i, item in enumerate([tests[0], tests[1], data[0], data[1], data[2]]):
        torch.testing.assert_close(item["A"], world.photos[i], atol=0.5 / 127.5 + 1e-6, rtol=0)
        assert torch.equal(classes_of(item["B"][None])[0], world.classes[i])


def test_write_world_unaligned_keeps_training_scenes_apart(tmp_path):
    write_synthetic(tmp_path, 3, 2, size=32, layout="unaligned")
    world = generate_scenes(8, size=32)
    load = {"preprocess": "none", "no_flip": True, "serial_batches": True}
    data = open_dataset(tmp_path, "unaligned", **load)
    for i in range(3):
        torch.testing.assert_close(data[i]["A"], world.photos[2 + i], atol=0.5 / 127.5 + 1e-6, rtol=0)
        assert torch.equal(classes_of(data[i]["B"][None])[0], world.classes[5 + i])
    tests = open_dataset(tmp_path, "unaligned", "test", **load)
    assert os.path.basename(tests[1]["A_path"]) == os.path.basename(tests[1]["B_path"])
    assert torch.equal(classes_of(tests[1]["B"][None])[0], world.classes[1])
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


def test_command_line_gives_no_warning_and_a_world_needs_no_torchvision():
    code = """
import runpy, sys, warnings
sys.modules.update(torchvision=None, PIL=None)
warnings.simplefilter("error", RuntimeWarning)  # what python -m says of a module that its package has imported
sys.argv = ["world", "--help"]
try:
    runpy.run_module("srpkd.data.synthetic", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit", end.code)
import srpkd.data as data
print(len(data.generate_world(1, size=16)))
try:
    data.nothing
except AttributeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--layout" in out
    assert out.splitlines()[-3:] == ["exit 0", "1", "module 'srpkd.data' has no attribute 'nothing'"]
