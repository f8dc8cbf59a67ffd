"""Image files: safe decoding."""

import builtins
import os
import pickle
import socket
from contextlib import chdir, closing
from threading import Barrier
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from sample_images import ramps, save, save_plain

from srpkd.data.images import (
    DataError,
    ImageFiles,
    in_threads,
    left_half,
    open_image,
    read_image,
    right_half,
)


def test_pipes_and_folders_are_not_opened(tmp_path):
    """To open a named pipe takes until another process writes to it."""
    os.mkfifo(tmp_path / "pipe.png")
    with closing(socket.socket(socket.AF_UNIX)) as server, chdir(tmp_path):
        server.bind("socket.png")  # whose path may not be as long as that of the folder
    for path in (tmp_path / "pipe.png", tmp_path, tmp_path / "socket.png"):
        with pytest.raises(DataError, match="a folder, a pipe or a device; expected a file"), open_image(path):
            pass


def test_too_little_memory_to_decode(tmp_path, monkeypatch):
    """Pillow's MemoryError has no text."""
    path = save_plain(tmp_path / "0.png")
    monkeypatch.setattr(Image.Image, "load", Mock(side_effect=MemoryError))
    with pytest.raises(DataError, match=r"0.png: it needs more memory than is free, or is damaged$"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".jp2", ".jpg", ".png", ".ppm", ".tif", ".webp"])
def test_a_file_is_opened_once(tmp_path, monkeypatch, suffix):
    """On a network drive, opening a file takes milliseconds."""
    path = save_plain(tmp_path / f"0{suffix}")
    open_file, opened = builtins.open, []

    def counting(file, *arguments, **others):
        opened.append(file)
        return open_file(file, *arguments, **others)

    monkeypatch.setattr(builtins, "open", counting)
    with open_image(path) as image:
        assert image.frames == 1
        image.check(decode=False)
    assert opened == [path]
    read_image(path)
    assert opened == [path] * 2


def test_calls_in_threads():
    """Several run at once, their results are in order, and few items are taken before they are needed."""
    both, taken = Barrier(2), []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    def double(item):
        if item < 2:
            both.wait(timeout=60)
        if item == 990:
            raise DataError("990")
        return 2 * item

    results = in_threads(double, items())
    assert next(results) == 0 and len(taken) < 100
    with pytest.raises(DataError, match="990"):
        for number, result in enumerate(results, 1):
            assert result == 2 * number
    assert number == 989


def test_items_that_end_with_an_error_in_threads():
    """It comes after the results of the items before it. At most `ahead` items are taken before they are needed."""
    taken = []

    def items():
        for item in range(10):
            taken.append(item)
            yield item
        raise DataError("no more")

    results = in_threads(str, items(), ahead=3)
    assert next(results) == "0" and taken == [0, 1, 2]
    rest = []
    with pytest.raises(DataError, match="no more"):
        rest.extend(results)
    assert rest == [str(item) for item in range(1, 10)]


def test_palette_with_transparency(tmp_path, recwarn):
    image = Image.fromarray(ramps().astype(np.uint8)).quantize()
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with open_image(tmp_path / "a.png") as file:
        np.testing.assert_array_equal(np.asarray(file.read()), np.asarray(image.convert("RGB")))
        assert np.asarray(file.read_alpha()).min() < 255
    assert not recwarn.list


def test_data_error_without_problems():
    error = DataError("Too small.")
    assert str(error) == "Too small." and error.problems == []
    assert str(pickle.loads(pickle.dumps(error))) == "Too small."


def test_halves_of_a_pair(tmp_path):
    path = save(tmp_path / "0.png", np.concatenate([ramps(height=20), ramps(height=20, blue=255)], 1))
    for crop, blue in ((left_half, 0), (right_half, 255)):
        (image,) = ImageFiles([path], crop=crop)
        np.testing.assert_array_equal(image.permute(1, 2, 0), ramps(height=20, blue=blue))


def test_image_files_are_scaled(tmp_path):
    paths = [save_plain(tmp_path / "0.png", (8, 8)), save_plain(tmp_path / "1.png", (8, 12))]
    images = ImageFiles(paths)
    assert [image.shape for image in images] == [(3, 8, 8), (3, 12, 8)] and not images.have_same_size()
    scaled = ImageFiles(paths, size=5)
    assert [image.shape for image in scaled] == [(3, 5, 5)] * 2 and scaled.have_same_size()
