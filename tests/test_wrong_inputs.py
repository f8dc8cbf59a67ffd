"""Invalid arguments of every public function: the error says what was received, what is expected, and what to do.

Other invalid inputs are tested elsewhere: features and options of ``relation_loss`` in test_loss.py, datasets in
data/test_validate.py, files of weights in models/test_checkpoints.py, and command lines in test_wrong_commands.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wrong_files import assert_rejected, tree

from srpkd import RelationDistiller, SRPLoss, distill
from srpkd.models.networks import define_generator
from srpkd.reporting.page import write_report
from srpkd.taps import FeatureTap

IMAGES = torch.ones(2, 3, 8, 8)
LAYERS = {"0": "0"}
NET = define_generator("resnet_1blocks", ngf=1)


def pair() -> tuple[nn.Module, nn.Module]:
    """Return (teacher, student)."""
    return tuple(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)) for _ in range(2))


class Pair(nn.Module):
    """A network with two outputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        self.encoder(images)
        return images, images


def run(data=(IMAGES,), layers=LAYERS, teacher=None, student=None, **options):
    """Call ``distill`` with valid arguments, except those that are given."""
    nets = pair()
    return distill(teacher or nets[0], student or nets[1], data, layers, progress=False, **options)


def distiller(layers=LAYERS, loss=None, weights=None):
    return RelationDistiller(*pair(), layers, loss, weights)


# name: (call, error, pattern of its message). The working directory has the files of wrong_files.py.
WRONG = {
    # --- the distiller and its taps ---
    "layers in a list": (
        lambda: distiller(["0"]),
        TypeError,
        r"layers=\['0'\]: expected {student module name: .* list",
    ),
    "no layers": (lambda: distiller({}), ValueError, "layers is empty: expected {student"),
    "layers is nothing": (lambda: distiller(None), ValueError, "layers is empty: expected {student"),
    "a number for a layer": (lambda: distiller({0: "0"}), ValueError, "no module named 0; the nearest names are '0'"),
    "weights in a list": (
        lambda: distiller(weights=[1.0]),
        TypeError,
        "weights: expected {student module name: factor",
    ),
    "a weight is a text": (lambda: distiller(weights={"0": "1"}), TypeError, r"weights\['0'\]='1': expected a number"),
    "a weight is nan": (lambda: distiller(weights={"0": float("nan")}), ValueError, r"\['0'\]=nan: expected a finite"),
    "loss is a name": (lambda: distiller(loss="l1"), TypeError, r"loss: expected a module such as SRPLoss\(\)"),
    "loss is a class": (lambda: distiller(loss=SRPLoss), TypeError, "received the class SRPLoss"),
    "student is nothing": (
        lambda: RelationDistiller(None, pair()[0], LAYERS),
        TypeError,
        "student: .* torch.nn.Module",
    ),
    "teacher is a function": (lambda: RelationDistiller(pair()[1], abs, LAYERS), TypeError, "the teacher: expected a"),
    "a tap of a name": (
        lambda: FeatureTap(NET, "model.9"),
        TypeError,
        r"names='model.9': expected a list .*\['model.9'\]",
    ),
    "a tap of nothing": (lambda: FeatureTap(None, ["0"]), TypeError, "the network: expected a torch.nn.Module"),
    "a tap where there is none": (lambda: FeatureTap(nn.ReLU(), ["0"]), ValueError, "named '0'; it has no modules"),
    # --- distill ---
    "teacher is a file": (
        lambda: run(teacher="net.pth"),
        TypeError,
        "teacher: expected a torch.nn.Module, received str",
    ),
    "student is a file": (
        lambda: run(student="net.pth"),
        TypeError,
        "student: expected a torch.nn.Module, received str",
    ),
    "data is a tensor": (
        lambda: run(IMAGES),
        TypeError,
        r"data: expected batches.*\[images\] for a single one.* Tensor",
    ),
    "data is nothing": (lambda: run(None), TypeError, "data: expected batches, as in a DataLoader or a list"),
    "bytes for images": (lambda: run([IMAGES.byte()]), TypeError, "images of torch.uint8: expected floats, such as"),
    "epochs is a text": (lambda: run(epochs="2"), TypeError, "epochs='2': expected an integer >= 1, received str"),
    "no epochs": (lambda: run(epochs=0), ValueError, "epochs=0: expected an integer >= 1"),
    "lambda_kd below 0": (
        lambda: run(lambda_kd=-1),
        ValueError,
        "lambda_kd=-1: expected a finite number of at least 0",
    ),
    "lambda_srp is nan": (lambda: run(lambda_srp=float("nan")), ValueError, "lambda_srp=nan"),
    "lambda_target is a text": (lambda: run(lambda_target="a"), TypeError, "lambda_target='a': expected a number"),
    "lr beside an optimizer": (
        lambda: run(lr=1e-3, optimizer=torch.optim.Adam(NET.parameters())),
        ValueError,
        r"lr=0\.001 is that of the default optimizer: set it in optimizer",
    ),
    "lr is negative": (lambda: run(lr=-1.0), ValueError, r"lr=-1\.0: expected a finite number of at least 0"),
    "optimizer of another network": (
        lambda: run(optimizer=torch.optim.Adam(NET.parameters())),
        ValueError,
        r"optimizer has no parameter of the student .* create it from student\.parameters\(\)",
    ),
    "optimizer is a name": (lambda: run(optimizer="adam"), TypeError, r"optimizer: .* torch\.optim\.Adam\(student"),
    "a student without weights": (
        lambda: run(student=nn.Sequential(nn.ReLU())),
        ValueError,
        "no parameter of the student requires a gradient: nothing to train",
    ),
    "a frozen student": (
        lambda: run(student=pair()[1].requires_grad_(False)),
        ValueError,
        r"student\.requires_grad_\(\)",
    ),
    "a loss of each image": (
        lambda: run(loss=SRPLoss(reduction="none")),
        ValueError,
        r"shape \(2,\): expected one number, as reduction='mean'",
    ),
    "a network of two outputs": (
        lambda: run(layers={"encoder": "0"}, student=Pair()),
        TypeError,
        r"the student gave a tuple \(Tensor, Tensor\); expected one image tensor .*pass output=",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_invalid_input_raises_and_leaves_no_file(files, monkeypatch, call, error, message):
    monkeypatch.chdir(files)
    assert_rejected(files, call, error, message)


# --- invalid reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"table": "x"}',
        '{"table": {"columns": [{"label": "x"}], "rows": [{}]}}',
        '{"table": {"columns": [{"key": "x"}], "rows": [3]}}',
        '{"table": {"columns": [{"key": "x", "format": "zz"}], "rows": [{"x": 3}]}}',
        '{"samples": [3]}',
        '{"relations": [{"panels": [{"file": "x"}]}]}',
        '{"samples": [{"images": [{"label": "a", "file": 3}]}]}',
        '{"files": [{}]}',
        '{"files": "abc"}',
        '{"elapsed_seconds": "long"}',
        '{"elapsed_seconds": Infinity}',
        '{"environment": "here"}',
    ],
)
def test_invalid_report_keeps_the_previous_page(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    (tmp_path / "index.html").write_text("the page before")
    lines = [f'{{"stage": "teacher", "step": {step}, "loss": {step}}}\n' for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"report\.json has an invalid structure \(\w+Error: .*fix or remove it"):
        write_report(tmp_path)
    assert tree(tmp_path) == before


def test_numbers_that_cannot_be_drawn_are_reported(tmp_path):
    lines = [f'{{"stage": "a", "step": {step}, "loss": {10**400 if step == 2 else step}}}\n' for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert "Invalid lines in metrics.jsonl: 1." in write_report(tmp_path).read_text("utf-8")
