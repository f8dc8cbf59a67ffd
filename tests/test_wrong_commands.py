"""Invalid command lines: one message that says what to do, and no change on the disk.

The options of ``srpkd train`` are tested in training/test_config.py, datasets in data/test_validate.py, and files of
weights in models/test_checkpoints.py; here is how the commands report such errors.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from threading import Lock

import pytest
import torch
from torch import nn
from wrong_files import REFUSALS, full_disk, make_files, refusing, tree

from srpkd import cli, train
from srpkd.arguments import exit_on_error
from srpkd.models import inference
from srpkd.training.resume import load_state
from srpkd.training.run_dir import RunDir

TRAIN = (
    "srpkd train --model cycle_gan --dataroot unpaired --netG resnet_1blocks --ngf 1 --ndf 1 --netD pixel "
    "--load_size 16 --crop_size 16 --epoch_steps 3 --n_epochs 1 --n_epochs_decay 0 --num_threads 0 --device cpu "
    "--name new"
)
EVALUATE = "srpkd evaluate pairs/test pairs/test"
SCORE = f"{EVALUATE} --metrics psnr"
SEGMENT = f"{EVALUATE} --metrics segmentation"
FULL = "cannot be written: .*make room on that disk"

# command: (exit status, pattern of its message)
WRONG = {
    # --- weights ---
    "srpkd translate none.pth pairs out": (
        1,
        "none.pth does not exist: .* has no none.pth; similar names or weights: ",
    ),
    "srpkd translate text.pth pairs out": (
        1,
        r"is a text file \('these are.* expected weights; save only the weights",
    ),
    "srpkd translate empty.pth pairs out": (1, "is empty, expected weights: copy or download it again"),
    "srpkd translate cut.pth pairs out": (1, "is truncated: it ends after .* copy it again"),
    "srpkd translate code.pth pairs out": (1, "holds more than weights: .* Nothing was executed or loaded"),
    "srpkd translate pickle.pth pairs out": (1, "a Python pickle that torch.save did not write.* it was not loaded"),
    "srpkd translate folder.pth pairs out": (1, "is a folder: give a file of weights"),
    "srpkd translate file/net.pth pairs out": (1, "does not exist"),
    "srpkd translate cut.safetensors pairs out": (1, "is truncated, damaged, or not a file of weights"),
    "srpkd translate linear.pth pairs out": (1, "not the weights of a generator: expected the keys of a ResNet"),
    "srpkd translate discriminator.pth pairs out": (1, "look like a discriminator's: give the generator's"),
    "srpkd export code.pth": (1, "Nothing was executed or loaded"),
    "srpkd export linear.pth": (1, "not the weights of a generator"),
    "srpkd profile net.pth code.pth --modes": (1, "Nothing was executed or loaded"),
    "srpkd profile net.pth folder.pth --modes": (1, "is a folder"),
    "srpkd evaluate code.pth pairs/test --input pairs/test --metrics psnr": (1, "Nothing was executed or loaded"),
    f"{EVALUATE} --inception_weights code.pth": (1, "Nothing was executed or loaded"),
    f"{EVALUATE} --inception_weights net.pth": (1, "holds other weights than torch-fidelity's Inception: download"),
    f"{EVALUATE} --inception_weights empty": (1, "is a folder"),
    f"{TRAIN} --teacher code.pth": (1, "Nothing was executed or loaded"),
    f"{TRAIN} --teacher pickle.pth": (1, "was not loaded"),
    f"{TRAIN} --teacher linear.pth": (1, "not the weights of a generator"),
    f"{TRAIN} --teacher empty": (1, "empty/latest_net_G_A.pth does not exist"),
    f"{TRAIN} --teacher two.pth": (1, "maps 2 to 3 channels, the images have 3 and 3: set --input_nc"),
    "srpkd train --resume trapped": (1, r"state.pt is damaged .*no state to resume from, start a new run"),
    "srpkd train --resume stateless": (1, "has no state.pt to resume from"),
    "srpkd train --resume file": (2, "--resume file: expected the path of a run .*which contains stateless, trapped"),
    f"srpkd train --resume {'x' * 300}": (2, "File name too long"),
    "srpkd train --resume": (2, "--resume needs a value"),
    f"{SEGMENT} --labels pairs/test --segmenter code.pth": (1, "--segmenter code.pth: expected TorchScript"),
    f"{SEGMENT} --labels pairs/test --segmenter empty": (1, "--segmenter empty: no such file"),
    # --- images ---
    "srpkd translate net.pth none out": (1, "none is not a folder: give the folder of the images"),
    "srpkd translate net.pth file out": (1, "file is not a folder"),
    "srpkd translate net.pth empty out": (1, "empty has no images"),
    "srpkd translate two.pth pairs out": (1, "from 2 to 3 channels; image files have 1 or 3"),
    "srpkd evaluate none pairs/test --metrics psnr": (1, "none: no images found; expected a folder"),
    "srpkd evaluate pairs/test empty --metrics psnr": (1, "empty: no images found"),
    "srpkd evaluate text text --metrics psnr": (1, "text/00000.png: not an image; expected one of BMP"),
    "srpkd evaluate cut one --metrics ssim": (1, "cut/00000.png: damaged or truncated"),
    "srpkd evaluate bomb bomb --metrics psnr": (1, "bomb/00000.png: far too large .* scale the image down first"),
    "srpkd evaluate one bomb --metrics miou --palette synthetic": (1, "bomb/00000.png: far too large"),
    "srpkd evaluate eps eps --metrics psnr": (1, "eps/00000.png: not an image"),
    "srpkd evaluate net.pth pairs/test --input bomb --metrics psnr": (1, "^bomb/00000.png: far too large"),
    "srpkd evaluate net.pth pairs/test --input cut --metrics psnr": (1, "cannot be translated: cut/00000.png: damaged"),
    "srpkd evaluate one one --metrics segmentation --labels bomb --segmenter segmenter.pt": (1, "far too large"),
    "srpkd evaluate one one --metrics segmentation --labels bomb --segmenter segmenter.pt --palette synthetic": (
        1,
        "far too large",
    ),
    "srpkd export net.pth --int8 --calibration bomb": (1, r"1 of 1 images cannot be read: fix .*\s+1. bomb.0+.png: f"),
    "srpkd export net.pth --int8 --calibration text": (1, r"1 of 1 images cannot be read: fix .*\s+1. text.0+.png: n"),
    "srpkd export net.pth --int8 --calibration file": (1, "--calibration file: expected a folder of images"),
    f"{TRAIN} --dataroot bombs": (1, r"(?s)1\. bombs/trainA: 1 of 1 images cannot be read: 00000.png \(far too large"),
    f"{TRAIN} --dataroot texts": (1, r"1 of 1 images cannot be read: 00000.png \(not an image"),
    f"{TRAIN} --dataroot file": (1, "dataroot file is a file, expected a folder: if it is an archive, unpack it"),
    f"{TRAIN} --dataroot pairs": (1, "pairs has no trainA .*use --dataset_mode aligned"),
    # --- where to write ---
    "srpkd translate net.pth pairs file": (1, "file is a file: give a folder for the results"),
    "srpkd translate net.pth pairs file/deeper": (
        1,
        "cannot be written: Not a directory; a file exists where a folder",
    ),
    "srpkd translate net.pth pairs pairs/out": (1, "pairs/out is inside pairs: give a folder for the results outside"),
    "srpkd export net.pth --format pt2 --output file/net.pt2": (1, "file/net.pt2 cannot be written: .* a file exists"),
    "srpkd export net.pth --output empty --force": (1, "empty is a folder: --output takes the name of a file"),
    "srpkd export net.pth --output net.pth --force": (1, "net.pth is the file of the weights: give another --output"),
    f"{SCORE} --json file/x.json": (1, "file/x.json cannot be written: .* a file exists where a folder is needed"),
    f"{SCORE} --json net.pth": (2, "--json: 'net.pth': expected a file name that ends in .json"),
    "srpkd profile net.pth --size 16 --modes --json file/x.json": (1, "file/x.json cannot be written"),
    "srpkd profile net.pth --size 16 --modes --json net.pth": (2, "expected a file name that ends in .json"),
    f"{TRAIN} --runs_dir file": (1, "runs_dir file: this folder cannot be made: File exists"),
    f"{TRAIN} --runs_dir file/deeper": (1, "this folder cannot be made: Not a directory"),
    f"{TRAIN} --name {'x' * 300}": (1, "this folder cannot be made: File name too long"),
    f"{TRAIN} --name ../x": (2, r"name='../x': expected the name of a folder inside runs"),
    "python -m srpkd.report results/blocked": (1, r"index.html cannot be written: Is a directory; give the name"),
    "python -m srpkd.report results/plain --overview x.png": (1, "report.json names no pictures yet"),
    "python -m srpkd.report results/missing --overview x.png": (1, "images/none.png: No such file or directory"),
    "python -m srpkd.report results/bombs --overview x.png": (1, "bomb/00000.png: far too large"),
    "python -m srpkd.report results/broken": (1, "report.json has an invalid structure .*fix or remove it"),
    "python -m srpkd.report file": (1, "file is not the folder of a run: .*pass a folder that python -m srpkd.train"),
    "python -m srpkd.report none": (1, "found no such folder, expected config.yaml"),
    "python -m srpkd.report empty": (1, "found nothing in it"),
    "python -m srpkd.data.synthetic file --size 16 --train 1 --test 1": (1, "cannot be written: Not a directory"),
    "python -m srpkd.data.synthetic pairs --size 16": (
        1,
        "pairs already has train and test with files in them: use another",
    ),
    # --- options ---
    "srpkd trian": (2, "unknown command 'trian'; did you mean train?"),
    "srpkd xyz": (2, "unknown command 'xyz'; expected one of train, evaluate,"),
    "srpkd info now": (2, "unrecognized arguments: now"),
    "srpkd translate net.pth pairs out --device gpu": (2, r"device='gpu': expected cpu, cuda"),
    "srpkd translate net.pth pairs out --device cuda:99": (
        2,
        r"device='cuda:99': torch sees \d+ GPUs; or use --device cpu",
    ),
    "srpkd translate net.pth pairs out --device meta": (2, "device='meta' holds no data"),
    "srpkd translate net.pth pairs out --batch_size 0": (2, "--batch_size: '0': expected an integer >= 1"),
    "srpkd translate net.pth pairs out --sise 8": (2, "unrecognized arguments: --sise 8"),
    "srpkd profile net.pth --batch_size=--": (2, "argument --batch_size: expected a value, received '--'"),
    "srpkd check --out=--": (2, "argument --out: expected a value, received '--'"),
    "srpkd train --resume=--": (2, "--resume: expected a value, received '--'"),
    f"{SCORE} --device gpu": (2, "device='gpu': expected cpu, cuda"),
    f"{EVALUATE} --metrics lpips": (2, r"invalid choice: 'lpips' \(choose from '?fid"),
    f"{EVALUATE} --metrics miou --palette wrld": (
        1,
        "--palette wrld: expected synthetic, cityscapes, or a file of lines",
    ),
    f"{EVALUATE} --metrics miou --palette empty": (1, "--palette empty: expected synthetic, .*Is a directory"),
    f"{EVALUATE} --metrics miou --palette colours": (1, "line '1 2 x', expected 'R G B name' with numbers of 0 to 255"),
    f"{EVALUATE} --metrics segmentation": (1, "needs --segmenter, the file of a network, and --labels"),
    f"{EVALUATE} --metrics psnr --labels pairs": (1, "--labels has no effect on psnr: add segmentation to --metrics"),
    f"{EVALUATE} --metrics psnr --real_train pairs": (1, "--real_train has no effect on psnr: add fid or kid to --met"),
    f"{EVALUATE} --metrics psnr --direction BtoA": (1, "--direction BtoA is that of pairs side by side: add --aligned"),
    "srpkd export net.pth --format tflite": (2, "invalid choice: 'tflite'"),
    "srpkd export net.pth --tolerance nan": (2, "'nan': expected a finite number of at least 0"),
    "srpkd profile net.pth --device gpu": (2, "device='gpu': expected cpu, cuda"),
    "srpkd profile net.pth --seconds -1": (2, "'-1': expected a finite number of at least 0"),
    "srpkd profile net.pth --modes fast": (2, "invalid choice: 'fast'"),
    "srpkd profile net.pth --size 4": (1, "size=4: expected at least 8 pixels per side"),
    "srpkd profile unet.pth --size 40": (1, "size=40: unet.pth needs a multiple of 32"),
    f"{TRAIN} --device meta": (2, "device='meta' holds no data"),
    f"{TRAIN} --seed {10**30}": (2, f"seed={10**30}: expected a whole number of at most 40 bits"),
    f"{TRAIN} --init_gain -1": (2, "init_gain=-1.0: expected at least 0"),
    f"{TRAIN} --ngff 3": (2, "unknown option --ngff; did you mean --ngf?"),
    f"{TRAIN} --netG resnet": (1, "netG='resnet' is unknown: .*the nearest is 'resnet_9blocks'"),
    f"{TRAIN} --teacher_netG resnet_1blocks --layers '{{mdel.9: model.9}}'": (
        1,
        "no module named 'mdel.9'; the nearest",
    ),
    f"{TRAIN} --teacher_netG resnet_1blocks --backend blockd": (1, "'blockd' is not one of .* did you mean 'blocked'?"),
    f"{TRAIN} --preset horse": (2, "unknown preset 'horse'; did you mean horse2zebra"),
    f"{TRAIN} --config none.yaml": (2, "--config none.yaml: cannot be read: No such file or directory"),
    f"{TRAIN} --config empty": (2, "--config empty: cannot be read: Is a directory"),
    f"{TRAIN} --config net.pth": (2, "--config net.pth: is not YAML"),
    f"{TRAIN} --config list.yaml": (2, "expected options as `name: value` lines, received list"),
    f"{TRAIN} --config cut.yaml": (2, "(?s)--config cut.yaml: is not YAML: .*line 2"),
    f"{TRAIN} --config deep.yaml": (2, "--config deep.yaml: is not YAML: .*recursion"),
    f"{TRAIN} --config code.yaml": (2, "--config code.yaml: is not YAML: could not determine a constructor"),
    f"{TRAIN} --config unknown.yaml": (
        2,
        "--config unknown.yaml: unknown option 'n_epoch'; did you mean n_epochs?",
    ),
    "python -m srpkd.data.synthetic new --size 8 --train 1 --test 1": (
        1,
        "size=8: expected an integer >= 16",
    ),
    "python -m srpkd.data.synthetic new --train 0": (2, "--train: '0': expected an integer >= 1"),
    "python -m srpkd.data.synthetic new --train ²": (2, "--train: '²': expected an integer >= 1"),
    "python -m srpkd.data.synthetic new --layout pairs": (2, "invalid choice: 'pairs'"),
    f"python -m srpkd.data.synthetic new --size 16 --train 1 --test 1 --seed {10**30}": (
        1,
        "expected integers of at most 40",
    ),
    "python -m bench": (2, "the following arguments are required: COMMAND"),
    "python -m bench relatio": (2, "invalid choice: 'relatio'"),
    "python -m bench relation --pixels 0 --out new.csv": (2, "argument --pixels: '0': expected an integer >= 1"),
    "python -m bench relation --budget nan --out new.csv": (2, "argument --budget: 'nan': expected a finite number"),
    "python -m bench accuracy --pixels -3 --out new.csv": (2, "argument --pixels: '-3': expected an integer >= 1"),
    "python -m bench columns --draws 0 --out new.csv": (2, "argument --draws: '0': expected an integer >= 1"),
    "python -m bench ablation --batch 0": (2, "argument --batch: '0': expected an integer >= 1"),
    "python -m bench train --peer --loader": (2, "argument --loader: not allowed with argument --peer"),
    "python -m bench photographs --size 257 --runs_dir new": (1, "--size: received 257, expected at most 256"),
    "python -m bench relation --device gpu --out new.csv": (1, "--device gpu: expected cpu, or cuda"),
    "python -m bench table --csv none.csv": (1, "run python -m bench relation first"),
    "python -m bench table --csv table.csv": (2, "table.csv: expected a file of results, the columns mode, .* missing"),
    "python -m bench plot --csv net.pth": (2, "net.pth cannot be read as CSV"),
    "python -m bench plot --csv none.csv": (1, "run python -m bench relation first"),
    "python -m bench scaling --csv none.csv": (1, "run python -m bench relation first"),
    "python -m bench breakdown --device cpu": (1, "the breakdown measures kernels on a GPU"),
    "python -m bench profile --device cpu --out new": (1, "the profile measures kernels on a GPU"),
    "python -m bench scaling --csv empty": (2, "Is a directory: 'empty'"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = make_files(tmp_path_factory.mktemp("files"))
    torch.jit.script(nn.Conv2d(3, 6, 1)).save(root / "segmenter.pt")
    return root


@pytest.fixture
def command(files, monkeypatch, capsys):
    """Run a command line in the folder of the files and return (exit status, stderr)."""
    monkeypatch.chdir(files)

    def run(line: str) -> tuple[int, str]:
        words = shlex.split(line)
        main = cli.main if words[0] == "srpkd" else None
        if main is None:
            main, words = import_module({"bench": "bench.__main__"}.get(words[2], words[2])).main, words[2:]
        capsys.readouterr()
        try:
            main(words[1:])
            code = 0
        except SystemExit as stopped:  # other exceptions are tracebacks, and fail the test
            code = stopped.code or 0
        message = capsys.readouterr().err
        return (1, f"{message}{code}\n") if isinstance(code, str) else (code, message)

    return run


@pytest.mark.parametrize(("line", "status", "message"), [(line, *what) for line, what in WRONG.items()], ids=WRONG)
def test_invalid_command_fails_and_changes_nothing(command, files, line, status, message):
    before = tree(files)
    found, errors = command(line)
    assert found == status, errors
    assert len(re.findall(r"^(?:\S+ ?\S* ?\S* ?\S*: )?error: ", errors, re.MULTILINE)) == 1, errors
    assert re.search(message, errors.partition("error: ")[2]), errors
    assert tree(files) == before


@pytest.mark.slow
@pytest.mark.parametrize("line", ["python -m srpkd.translate code.pth pairs out", "srpkd trian"])
def test_process_exits_with_the_message(files, line):
    words = shlex.split(line.replace("srpkd", "python -m srpkd", 1) if line.startswith("srpkd") else line)
    done = subprocess.run([sys.executable, *words[1:]], cwd=files, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_reported(error, text):
    advice = "The memory does not suffice: free memory, or use smaller images or batches"
    with pytest.raises(SystemExit, match=f"^error: {text}\n{advice}$"), exit_on_error():
        raise error


# --- unreadable images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "why"),
    [("text", "not an image"), ("cut", "damaged or truncated"), ("bomb", "far too large"), ("eps", "not an image")],
)
def test_unreadable_images_are_skipped(command, files, tmp_path, kind, why):
    status, errors = command(f"srpkd translate net.pth {kind} {tmp_path}/out")
    assert status == 1 and f"skipped {kind}/00000.png: {why}" in errors
    assert not (tmp_path / "out").exists()


# --- full and read-only disks -----------------------------------------------------------------------------------------

# a command that writes into "out": a size in bytes that its files exceed
WRITERS = {
    "srpkd translate net.pth pairs out/translated": 500,
    "srpkd export net.pth --format pt2 --output out/net.pt2": 5000,
    f"{SCORE} --json out/scores.json": 50,
    "srpkd profile net.pth --size 16 --modes --json out/costs.json": 100,
    "python -m srpkd.report results/plain": 500,
    "python -m srpkd.report results/curves --overview out/x.png": 500,
    "python -m srpkd.data.synthetic out --size 16 --train 1 --test 1": 300,
    f"{TRAIN} --runs_dir out": 300,
}


@pytest.fixture
def curves(files):
    """Add a run with a loss curve."""
    (files / "results/curves").mkdir(exist_ok=True)
    lines = [f'{{"stage": "teacher", "step": {step}, "loss": {step}}}\n' for step in (1, 2)]
    (files / "results/curves/metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(("line", "room"), WRITERS.items(), ids=WRITERS)
def test_full_disk(command, files, curves, line, room):
    (files / "out").mkdir(exist_ok=True)
    before = tree(files)
    with full_disk(room):
        status, errors = command(line)
    assert status in (1, 2) and re.search(FULL, errors), errors
    assert tree(files) == before


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.core(6)
def test_folder_that_is_not_writable(command, files, curves, monkeypatch, line, number):
    (files / "out").mkdir(exist_ok=True)
    before = tree(files)
    monkeypatch.setattr("srpkd.files.open", refusing(number), raising=False)
    status, errors = command(line)
    assert status in (1, 2) and f"cannot be written: {os.strerror(number)}; " in errors, errors
    assert REFUSALS[number] in errors
    assert tree(files) == before


def test_results_are_printed_before_they_are_written(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit, match=r"file/x\.json cannot be written"):
        cli.main(shlex.split(f"{SCORE} --json file/x.json")[1:])
    assert "PSNR" in capsys.readouterr().out


@pytest.mark.parametrize("on_cpu", [True, False])
def test_translated_images_are_kept_when_the_disk_is_full(command, files, tmp_path, monkeypatch, on_cpu):
    monkeypatch.setattr(inference, "_on_cpu", lambda _: on_cpu)
    save, one_at_a_time = inference.write_file, Lock()  # the limit is one of the process

    def at_most_one(path, *others):
        with one_at_a_time, full_disk(10**6 if path.match("testA/00000.png") else 500):
            return save(path, *others)

    monkeypatch.setattr(inference, "write_file", at_most_one)
    status, errors = command(f"srpkd translate net.pth unpaired {tmp_path}/out")
    assert status == 1 and re.search(rf"{FULL}.*\. 1 of 6 images are written", errors), errors
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["00000.png"]


def test_training_on_a_full_disk_can_be_resumed(tmp_path, monkeypatch, capsys):
    keep, kept = RunDir.save_resume_state, []

    def at_most_two(self, state):
        with full_disk(10**6 if len(kept) < 2 else 1000):
            keep(self, state)
        kept.append(state["training"] and state["training"][1]["step"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunDir, "save_resume_state", at_most_two)
    monkeypatch.setattr("srpkd.training.run_dir.write_report", lambda folder, _: folder / "index.html")
    line = TRAIN.replace(
        "--dataroot unpaired", "--dataroot :synthetic: --synthetic_size 16 --synthetic_pairs 4 --synthetic_test_pairs 1"
    )
    with pytest.raises(
        SystemExit, match=r"error: runs/new/\S+ cannot be written: File too large; make room on that disk"
    ):
        train.main([*shlex.split(line)[2:], "--save_latest_freq=1"])
    assert kept == [None, 1]
    assert "resume with: python -m srpkd.train --resume runs/new" in capsys.readouterr().out
    assert load_state(tmp_path / "runs/new")["training"][1]["step"] == 1
    assert not list(tmp_path.rglob(".*.tmp"))
    monkeypatch.setattr(RunDir, "save_resume_state", keep)
    train.main(["--resume=new"])
    assert "report: runs/new" in capsys.readouterr().out


def test_real_full_disk(command, files, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "mine").write_text("before")
        status, errors = command(f"srpkd export net.pth --format pt2 --output {disk}/new/net.pt2")
        assert status == 1 and "cannot be written: No space left on device; make room on that disk" in errors
        assert tree(disk) == {"mine": b"before"}
    finally:
        subprocess.run(["umount", disk], check=True)
