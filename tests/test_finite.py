"""Weights and outputs that are not finite are an error in every command, and nothing is written."""

from __future__ import annotations

import math

import pytest
import torch
from sample_images import noise, save_all

from srpkd import evaluate, export, profile, train, translate
from srpkd.finite import NonFiniteError, check_finite, describe_nonfinite
from srpkd.models.checkpoints import save_weights
from srpkd.models.networks import define_generator

COMMANDS = {
    "translate": (translate, ["photos", "out", "--device=cpu"]),
    "evaluate": (evaluate, ["photos", "--input=photos", "--metrics=psnr", "--device=cpu"]),
    "export": (export, ["--format=pt2"]),
    "profile": (profile, ["--modes", "eager", "--size=16", "--device=cpu"]),
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], ""),
        ([], ""),
        ([math.nan, 2.0], "1 of 2 values are nan"),
        ([math.inf, -math.inf, 1.0], "2 of 3 values are infinite"),
        ([math.inf, math.nan], "2 of 2 values are nan or infinite"),
    ],
)
def test_descriptions(values, expected):
    for dtype in (torch.float32, torch.float16, torch.complex64):
        assert describe_nonfinite(torch.tensor(values, dtype=dtype)) == expected
    assert describe_nonfinite(torch.ones(3, dtype=torch.int64)) == ""


def test_message():
    check_finite(torch.ones(2), "the output", "nothing")
    with pytest.raises(NonFiniteError, match=r"^the output is not finite \(1 of 1 values are nan\): use another file$"):
        check_finite(torch.tensor([math.nan]), "the output", "use another file")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all(tmp_path / "photos", noise(2, (16, 16, 3)))
    return tmp_path


def save(path, value):
    net = define_generator("resnet_1blocks", ngf=2, norm="batch")
    with torch.no_grad():
        net.model[1].weight.view(-1)[0 if math.isnan(value) else slice(None)] = value
    save_weights(net, path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"net\.pth: the tensor model\.1\.weight is not finite \(1 of 294 values are nan\)"),
        (3e38, r"output for .* is not finite \(.* values are nan"),  # finite weights
    ],
    ids=["weights", "output"],
)
def test_commands(folder, command, value, message):
    module, arguments = COMMANDS[command]
    save(folder / "net.pth", value)
    with pytest.raises(SystemExit, match=message):
        module.main(["net.pth", *arguments])
    assert sorted(path.name for path in folder.iterdir()) == ["net.pth", "photos"]


def test_teacher(folder):
    save(folder / "latest_net_G.pth", math.nan)
    arguments = ["--dataroot=:synthetic:", "--model=pix2pix", "--netG=resnet_1blocks", "--ngf=2", "--device=cpu"]
    with pytest.raises(SystemExit, match=r"latest_net_G\.pth: the tensor model\.1\.weight is not finite"):
        train.main([*arguments, "--teacher=latest_net_G.pth"])
    assert not (folder / "runs").exists()
    save(folder / "latest_net_G.pth", 3e38)
    arguments += ["--synthetic_size=32", "--synthetic_pairs=2", "--synthetic_test_pairs=1", "--netD=pixel"]
    with pytest.raises(SystemExit, match="teacher: the output of G for a test image is not finite"):
        train.main([*arguments, "--teacher=latest_net_G.pth"])
