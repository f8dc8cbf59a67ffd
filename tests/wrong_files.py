"""Invalid files and folders of all kinds, for the tests of invalid inputs."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_discriminator, define_generator
from srpkd.reporting.page import write_report

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


class Trap:
    """A payload that creates the file ``sprung`` in the working directory when it is unpickled."""

    def __reduce__(self):
        return open, ("sprung", "w")


def png_of(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def make_files(root: Path) -> Path:
    """Fill a folder; files that are not named after a fault are valid."""
    save_weights(define_generator("resnet_1blocks", ngf=1), root / "net.pth")
    save_weights(define_generator("unet_32", ngf=1), root / "unet.pth")
    save_weights(define_generator("resnet_1blocks", 2, 3, ngf=1), root / "two.pth")
    save_weights(define_discriminator("pixel", ndf=1), root / "discriminator.pth")
    save_weights(nn.Linear(2, 2), root / "linear.pth")
    (root / "text.pth").write_text("these are not weights\n")
    (root / "empty.pth").touch()
    whole = (root / "net.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(Trap(), root / "code.pth")
    (root / "pickle.pth").write_bytes(pickle.dumps(Trap()))
    (root / "folder.pth").mkdir()
    (root / "cut.safetensors").write_bytes(bytes(20))
    (root / "file").write_text("x")
    (root / "empty").mkdir()

    write_synthetic(root / "pairs", 1, 1, 32)
    write_synthetic(root / "unpaired", 2, 1, 32, layout="unaligned")
    photo = (root / "pairs/test/00000.png").read_bytes()
    for name, content in {
        "text": b"not an image",
        "cut": photo[: len(photo) // 2],
        "bomb": png_of(50_000, 50_000),
        "eps": EPS,
        "one": photo,
    }.items():
        (root / name).mkdir()
        (root / name / "00000.png").write_bytes(content)
    for name, dataset in {"bomb": "bombs", "eps": "eps-files", "text": "texts"}.items():
        for side in ("trainA", "trainB", "testA", "testB"):
            (root / dataset / side).mkdir(parents=True)
            (root / dataset / side / "00000.png").write_bytes((root / name / "00000.png").read_bytes())
    (root / "colours").write_text("1 2 x\n")

    runs = {
        "plain": '{"title": "a run"}',
        "broken": '{"table": 3}',
        "missing": '{"samples": [{"images": [{"label": "input", "file": "images/none.png"}]}]}',
        "bombs": '{"samples": [{"images": [{"label": "input", "file": "../../bomb/00000.png"}]}]}',
        "blocked": '{"title": "no page can be written"}',
    }
    for name, report in runs.items():
        (root / "results" / name).mkdir(parents=True)
        (root / "results" / name / "report.json").write_text(report)
        if name not in ("broken", "blocked"):
            write_report(root / "results" / name)
    (root / "results/blocked/index.html").mkdir()
    for name in ("trapped", "stateless"):
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "config.yaml").write_text(
            "dataroot: ':synthetic:'\nnetG: resnet_1blocks\nnetD: pixel\n"
        )
    torch.save({"version": 1, "training": Trap()}, root / "runs/trapped/state.pt")

    (root / "list.yaml").write_text("- name: x\n")
    (root / "cut.yaml").write_text("layers: {a: [b\n")
    (root / "deep.yaml").write_text("layers: " + "[" * 5000)
    (root / "code.yaml").write_text("name: !!python/object/apply:builtins.open [sprung, w]\n")
    (root / "unknown.yaml").write_text("n_epoch: 3\n")
    (root / "table.csv").write_text("provider,case\neager,1\n")
    return root


def tree(root: Path) -> dict[str, bytes | None]:
    """Return the content of every file below a folder, and None for every folder."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def assert_rejected(root: Path, call: Callable[[], object], error: type[Exception], message: str) -> None:
    """Check that a call raises an error with this message and changes no file below `root`.

    So it leaves no partial file, and no file that a payload creates.
    """
    before = tree(root)
    with pytest.raises(error, match=f"(?s){message}"):
        call()
    assert tree(root) == before


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limit the files that this process writes to so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # Python ignores the signal, and gets EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


REFUSALS = {errno.EACCES: "permission to write", errno.EROFS: "permission to write", errno.ENOSPC: "make room"}


def refusing(number: int):
    """Return an ``open`` that fails with this error number when it would create a file."""

    def refuse(path, mode="r", *arguments, **keywords):
        if "x" in mode or "w" in mode:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *arguments, **keywords)

    return refuse
