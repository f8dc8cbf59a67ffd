"""Lists of image files, and pairs by name."""

import errno
import os
import re
import unicodedata
from pathlib import Path

import pytest
from sample_images import save_plain

from srpkd.data.images import DataError
from srpkd.data.listing import find_images, image_files, pair_by_name, relative_path


def test_image_files_are_sorted_and_found_in_subfolders(tmp_path):
    names = ["b/2.JPG", "a/x.Png", "z.tiff", "b/1.jpeg", "c.webp"]
    for name in names:
        save_plain(tmp_path / name)
    for name in ("notes.txt", "b/._1.jpg", ".hidden.png", ".git/0.png", "jpg"):  # none of these is an image
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert image_files(tmp_path) == [str(tmp_path / name) for name in sorted(names)]
    assert image_files(tmp_path / "nowhere") == []


def test_links_are_followed_once(tmp_path):
    """Also links to parents, and to folders that other links point to."""
    save_plain(tmp_path / "elsewhere/deep/0.png")
    data = tmp_path / "data"
    data.mkdir()
    for link, target in (("data/link", ""), ("data/same", ""), ("elsewhere/deep/up", ""), ("data/up", "../data")):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere" / target)
    assert image_files(data) == [str(data / "link/deep/0.png")]
    assert image_files(data / "up") == [str(data / "up/link/deep/0.png")]


@pytest.mark.parametrize("locked", ["data", "data/b"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch, locked):
    """Its images would be missing in the results and in the scores."""
    for name in ("data/0.png", "data/b/1.png"):
        save_plain(tmp_path / name)
    scandir = os.scandir

    def refuse(path):
        if path == str(tmp_path / locked):  # a mode of the folder would not stop root
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{locked}: this folder cannot be listed .Permission denied.: change"):
        image_files(str(tmp_path / "data"))


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400], ids=oct)  # the last: its files can be listed but not opened
@pytest.mark.parametrize("pattern", ["*/*.png", "*/1.png", "b/*.png", "**/*.png", "**", "[b]/**/1.png", "."])
def test_folders_without_permission_are_not_left_out(tmp_path, pattern, mode):
    for name in ("a/1.png", "b/deep/1.png", "b/1.png"):
        save_plain(tmp_path / name)
    (tmp_path / "b").chmod(mode)
    try:
        message = as_nobody(tmp_path, lambda: find_images(pattern))
    finally:
        (tmp_path / "b").chmod(0o700)
    assert re.match(r"(\./)?b(/deep)?: this folder cannot be listed \(Permission denied\): change", message), message


@pytest.mark.parametrize("where", ["b/deep", "b/deep/*.png", "b/deep/1.png"])
def test_images_below_a_folder_without_permission(tmp_path, where):
    save_plain(tmp_path / "b/deep/1.png")
    (tmp_path / "b").chmod(0)
    try:
        message = as_nobody(tmp_path, lambda: find_images(where))
    finally:
        (tmp_path / "b").chmod(0o700)
    assert re.match(r"b/deep(/1\.png)?: .* \(Permission denied\): change", message), message


def test_a_name_that_is_too_long_is_no_matter_of_permissions():
    with pytest.raises(ValueError, match="no images found; expected a folder of images"):
        find_images("x" * 300)


def test_patterns_with_other_folders(tmp_path, monkeypatch):
    """Patterns in the working directory, through links, and of folders and files that do not exist."""
    paths = [save_plain(tmp_path / name) for name in ("0.png", "a/0.png", "a/b/0.png")]
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "x.png").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    assert find_images("[0].png").images == ["0.png"]
    assert find_images("*/*.png").images == ["a/0.png", "x.png/0.png"]
    assert find_images(f"{tmp_path}/a/**/*.png").images == paths[1:]
    assert find_images("a/**/0.png").images == find_images("a/**").images == ["a/0.png", "a/b/0.png"]
    assert find_images("a/*").images == ["a/0.png"]
    for pattern in ("nowhere/*.png", "link/*.png", "0.png/*.png", "*/c/*.png"):
        with pytest.raises(ValueError, match="no images found"):
            find_images(pattern)


def as_nobody(folder, call):
    """Call a function in a folder, in a process without root's permission to list every folder.

    Return the message of the `DataError` that it raises, '' if it raises none.
    """
    folder.chmod(0o755)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        message = b"no DataError"
        try:
            os.chdir(folder)
            if os.getuid() == 0:
                os.chown("b", 65534, 65534)
                os.setgid(65534)
                os.setuid(65534)
            call()
            message = b""
        except DataError as error:
            message = str(error).encode()
        except BaseException as error:
            message = repr(error).encode()
        finally:
            os.write(writer, message)
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as result:
        message = result.read().decode()
    os.waitpid(child, 0)
    return message


def test_find_images_in_a_folder_or_by_pattern(tmp_path):
    paths = [save_plain(tmp_path / name) for name in ("0_fake_B.png", "0_real_B.png", "1_fake_B.png")]
    assert find_images(str(tmp_path)).images == paths
    assert find_images(str(tmp_path / "*_fake_B.png")).images == paths[::2]
    with pytest.raises(ValueError, match="no images found; expected a folder of images or a pattern"):
        find_images(str(tmp_path / "*.gif"))


@pytest.mark.parametrize("folder", ["data", "data/", "./data", ".", "data/../data", "data/b"])
def test_relative_paths_are_those_of_the_standard_library(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    save_plain(tmp_path / "data/b/0.png")
    for given in (folder, Path(folder), tmp_path / folder):
        [path] = image_files(given)
        assert relative_path(path, given) == os.path.relpath(path, given)
        assert relative_path(path, Path(given)) == os.path.relpath(path, given)


def test_images_are_paired_by_name():
    assert pair_by_name(["x/a_fake.png", "x/b.jpg"], ["y/b.png", "y/a_real.png", "y/c.png"]) == [
        ("x/a_fake.png", "y/a_real.png"),
        ("x/b.jpg", "y/b.png"),
    ]
    both = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]  # one name, also on macOS
    assert pair_by_name(both[:1], both[1:]) == [tuple(both)]
    with pytest.raises(ValueError, match=r"1 of 2 generated images have no real image .* such as x/q.png; .* like y/a"):
        pair_by_name(["x/a.png", "x/q.png"], ["y/a.png"])
    with pytest.raises(ValueError, match=r"^x/a\.png and x/a\.jpg have the same name"):
        pair_by_name(["x/b.png", "x/a.png", "x/a.jpg"], ["y/a.png"])
