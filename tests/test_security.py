"""Security: no code in a file is executed, and no command connects to the network."""

from __future__ import annotations

import ast
import shlex
import socket
import struct
from pathlib import Path

import pytest
import torch
from wrong_files import Trap, make_files

import srpkd
from srpkd import cli
from srpkd.kernels import native
from srpkd.models.checkpoints import CheckpointError, load_weights
from srpkd.training.resume import NEWEST, load_state, save_state

ROOTS = (Path(srpkd.__file__).parent, Path(native.__file__).parent)
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for root in ROOTS for path in sorted(root.rglob("*.py"))}

# functions that execute their argument, or may execute code in what they read
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "urllib.request.urlopen",
    "requests.get", "subprocess.getoutput", "subprocess.getstatusoutput", "joblib.load",
}  # fmt: skip
# (file, call): programs, which are documented as such, and the only place that opens images
ALLOWED = {
    ("segmentation.py", "torch.export.load"),
    ("segmentation.py", "torch.jit.load"),
    ("exporters.py", "torch.export.load"),
    ("images.py", "Image.open"),
}


def calls() -> list[tuple[Path, str, ast.Call]]:
    """Return every call in the sources as (file, name of the function, node)."""
    return [
        (path, ast.unparse(node.func), node)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def test_all_sources_are_searched():
    names = {path.name for path in SOURCES}
    assert names >= {"checkpoints.py", "resume.py", "train.py", "images.py", "report.py", "build.py", "dispatch.py"}
    assert len(calls()) > 1000


def test_no_source_executes_what_it_reads():
    assert not [f"{path}:{call.lineno} {name}" for path, name, call in calls() if name in FORBIDDEN]
    shells = [f"{path}:{call.lineno}" for path, _, call in calls() if any(k.arg == "shell" for k in call.keywords)]
    assert not shells
    risky = {"torch.export.load", "torch.jit.load", "Image.open"}
    assert {(path.name, name) for path, name, _ in calls() if name in risky} == ALLOWED


def test_torch_load_is_called_with_weights_only():
    loads = [(path, call) for path, name, call in calls() if name == "torch.load"]
    assert {path.name for path, _ in loads} == {"checkpoints.py", "resume.py"}
    for path, call in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", f"{path}:{call.lineno}"


def test_yaml_is_read_by_the_safe_loader():
    names = {name for _, name, _ in calls() if name.startswith("yaml.")}
    assert names == {"yaml.safe_load", "yaml.safe_dump"}
    classes = (node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    bases = {ast.unparse(base) for node in classes for base in node.bases}
    assert {base for base in bases if base.startswith("yaml.")} == {"yaml.SafeLoader"}


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_payload_is_not_executed_under_any_name(tmp_path, monkeypatch, name, wrapped):
    """Also not in a file that is named .safetensors."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a.weight": Trap()}} if wrapped else Trap(), name)
    with pytest.raises(CheckpointError):
        load_weights(name)
    assert not (tmp_path / "sprung").exists()


def test_payload_in_a_resume_state_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 1, "training": Trap()}, NEWEST)
    with pytest.raises(CheckpointError, match="no state to resume from"):
        load_state(tmp_path)
    assert not (tmp_path / "sprung").exists()
    torch.load(NEWEST, weights_only=False)  # the payload works
    assert (tmp_path / "sprung").exists()


def test_resume_state_with_a_changed_byte_is_rejected(tmp_path):
    save_state(tmp_path, {"weights": torch.full((1000,), 7.0)})
    content = bytearray((tmp_path / NEWEST).read_bytes())
    content[content.index(struct.pack("4f", *[7.0] * 4)) + 9] ^= 1
    (tmp_path / NEWEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged \(the checksum of \S+ is wrong\)"):
        load_state(tmp_path)


COMMANDS = {
    "train": "--dataroot :synthetic: --synthetic_size 16 --synthetic_pairs 4 --synthetic_test_pairs 1 --model pix2pix "
    "--device cpu --netG resnet_1blocks --netD pixel --ngf 1 --ndf 1 --norm instance --teacher net.pth "
    "--epoch_steps 1 --n_epochs 1 --n_epochs_decay 0",
    "evaluate": "pairs/test pairs/test --metrics psnr ssim miou --palette synthetic --json scores.json",
    "translate": "net.pth pairs translated",
    "export": "net.pth --output net.onnx",
    "profile": "net.pth --size 16 --modes eager --seconds 0",
    "info": "",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_connects_to_the_network(tmp_path, monkeypatch, command):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    try:
        cli.main([command, *shlex.split(COMMANDS[command])])
    except SystemExit as stopped:
        assert stopped.code in (0, None)
