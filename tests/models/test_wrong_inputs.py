"""Invalid arguments of networks, weights, inference, export and profiles, and disks that refuse a write."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn
from wrong_files import assert_rejected, full_disk, refusing, tree

from srpkd.files import WriteError
from srpkd.models.checkpoints import CheckpointError, load_generator, load_weights, save_weights
from srpkd.models.complexity import count_macs
from srpkd.models.exporters import export_generator, to_onnx, to_pt2
from srpkd.models.inference import translate_folder
from srpkd.models.latency import profile_network
from srpkd.models.networks import define_discriminator, define_generator, init_weights

NET = define_generator("resnet_1blocks", ngf=1)

# name: (call, error, pattern of its message). The working directory has the files of wrong_files.py.
WRONG = {
    # --- networks ---
    "netG is a number": (lambda: define_generator(9), ValueError, "netG='9' is unknown: expected 'resnet_<n>blocks'"),
    "netG is nothing": (lambda: define_generator(None), ValueError, "netG='None' is unknown"),
    "a width that is no integer": (lambda: define_generator(ngf=1.5), TypeError, r"ngf=1\.5: expected an integer >= 1"),
    "a width that is a bool": (lambda: define_generator(ngf=True), TypeError, "ngf=True: expected an integer"),
    "channels as a text": (lambda: define_generator(input_nc="3"), TypeError, "input_nc='3': expected an integer"),
    "norm is a list": (
        lambda: define_generator(norm=["batch"]),
        ValueError,
        r"norm=\['batch'\] .* mean 'batch'",
    ),
    "netD is a list": (
        lambda: define_discriminator(["pixel"]),
        ValueError,
        r"netD=\['pixel'\] .* mean 'pixel'",
    ),
    "gain is a text": (lambda: init_weights(NET, init_gain="1"), TypeError, "init_gain='1': expected a number"),
    "gain below 0": (
        lambda: init_weights(NET, init_gain=-1),
        ValueError,
        "init_gain=-1: expected a finite number of at",
    ),
    # --- weights ---
    "weights from nowhere": (
        lambda: load_generator(None),
        TypeError,
        r"(expected str, bytes or|argument should be a str or an) os.PathLike object.*, not '?NoneType'?",
    ),
    "another than the spec": (lambda: load_generator("net.pth", "resnet"), TypeError, "spec: expected a GeneratorSpec"),
    "weights below a file": (lambda: load_weights("file/net.pth"), CheckpointError, "does not exist"),
    "nothing to save": (lambda: save_weights(None, "new.pth"), TypeError, "module: expected a torch.nn.Module"),
    "saved below a file": (
        lambda: save_weights(NET, "file/net.pth"),
        WriteError,
        "file/net.pth cannot be written: .*a file",
    ),
    "saved as a folder": (
        lambda: save_weights(NET, "empty"),
        WriteError,
        "empty cannot be written: Is a directory; give",
    ),
    # --- images through a generator ---
    "a file for results": (
        lambda: translate_folder(NET, "pairs", "file"),
        NotADirectoryError,
        "file is a file: give a",
    ),
    "batches of nothing": (lambda: translate_folder(NET, "pairs", "out", batch_size=0), ValueError, "batch_size=0"),
    "a size below 0": (
        lambda: translate_folder(NET, "pairs", "out", size=-1),
        ValueError,
        "size=-1: expected an integer",
    ),
    # --- export ---
    "ONNX of others": (lambda: to_onnx(nn.ReLU()), TypeError, "made by define_generator"),
    "pt2 of others": (lambda: to_pt2(nn.ReLU()), TypeError, "made by define_generator"),
    "another format": (
        lambda: export_generator("net.pth", format="onx"),
        ValueError,
        "format='onx' is not one of .*mean 'onnx'",
    ),
    "no tolerance": (
        lambda: export_generator("net.pth", tolerance=float("nan")),
        ValueError,
        "tolerance=nan: expected a finite",
    ),
    "over the weights": (
        lambda: export_generator("net.pth", "net.pth", force=True),
        ValueError,
        "net.pth is the file of",
    ),
    "into a folder": (
        lambda: export_generator("net.pth", "empty", force=True),
        IsADirectoryError,
        "empty is a folder: --output",
    ),
    # --- profile ---
    "a mode of profile": (
        lambda: profile_network(NET, (1, 3, 8, 8), modes=["eagr"]),
        ValueError,
        "mode='eagr' .* mean 'eager'",
    ),
    "a shape of three": (
        lambda: profile_network(NET, (3, 8, 8)),
        ValueError,
        r"input_shape=\(3, 8, 8\): expected \(B, C, H, W\)",
    ),
    "a shape of texts": (lambda: profile_network(NET, "1388"), TypeError, "input_shape's B='1': expected an integer"),
    "a shape of others": (
        lambda: profile_network(NET, (1, 4, 16, 16), modes=[]),
        ValueError,
        r"input_shape=\(1, 4, 16, 16\): the network does not take such images",
    ),
    "no network": (
        lambda: profile_network("net.pth", (1, 3, 8, 8)),
        TypeError,
        "net: expected a torch.nn.Module, received str",
    ),
    "no repeats": (
        lambda: profile_network(NET, (1, 3, 8, 8), repeats=0),
        ValueError,
        "repeats=0: expected an integer >= 1",
    ),
    "no end": (
        lambda: profile_network(NET, (1, 3, 8, 8), seconds=float("inf")),
        ValueError,
        "seconds=inf: expected a finite",
    ),
    "another grid": (
        lambda: count_macs(NET, transposed="in"),
        ValueError,
        "transposed='in' is not one of 'output', 'input'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_invalid_input_raises_and_leaves_no_file(files, monkeypatch, call, error, message):
    monkeypatch.chdir(files)
    assert_rejected(files, call, error, message)


@pytest.mark.parametrize("room", [0, 1000])
def test_full_disk_keeps_the_previous_weights(tmp_path, room):
    save_weights(NET, tmp_path / "net.pth")
    before = tree(tmp_path)
    with full_disk(room), pytest.raises(WriteError, match=r"net\.pth cannot be written: .*make room on that disk"):
        save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    with full_disk(room), pytest.raises(WriteError, match="make room"):
        save_weights(NET, tmp_path / "new" / "folders" / "net.pth")
    assert tree(tmp_path) == before
    load_generator(tmp_path / "net.pth")


def test_error_without_specific_advice(tmp_path, monkeypatch):

    monkeypatch.setattr("srpkd.files.open", refusing(errno.EIO), raising=False)
    with pytest.raises(WriteError, match="cannot be written: Input/output error; write elsewhere") as caught:
        save_weights(NET, tmp_path / "net.pth")
    assert caught.value.errno == errno.EIO and isinstance(caught.value.__cause__, OSError)


def test_other_errors_are_not_changed(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        save_weights(NET, tmp_path / "net.pth")
    assert not list(tmp_path.iterdir())
