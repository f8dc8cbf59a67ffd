"""Reading and writing weights, and the messages for files that are something else."""

import errno
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from small_generators import SMALL, assert_same, errors_of_the_system, make, refusal, with_old_statistics
from torch import nn

from srpkd.models.checkpoints import load_generator, load_weights, save_weights
from srpkd.models.networks import GeneratorSpec, define_discriminator

# Round trips


SPECS = [
    SMALL,
    replace(SMALL, netG="resnet_1blocks", ngf=3, input_nc=1, output_nc=2, norm="batch", dropout=True),
    GeneratorSpec("unet_16", ngf=1, norm="batch"),
    GeneratorSpec("unet_64", ngf=2, output_nc=1),
    replace(SMALL, norm="none"),
    GeneratorSpec("unet_32", ngf=2, norm="none"),
    replace(SMALL, antialias="both"),
    replace(SMALL, antialias="down", norm="none", dropout=True),
    replace(SMALL, antialias="up", norm="batch"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_generator_round_trip(tmp_path, spec, given):
    net = make(spec)
    save_weights(net, tmp_path / "net.pth")
    back = load_generator(tmp_path / "net.pth", spec if given else None)
    assert_same(back.state_dict(), net.state_dict())
    assert back.training and all(p.requires_grad and p.is_leaf and not p.is_meta for p in back.parameters())
    x = torch.randn(2, spec.input_nc, 64, 64) / 8
    assert torch.equal(back.eval()(x), net.eval()(x))
    back.train()(x).sum().backward()
    assert all(p.grad is not None for p in back.parameters())


def test_unet_dropout_is_taken_from_the_spec(tmp_path):
    spec = GeneratorSpec("unet_128", ngf=1, dropout=True)
    save_weights(make(spec), tmp_path / "net.pth")

    def dropouts(net):
        return sum(isinstance(m, nn.Dropout) for m in net.modules())

    assert dropouts(load_generator(tmp_path / "net.pth", spec)) == 2
    assert dropouts(load_generator(tmp_path / "net.pth")) == 0


def test_saved_weights_can_be_read_by_the_public_code(tmp_path):
    net = make()
    save_weights(net, str(tmp_path / "latest_net_G.pth"))
    plain = torch.load(tmp_path / "latest_net_G.pth", weights_only=True)
    assert type(plain) is dict and all(type(v) is torch.Tensor and v.device.type == "cpu" for v in plain.values())
    assert_same(plain, net.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_public_code_are_read(tmp_path, zipped):
    net = make()
    torch.save(net.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    weights = load_weights(str(tmp_path / "net.pth"))
    assert type(weights) is dict
    assert_same(weights, net.state_dict())


def test_half_precision_weights_give_a_float32_generator(tmp_path):
    net = make()
    save_weights(net.half(), tmp_path / "net.pth")
    assert {v.dtype for v in load_weights(tmp_path / "net.pth").values()} == {torch.float16}
    back = load_generator(tmp_path / "net.pth")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert_same(back.state_dict(), net.float().state_dict())


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net = make()
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert_same(load_generator(tmp_path / "net.safetensors").state_dict(), net.state_dict())
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    assert "truncated, damaged" in refusal(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_do_not_depend_on_their_file(tmp_path, suffix):
    """Overwriting the file in place does not change weights that were loaded from it."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net, path = make(replace(SMALL, ngf=16)), tmp_path / f"net{suffix}"
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    back = load_generator(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(back.state_dict(), net.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "spec",
    [
        GeneratorSpec("resnet_9blocks", ngf=4),  # a CycleGAN teacher
        GeneratorSpec("resnet_6blocks", ngf=3, output_nc=1, norm="batch", dropout=True),
        GeneratorSpec("resnet_6blocks", ngf=3, input_nc=1, norm="batch"),
        GeneratorSpec("unet_256", ngf=1, norm="batch"),  # a pix2pix teacher
        GeneratorSpec("unet_128", ngf=2, input_nc=4),
        GeneratorSpec("resnet_9blocks", ngf=4, antialias="both"),  # a CUT teacher
    ],
    ids=str,
)
def test_generators_in_files_of_old_torch(tmp_path, spec, suffix):
    """Saved with two wrappers' prefixes and the unused statistics of instance norms."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net = make(spec)
    state = {f"module._orig_mod.{key}": value for key, value in with_old_statistics(net).items()}
    path = tmp_path / f"latest_net_G_A{suffix}"
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(state, path)
    back = load_generator(path)
    assert_same(back.state_dict(), net.state_dict())
    assert repr(back) == repr(net)  # the same layers, dropout and norms among them


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "net.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises(ImportError, match=r"net\.safetensors .*pip install safetensors, or give the weights as \.pth"):
        load_weights(tmp_path / "net.safetensors")


# Wrappers, nesting, and files of old torch


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod."]
)
@pytest.mark.parametrize("nested", [False, True])
def test_prefixes_are_stripped(tmp_path, prefix, nested):
    net = make()
    state = OrderedDict((prefix + key, value) for key, value in net.state_dict().items())
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "net.pth")
    assert_same(load_weights(tmp_path / "net.pth"), net.state_dict())


def test_prefixes_of_compiled_parts_are_stripped(tmp_path):
    torch.save({"model._orig_mod.0.weight": torch.ones(1), "a.module.b": torch.ones(1)}, tmp_path / "net.pth")
    assert set(load_weights(tmp_path / "net.pth")) == {"model.0.weight", "a.module.b"}


def test_wrapped_networks_are_saved_without_prefix(tmp_path):
    net = make()
    for wrapped in (nn.DataParallel(net), torch.compile(net), nn.DataParallel(torch.compile(net))):
        assert next(iter(wrapped.state_dict())) != "model.1.weight"
        save_weights(wrapped, tmp_path / "net.pth")
        assert_same(torch.load(tmp_path / "net.pth", weights_only=True), net.state_dict())


def test_keys_that_differ_only_in_their_prefix_are_rejected(tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "net.pth")
    assert "differ only in a wrapper's prefix" in refusal(tmp_path / "net.pth")


@pytest.mark.parametrize("spec", [SMALL, GeneratorSpec("unet_64", ngf=1)], ids=str)
def test_statistics_of_old_instance_norms_are_dropped(tmp_path, spec):
    net = make(spec)
    state = with_old_statistics(net)
    for name in [key.rpartition(".")[0] for key in state if key.endswith("running_mean")]:
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)
    assert len(state) > len(net.state_dict())
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert_same(load_weights(tmp_path / "net.pth"), net.state_dict())
    assert_same(load_generator(tmp_path / "net.pth").state_dict(), net.state_dict())


def test_batch_norms_without_num_batches_tracked(tmp_path):
    net = make(replace(SMALL, norm="batch"))
    state = {key: v for key, v in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "net.pth")
    back = load_generator(tmp_path / "net.pth").state_dict()
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], state.get(key, torch.tensor(0))) for key in back)


# Files of other kinds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"epoch: 3\nlr: 0.0002\n", "is a text file ('epoch: 3"),
        ("größe = 1".encode(), "is a text file"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights: the download failed"),
        (b"<HTML><head>404", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "(264 bytes) is truncated, damaged, or not a file of weights"),
        (b"PK\x03\x04" + bytes(50), "is truncated: it ends after 54 bytes"),
    ],
)
def test_other_kinds_of_files(tmp_path, content, message):
    (tmp_path / "net.pth").write_bytes(content)
    assert message in refusal(tmp_path / "net.pth")


def test_zip_archive_of_other_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("photos/readme.txt", "hello")
    assert "not a file of weights" in refusal(tmp_path / "net.pth")


@errors_of_the_system
def test_files_that_the_system_does_not_read(tmp_path, monkeypatch, error, reason):
    """Another copy of the file would not help."""
    save_weights(make(), tmp_path / "net.pth")
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    assert refusal(tmp_path / "net.pth").endswith(f"net.pth cannot be read: {reason}")


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    save_weights(make(), tmp_path / "net.pth")
    monkeypatch.setattr("builtins.open", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    assert refusal(tmp_path / "net.pth").endswith("net.pth cannot be read: Input/output error")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path, zipped, share):
    torch.save(make().state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "net.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
    message = refusal(tmp_path / "cut.pth")
    assert "is truncated: it ends after" in message if zipped else "is truncated, damaged" in message
    assert "again" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected tensors by name"),
        (torch.ones(1), "holds a Tensor, expected tensors by name"),
        ({}, "holds an empty dict, expected tensors by name"),
        ({"state_dict": {}}, "holds an empty dict"),
        ({"netG": {"a": torch.ones(1)}, "epoch": 3}, "with more than tensors by name ('netG': dict, 'epoch': int)"),
        ({"G": {"a": torch.ones(1)}}, "save one of its parts: torch.save(torch.load(path)['G'], new_path)"),
        ({"opt": {"lr": 1.0}, "ema": {"a": torch.ones(1)}}, "torch.save(torch.load(path)['ema'], new_path)"),
        ({"a": torch.ones(1), "lr": 0.1}, "with more than tensors by name ('lr': float)"),
        ({0: torch.ones(1)}, "with more than tensors by name (0: Tensor)"),
        ({str(i): i for i in range(9)}, "'4': int and 4 more)"),
    ],
)
def test_files_with_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth")


# Files that would execute code


class Payload:
    """Unpickled, it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PICKLERS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    **{
        f"pickle{n}": lambda content, path, n=n: Path(path).write_bytes(pickle.dumps(content, protocol=n))
        for n in range(6)
    },
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("write", PICKLERS.values(), ids=PICKLERS)
def test_no_code_is_executed(tmp_path, write, nested):
    trap = tmp_path / "code_ran"
    write({"state_dict": {"model.1.weight": Payload(trap)}} if nested else Payload(trap), tmp_path / "net.pth")
    for function in (load_weights, load_generator):
        message = refusal(tmp_path / "net.pth", function)
        assert not trap.exists()
        assert "torch.save(net.state_dict(), path)" in message


@pytest.mark.filterwarnings("ignore:.*weights_only")
@pytest.mark.parametrize("write", PICKLERS.values(), ids=PICKLERS)
def test_the_payloads_work_with_an_unsafe_loader(tmp_path, write):
    trap = tmp_path / "code_ran"
    write(Payload(trap), tmp_path / "net.pth")
    if zipfile.is_zipfile(tmp_path / "net.pth") or write is PICKLERS["legacy"]:
        torch.load(tmp_path / "net.pth", weights_only=False)
    else:
        pickle.loads((tmp_path / "net.pth").read_bytes())
    assert trap.is_dir()


def test_message_names_the_code(tmp_path):
    torch.save({"a": Payload(tmp_path / "code_ran")}, tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth")
    assert f"would execute code ({os.mkdir.__module__}.mkdir). Nothing was executed or loaded" in message


def test_whole_network_is_rejected(tmp_path):
    torch.save(make(), tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth")
    assert "would execute code (srpkd.models.networks.ResnetGenerator)" in message
    assert "torch.save(net.state_dict(), path)" in message


def test_other_pickles_are_rejected(tmp_path):
    (tmp_path / "net.pth").write_bytes(pickle.dumps({"a": 1.0}))
    assert "is a Python pickle that torch.save did not write" in refusal(tmp_path / "net.pth")


# Missing files


def test_missing_file_lists_similar_names(tmp_path):
    for name in ("latest_net_G.pth", "latest_net_D.pth", "loss_log.txt"):
        (tmp_path / name).touch()
    message = refusal(tmp_path / "lastest_net_G.pth")
    assert "does not exist" in message and "weights: latest_net_G.pth, latest_net_D.pth" in message
    assert "loss_log.txt" not in message


def test_missing_file_lists_weights(tmp_path):
    for name in ("10_net_G.pth", "x.safetensors", "notes.md"):
        (tmp_path / name).touch()
    assert refusal(tmp_path / "teacher").endswith(
        "has no teacher; similar names or weights: 10_net_G.pth, x.safetensors"
    )


def test_missing_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    message = refusal(tmp_path / "checkpoint" / "h2z" / "net.pth")
    assert message.endswith(f"{tmp_path} has no checkpoint; similar names or weights: checkpoints")
    assert refusal(tmp_path / "checkpoints" / "net.pth").endswith("has no net.pth; similar names or weights: none")


def test_missing_file_by_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_G.pth").touch()
    assert refusal("net_GG.pth").endswith(f": {tmp_path} has no net_GG.pth; similar names or weights: net_G.pth")


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "latest_net_G.pth").touch()
    (tmp_path / "log.txt").touch()
    assert refusal(tmp_path).endswith("is a folder: give a file of weights. This folder has: latest_net_G.pth")


# Weights of another network


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ngf": 4}, "ngf is 2 in the file, expected 4: use --ngf 2"),
        ({"netG": "resnet_9blocks"}, "expected 'resnet_9blocks': use --netG resnet_2blocks"),
        ({"netG": "unet_16"}, "use --netG resnet_2blocks"),
        ({"input_nc": 1, "output_nc": 6}, "use --input_nc 3 --output_nc 3"),
        ({"norm": "batch"}, "use --norm instance"),
        ({"antialias": "both"}, "antialias is 'none' in the file, expected 'both': use --antialias none"),
        ({"dropout": True}, "dropout is False in the file, expected True"),
    ],
)
def test_other_architecture_than_the_spec(tmp_path, wanted, message):
    save_weights(make(), tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth", load_generator, replace(SMALL, **wanted))


def test_discriminator_instead_of_a_generator(tmp_path):
    save_weights(define_discriminator(ndf=1), tmp_path / "latest_net_D.pth")
    assert "these look like a discriminator's" in refusal(tmp_path / "latest_net_D.pth", load_generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.11.conv_block.1.bias"), "missing: model.11.conv_block.1.bias."),
        (lambda s: s.update({"extra.weight": torch.ones(2, 2)}), "unknown: extra.weight."),
        (lambda s: s.update({"model.4.bias": torch.ones(9)}), "wrong shape: model.4.bias (9,), expected (4,)"),
        (lambda s: s.update({"model.2.weight": torch.ones(2)}), "unknown: "),  # an instance norm with weights
        (lambda s: s.pop("model.19.weight"), "incomplete: the convolution model.19.weight is missing"),
    ],
)
def test_incomplete_generators(tmp_path, change, message):
    state = make().state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth", load_generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.7.filt"), "resnet_2blocks of ngf 2, antialias both, but missing: model.7.filt."),
        (lambda s: [s.pop(key) for key in list(s) if key.endswith(".filt")], "missing: model.11.filt, model.14.filt, "),
        (
            lambda s: s.update({"model.18.filt": torch.ones(4, 1, 3, 3)}),
            "wrong shape: model.18.filt (4, 1, 3, 3), expected (4, 1, 4, 4)",
        ),
    ],
)
def test_incomplete_anti_aliased_generators(tmp_path, change, message):
    state = make(replace(SMALL, antialias="both")).state_dict()
    change(state)
    torch.save(state, tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth", load_generator)


def test_unet_with_too_few_levels(tmp_path):
    # two levels, like a unet_4
    keys = ("model.model.0", "model.model.1.model.1", "model.model.1.model.3", "model.model.3")
    torch.save({f"{key}.weight": torch.ones(2, 2, 4, 4) for key in keys}, tmp_path / "net.pth")
    assert "netG='unet_4' is unknown" in refusal(tmp_path / "net.pth", load_generator)
