"""Atomic writes, and JSON."""

import errno
import json
import math
import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from srpkd import files
from srpkd.files import WriteError, atomic_write, write_file, write_json
from srpkd.models.checkpoints import CheckpointError, load_weights


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    for data in (b"one", b"three"):
        with atomic_write(path) as file:
            file.write(data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["a.bin"]


def test_atomic_write_of_the_longest_name(tmp_path):
    """85 Chinese characters are 255 bytes, as many as Linux allows."""
    path = write_file(tmp_path / os.fsdecode("漢".encode() * 83 + b"a.json"), b"content")
    assert len(os.fsencode(path.name)) == 255 and path.read_bytes() == b"content"


def test_atomic_write_of_a_name_that_is_too_long(tmp_path):
    with pytest.raises(WriteError, match=r"a\.json cannot be written: File name too long; write elsewhere"):
        write_file(tmp_path / ("a" * 251 + ".json"), b"content")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_atomic_write_changes_nothing(tmp_path, error):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"half of the n")
        file.flush()
        assert (tmp_path / "a.bin").read_bytes() == b"old"
        raise error
    assert (tmp_path / "a.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_interrupt_while_torch_saves(tmp_path):
    """torch.save then also fails to close its archive, and raises a RuntimeError."""
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.pt"):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 76096 vs 75988")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sync", get_args(files.Sync))
def test_atomic_write_syncs_the_file_then_its_name(tmp_path, monkeypatch, sync):
    calls = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append(("sync folder", status.st_ino) if stat.S_ISDIR(status.st_mode) else ("sync", status.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", Path(a).parent)), rename(a, b)))
    folder = tmp_path.resolve() / "new"
    with atomic_write(folder / "a.bin", sync) as file:
        file.write(b"12345")
    synced = [("sync folder", path.stat().st_ino) for path in (folder, tmp_path) if sys.platform != "win32"]
    expected = [("sync", 5), ("rename", folder), *synced]
    assert calls == {"name": expected, "content": expected[:2], "nothing": expected[1:2]}[sync]


def test_atomic_write_keeps_links_and_default_permissions(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to("target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "target")}
    assert len(modes) == 1


def test_json_has_no_numbers_that_other_programs_refuse(tmp_path):
    path = write_json(tmp_path / "a.json", {"rows": [{"value": math.inf}, (math.nan, 1.5, True, "inf", None)]})
    assert json.loads(path.read_text("utf-8"), parse_constant=pytest.fail) == {
        "rows": [{"value": None}, [None, 1.5, True, "inf", None]]
    }


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))


def test_a_file_that_another_program_has_open_is_replaced_when_it_is_closed(windows, tmp_path, monkeypatch):
    """Windows refuses it until then."""
    waited = []
    replace = os.replace

    def refuse_twice(source, target):
        if len(waited) < 2:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_twice)
    monkeypatch.setattr(time, "sleep", waited.append)
    write_file(tmp_path / "a.bin", b"content")
    assert waited == [0.01, 0.05]
    assert (tmp_path / "a.bin").read_bytes() == b"content"


def test_a_file_that_another_program_keeps_open(windows, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(WriteError, match=r"a.bin cannot be written: Access is denied"):
        write_file(tmp_path / "a.bin", b"content")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("h2z 12-30", ""),
        ("console", ""),
        ("a.nul", ""),
        ("12:30", "names on Windows cannot contain ':'"),
        ("a?b*", "names on Windows cannot contain '*?'"),
        ("run.", "Windows removes dots and spaces at the end of names"),
        ("run ", "Windows removes dots and spaces at the end of names"),
        ("Con", "Windows reserves this name for a device"),
        ("aux.h2z", "Windows reserves this name for a device"),
        ("lpt1", "Windows reserves this name for a device"),
    ],
)
def test_names_on_windows(name, problem):
    assert files.windows_name_problem(name) == problem


def test_case_sensitivity_of_a_folder(tmp_path):
    """A temporary file tells; a folder of Linux is case-sensitive."""
    assert files.is_case_sensitive(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []


def test_names_that_start_with_a_tilde(tmp_path, monkeypatch):
    """They are not the home folder of an unknown user."""
    monkeypatch.chdir(tmp_path)
    write_file(Path("~backup.json"), b"1")
    assert (tmp_path / "~backup.json").read_bytes() == b"1"
    with pytest.raises(CheckpointError, match=r"^~backup\.pth does not exist"):
        load_weights("~backup.pth")
    (tmp_path / "home").mkdir()
    for name in ("HOME", "USERPROFILE"):  # on POSIX systems, and on Windows
        monkeypatch.setenv(name, str(tmp_path / "home"))
    write_file(Path("~/a.json"), b"2")
    assert (tmp_path / "home" / "a.json").read_bytes() == b"2"
