"""Every public function, fed with what is wrong: an error that says what was received, what was expected, what to do.

The options and features that ``relation_loss`` refuses are in test_relation_loss.py; what is wrong with whole data sets
in test_data.py, and with files of weights in test_checkpoint.py. The commands are in test_wrong_commands.py.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from torch import nn
from wrong_files import full_disk, make_files, refusing, tree

import srpkd.data
from bench.readme import update_readme
from srpkd import RelationDistiller, SRPLoss, distill, relation_loss
from srpkd.data.folders import DataError, Images, open_dataset
from srpkd.data.synthetic import generate_scenes, open_synthetic, write_synthetic
from srpkd.data.validate import validate_dataset
from srpkd.distiller import FeatureTap
from srpkd.evaluate import find_images
from srpkd.export import export
from srpkd.files import WriteError
from srpkd.metrics.fidelity import fidelity
from srpkd.metrics.pixels import similarity
from srpkd.metrics.segmentation import read_palette
from srpkd.models.checkpoints import CheckpointError, load_generator, load_weights, save_weights
from srpkd.models.complexity import count_macs
from srpkd.models.exporters import to_onnx, to_pt2
from srpkd.models.inference import translate
from srpkd.models.latency import profile_network
from srpkd.models.networks import define_discriminator, define_generator, init_weights
from srpkd.reporting.page import overview, write_report
from srpkd.reporting.pictures import save_image
from srpkd.translate import translate_folder

IMAGES = torch.ones(2, 3, 8, 8)
LAYERS = {"0": "0"}
NET = define_generator("resnet_1blocks", ngf=1)


def pair() -> tuple[nn.Module, nn.Module]:
    """(teacher, student)"""
    return tuple(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)) for _ in range(2))


class Pair(nn.Module):
    """A network that gives two images."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        self.encoder(images)
        return images, images


def run(data=(IMAGES,), layers=LAYERS, teacher=None, student=None, **options):
    """``distill`` of a sound pair of networks, but for what is given."""
    nets = pair()
    return distill(teacher or nets[0], student or nets[1], data, layers, progress=False, **options)


def distiller(layers=LAYERS, loss=None, weights=None):
    return RelationDistiller(*pair(), layers, loss, weights)


# name: (what is called, the error, what its message says). Files are those of wrong_files.py, in the working directory.
WRONG = {
    # --- the loss ---
    "delta is a text": (lambda: SRPLoss(delta="1"), TypeError, "delta='1': expected a number above 0, received str"),
    "delta is a tensor": (
        lambda: SRPLoss(delta=torch.ones(2)),
        TypeError,
        "expected a number above 0, received Tensor",
    ),
    "delta is a bool": (lambda: SRPLoss(delta=True), TypeError, "delta=True: expected a number"),
    "eps is nothing": (lambda: SRPLoss(eps=None), TypeError, "eps=None: expected a number of at least 0"),
    "normalize is a list": (lambda: SRPLoss(["row"]), ValueError, r"normalize=\['row'\] is not one of .* mean 'row'"),
    "normalize is an array": (lambda: SRPLoss(np.array(["row", "none"])), ValueError, "is not one of 'row', 'cosine'"),
    "an option misspelt": (lambda: SRPLoss(normalise="row"), TypeError, "unexpected keyword argument 'normalise'"),
    "sparse features": (lambda: relation_loss(IMAGES.to_sparse(), IMAGES), TypeError, r"student .*by \.to_dense\(\)"),
    "packed features": (lambda: relation_loss(IMAGES, IMAGES.to_mkldnn()), TypeError, r"teacher .*by \.to_dense\(\)"),
    "ragged features": (
        lambda: relation_loss(torch.nested.nested_tensor([torch.ones(3, 8, 8)] * 2), IMAGES),
        TypeError,
        "sparse, nested or packed: expected a dense tensor",
    ),
    "features in a list": (lambda: SRPLoss()([IMAGES], IMAGES), TypeError, r"expected a tensor \(B, C, H, W\).* list"),
    "bool features": (lambda: SRPLoss()(IMAGES > 0, IMAGES), TypeError, "torch.bool; expected float64.*by .float"),
    "features of the module": (lambda: SRPLoss()(IMAGES, IMAGES[:1]), ValueError, "differ in the batch"),
    # --- the distiller and its taps ---
    "layers in a list": (
        lambda: distiller(["0"]),
        TypeError,
        r"layers=\['0'\]: expected {student module name: .* list",
    ),
    "layers is a name": (lambda: distiller("0"), TypeError, "layers='0': expected {student module name"),
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
        "a network gave a tuple; expected one image tensor",
    ),
    # --- networks ---
    "netG is a number": (lambda: define_generator(9), ValueError, "netG='9' is unknown: expected 'resnet_<n>blocks'"),
    "netG is nothing": (lambda: define_generator(None), ValueError, "netG='None' is unknown"),
    "a width that is no integer": (lambda: define_generator(ngf=1.5), TypeError, r"ngf=1\.5: expected an integer >= 1"),
    "a width that is a bool": (lambda: define_generator(ngf=True), TypeError, "ngf=True: expected an integer"),
    "channels as a text": (lambda: define_generator(input_nc="3"), TypeError, "input_nc='3': expected an integer"),
    "norm is a list": (lambda: define_generator(norm=["batch"]), ValueError, r"norm=\['batch'\] .* nearest is 'batch'"),
    "netD is a list": (lambda: define_discriminator(["pixel"]), ValueError, r"netD=\['pixel'\] .*nearest is 'pixel'"),
    "gain is a text": (lambda: init_weights(NET, init_gain="1"), TypeError, "init_gain='1': expected a number"),
    "gain below 0": (
        lambda: init_weights(NET, init_gain=-1),
        ValueError,
        "init_gain=-1: expected a finite number of at",
    ),
    # --- weights ---
    "weights from nowhere": (lambda: load_generator(None), TypeError, "expected str, bytes or os.PathLike object, not"),
    "another than the spec": (lambda: load_generator("net.pth", "resnet"), TypeError, "spec: expected a GeneratorSpec"),
    "code for weights": (lambda: load_generator("code.pth"), CheckpointError, "Nothing was run or loaded"),
    "a pickle for weights": (
        lambda: load_weights("pickle.pth"),
        CheckpointError,
        "was not loaded; save the weights alone",
    ),
    "a folder for weights": (
        lambda: load_weights("empty"),
        CheckpointError,
        "empty is a folder: give a file of weights",
    ),
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
    # --- data ---
    "a name that data lack": (lambda: srpkd.data.open_word, AttributeError, "has no attribute 'open_word'"),
    "no folder": (lambda: open_dataset("none", "aligned"), FileNotFoundError, "none/train: no such folder"),
    "a file for a folder": (lambda: open_dataset("file", "aligned"), FileNotFoundError, "file/train: no such folder"),
    "a number for a folder": (
        lambda: open_dataset(3, "aligned"),
        TypeError,
        "expected str, bytes or os.PathLike object",
    ),
    "a mode misspelt": (
        lambda: open_dataset("pairs", "alignd"),
        ValueError,
        r"received 'alignd' \(did you mean aligned\?",
    ),
    "a mode in a list": (lambda: open_dataset("pairs", ["aligned"]), ValueError, r"received \['aligned'\]"),
    "a size as a text": (
        lambda: open_dataset("pairs", "aligned", load_size="9"),
        TypeError,
        "load_size='9': expected an",
    ),
    "a crop of nothing": (
        lambda: open_dataset("pairs", "aligned", crop_size=0),
        ValueError,
        "crop_size=0: expected an",
    ),
    "less than one image": (
        lambda: open_dataset("pairs", "aligned", max_dataset_size=-1),
        ValueError,
        "_size=-1: expected",
    ),
    "two channels": (
        lambda: open_dataset("pairs", "aligned", input_nc=2),
        ValueError,
        r"input_nc=2: expected 1 \(grey",
    ),
    "a bomb in a folder": (
        lambda: open_dataset("bombs", "unaligned", load_size=8, crop_size=8)[0],
        DataError,
        "bombs/trainA/00000.png: far too large .*decompression bomb.* scale it down first",
    ),
    "EPS, which a program would run": (
        lambda: open_dataset("eps", "single", load_size=8, crop_size=8)[0],
        DataError,
        "eps/00000.png: not an image, whatever its name says",
    ),
    "a bomb for the doctor": (lambda: validate_dataset("bombs", "unaligned"), DataError, r"00000.png \(far too large"),
    "EPS for the doctor": (lambda: validate_dataset("eps", "single"), DataError, r"00000.png \(not an image"),
    "a size as a text for the doctor": (
        lambda: validate_dataset("pairs", "aligned", load_size="9"),
        DataError,
        "--load_size must be a whole number of at least 1; received '9'",
    ),
    "a mode in a list for the doctor": (
        lambda: validate_dataset("pairs", ["aligned"]),
        DataError,
        r"received \['aligned'\]",
    ),
    "scenes as a text": (lambda: generate_scenes("3"), TypeError, "count='3': expected an integer, received str"),
    "half a pixel": (lambda: generate_scenes(1, 16.5), TypeError, "size=16.5: expected an integer"),
    "a seed too long": (
        lambda: generate_scenes(1, 16, 2**70),
        ValueError,
        f"seed={2**70}, .*integers of at most 40 bits",
    ),
    "no world": (lambda: open_synthetic("world"), TypeError, "world: expected a World, as by generate_world"),
    "a world without scenes": (
        lambda: write_synthetic("new", 0, 1, 16),
        ValueError,
        "count_train=0: expected an integer >= 1",
    ),
    "a world in a file": (
        lambda: write_synthetic("file", 1, 1, 16),
        WriteError,
        "cannot be written: Not a directory; a file",
    ),
    "a world over another": (
        lambda: write_synthetic("pairs", 1, 1, 16),
        FileExistsError,
        "pairs has train and test already",
    ),
    # --- images through a generator ---
    "one image": (
        lambda: translate(NET, IMAGES[0]),
        ValueError,
        r"shape \(3, 8, 8\): this generator takes \(B, 3, H, W\)",
    ),
    "grey images": (lambda: translate(NET, IMAGES[:, :1]), ValueError, r"\(2, 1, 8, 8\): this generator takes \(B, 3,"),
    "no pixels": (lambda: translate(NET, IMAGES[..., :0]), ValueError, r"\(2, 3, 8, 0\): this generator takes"),
    "bytes": (lambda: translate(NET, IMAGES.byte()), TypeError, r"torch.uint8: expected floats in \[-1, 1\], such as"),
    "an array": (
        lambda: translate(NET, IMAGES.numpy()),
        TypeError,
        r"images: expected a tensor \(B, 3, H, W\).* ndarray",
    ),
    "a network of others": (lambda: translate(nn.ReLU(), IMAGES), TypeError, "expected a generator made by define_gen"),
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
    "another format": (lambda: export("net.pth", kind="onx"), ValueError, "kind='onx' is not one of .*mean 'onnx'"),
    "no tolerance": (lambda: export("net.pth", tolerance=float("nan")), ValueError, "tolerance=nan: expected a finite"),
    "over the weights": (lambda: export("net.pth", "net.pth", force=True), ValueError, "net.pth holds the weights"),
    "into a folder": (lambda: export("net.pth", "empty", force=True), IsADirectoryError, "empty is a folder: --output"),
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
    "another grid": (lambda: count_macs(NET, transposed="in"), ValueError, "transposed='in' is unknown"),
    # --- scores ---
    "paths for images": (
        lambda: fidelity(["a.png"], {}),
        TypeError,
        r"generated: expected Images\(paths\), received list",
    ),
    "no real images": (lambda: fidelity(Images(["a.png"]), {}), ValueError, "real={}: expected {name: "),
    "real images by themselves": (
        lambda: fidelity(Images(["a.png"]), {"test": Images(["a.png"])}),
        ValueError,
        r"expected {name: \[Images\(paths\), ...\], ...}",
    ),
    "no score": (
        lambda: fidelity(Images(["a"]), {"test": [Images(["a"])]}, fid=False, kid=False),
        ValueError,
        "fid and kid are both False: nothing to compute",
    ),
    "a batch of no image": (
        lambda: fidelity(Images(["a"]), {"test": [Images(["a"])]}, batch_size=0),
        ValueError,
        "batch_size=0: expected an integer >= 1",
    ),
    "a bomb among sizes": (lambda: Images(["bomb/00000.png"]).one_size(), DataError, "bomb/00000.png: far too large"),
    "a bomb to score": (lambda: Images(["bomb/00000.png"])[0], DataError, "bomb/00000.png: far too large"),
    "too few pixels for SSIM": (lambda: similarity([(IMAGES[0], IMAGES[0])]), ValueError, "SSIM needs 11 x 11 pixels"),
    "images nowhere": (lambda: find_images("none/*.png"), ValueError, "no images there; expected a folder of images"),
    "a palette that is a folder": (
        lambda: read_palette("empty"),
        ValueError,
        "--palette empty: expected world, citysc",
    ),
    # --- the page ---
    "a page of a file": (
        lambda: write_report("file"),
        ValueError,
        "file is not the folder of a run: .*expected config",
    ),
    "a page of a number": (lambda: write_report(3), TypeError, "expected str, bytes or os.PathLike object, not int"),
    "a report of another kind": (
        lambda: write_report("results/broken"),
        ValueError,
        "report.json has an invalid structure",
    ),
    "a page that is a folder": (
        lambda: write_report("results/blocked"),
        WriteError,
        "index.html cannot be written: Is a",
    ),
    "an overview of bombs": (lambda: overview("results/bombs", "x.png"), DataError, "bomb/00000.png: far too large"),
    "a README without markers": (
        lambda: update_readme("results/plain", "README.md"),
        ValueError,
        "expected the markers",
    ),
    "a table before it is there": (
        lambda: update_readme("results/plain", "marked.md"),
        ValueError,
        "results/plain: report.json has no table yet: expected a run that has measured a network",
    ),
    "a picture of nothing": (
        lambda: save_image(torch.ones(2, 8, 8), "x.png"),
        ValueError,
        r"\(3, H, W\) .* got \(2, 8, 8",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(files, monkeypatch, call, error, message):
    monkeypatch.chdir(files)
    before = tree(files)
    with pytest.raises(error, match=f"(?s){message}"):
        call()
    assert tree(files) == before  # no file half-written, and none that code in another left


def test_devices_that_differ_are_named():
    with pytest.raises(ValueError, match="student is on cpu and teacher on meta: move them to one device"):
        SRPLoss()(IMAGES, IMAGES.to("meta"))


# --- reports that are not what a run writes ---------------------------------------------------------------------------


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
def test_a_report_of_another_shape_leaves_the_page_before(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    (tmp_path / "index.html").write_text("the page before")
    lines = [f'{{"stage": "teacher", "step": {step}, "loss": {step}}}\n' for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"report\.json has an invalid structure \(\w+Error: .*fix or remove it"
    ):
        write_report(tmp_path)
    assert tree(tmp_path) == before


def test_numbers_too_large_to_draw_are_left_out_and_said(tmp_path):
    lines = [f'{{"stage": "a", "step": {step}, "loss": {10**400 if step == 2 else step}}}\n' for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert "Invalid lines in metrics.jsonl: 1." in write_report(tmp_path).read_text()


# --- disks that take nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1000])
def test_weights_on_a_full_disk_leave_those_before(tmp_path, room):
    save_weights(NET, tmp_path / "net.pth")
    before = tree(tmp_path)
    with full_disk(room), pytest.raises(WriteError, match=r"net\.pth cannot be written: .*make room on that disk"):
        save_weights(define_generator("resnet_1blocks", ngf=1), tmp_path / "net.pth")
    with full_disk(room), pytest.raises(WriteError, match="make room"):
        save_weights(NET, tmp_path / "new" / "folders" / "net.pth")
    assert tree(tmp_path) == before
    load_generator(tmp_path / "net.pth")


def test_a_reason_without_advice_is_said_all_the_same(tmp_path, monkeypatch):

    monkeypatch.setattr("srpkd.models.checkpoints.open", refusing(errno.EIO), raising=False)
    with pytest.raises(WriteError, match="cannot be written: Input/output error; write elsewhere") as caught:
        save_weights(NET, tmp_path / "net.pth")
    assert caught.value.errno == errno.EIO and isinstance(caught.value.__cause__, OSError)


def test_what_fails_for_another_reason_stays_what_it_is(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        save_weights(NET, tmp_path / "net.pth")
    assert not list(tmp_path.iterdir())
