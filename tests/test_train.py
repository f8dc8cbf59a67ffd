import copy
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from srpkd import train
from srpkd.data.folders import DataError
from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import load_generator, load_weights, save_weights
from srpkd.models.complexity import count_macs, count_parameters
from srpkd.models.networks import define_discriminator, define_generator
from srpkd.training import datasets, loop, pipeline, plan, summary
from srpkd.training.config import parse_arguments
from srpkd.training.loop import Stage
from srpkd.training.options import TrainConfig
from srpkd.training.run_dir import RunDir, new_folder

SIZE = 16
# networks and schedules so small that a run takes a second or two
TINY = shlex.split(
    "--netG resnet_1blocks --ngf 2 --ndf 2 --netD n_layers --n_layers_D 1 --norm instance --no_dropout "
    "--epoch_steps 3 --n_epochs 1 --n_epochs_decay 1 --print_freq 1 --samples 1 --num_threads 0 --device cpu"
)
WORLD = [
    *shlex.split(f"--dataroot :synthetic: --synthetic_size {SIZE} --synthetic_pairs 8 --synthetic_test_pairs 3"),
    *TINY,
]
PIX2PIX = ["--model", "pix2pix", *WORLD]
CYCLE = ["--model=cycle_gan", "--load_size=18", f"--crop_size={SIZE}"]
TEACHER = ["--teacher_netG=resnet_2blocks", "--teacher_ngf=3"]
ARMS = "{alone: {lambda_kd: 0, lambda_srp: 0}, output: {lambda_srp: 0}, output + SRP: {}}"


class Run(NamedTuple):
    """What a run printed and left."""

    folder: Path
    output: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.report["table"]["rows"]}

    def logged(self, stage: str, name: str) -> list[float]:
        return [line[name] for line in self.metrics if line["stage"] == stage and name in line]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "srpkd.train", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def as_run(done: subprocess.CompletedProcess, cwd: Path) -> Run:
    assert done.returncode == 0, done.stderr
    [path] = re.findall(r"^report: (.*)/index\.html$", done.stdout, re.MULTILINE)
    return Run(cwd / path, done.stdout)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch) -> Callable[..., Run]:
    """A run in this process and in a folder of its own, without its page: to draw the curves takes longest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpkd.training.run_dir.write_report", lambda folder: folder / "index.html")

    def main(*arguments: str) -> Run:
        train.main(list(arguments))
        output = capsys.readouterr().out
        [path] = re.findall(r"^report: (.*)/index\.html$", output, re.MULTILINE)
        return Run(tmp_path / path, output)

    return main


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """The one message of a command line that must not lead to a run, nor leave anything."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            train.main(list(arguments))
        assert not (tmp_path / "runs").exists()
        assert str(caught.value).startswith("error: ")  # to stderr, with exit status 1
        return str(caught.value).removeprefix("error: ")

    return main


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Real image files, unpaired."""
    return write_synthetic(tmp_path_factory.mktemp("images") / "wheat2maize", 5, 2, 20, layout="unaligned")


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory) -> Run:
    cwd = tmp_path_factory.mktemp("pix2pix")
    return as_run(command(*PIX2PIX, *TEACHER, "--seeds=2", f"--variants={ARMS}", "--name=tiny", cwd=cwd), cwd)


@pytest.fixture(scope="module")
def cycle_gan(tmp_path_factory, folders) -> Run:
    cwd = tmp_path_factory.mktemp("cycle_gan")
    arguments = [*CYCLE, *TINY, *TEACHER, "--seeds=2", "--variants={a: {lambda_srp: 0}, b: {}}", "--num_threads=1"]
    return as_run(command("--dataroot", str(folders), *arguments, cwd=cwd), cwd)


# Whole runs


FULL = [
    ("pix2pix", ["teacher", "alone", "output", "output + SRP"], ["G"], ["D"]),
    ("cycle_gan", ["teacher", "a", "b"], ["G_A", "G_B"], ["D_A", "D_B"]),
]


def stages(names: list[str]) -> dict[str, str]:
    """stage -> folder of a run with two seeds."""
    students = [f"{name} seed {seed}" for seed in (0, 1) for name in names[1:]]
    return {"teacher": "teacher"} | {stage: stage.replace(" ", "-") for stage in students}


@pytest.mark.parametrize(("model", "names", "generators", "discriminators"), FULL, ids=["pix2pix", "cycle_gan"])
class TestWholeRun:
    @pytest.fixture
    def done(self, request, model) -> Run:
        return request.getfixturevalue(model)

    def test_what_is_there(self, done, model, names, generators, discriminators):
        assert done.folder.name == {"pix2pix": "tiny", "cycle_gan": "experiment"}[model]
        there = {path.name for path in done.folder.iterdir()}
        assert there == {"config.yaml", "metrics.jsonl", "report.json", "index.html", "images", *stages(names).values()}
        assert parse_arguments([f"--config={done.folder / 'config.yaml'}"]).model == model
        for folder in stages(names).values():
            assert {path.name for path in (done.folder / folder).iterdir()} == {
                f"latest_net_{network}.pth" for network in generators + discriminators
            }
        assert done.report["status"] == "finished"
        assert done.report["elapsed_seconds"] > 0
        assert not list(done.folder.rglob("*.tmp"))

    def test_metrics_of_every_stage_and_step(self, done, model, names, generators, discriminators):
        assert list(dict.fromkeys(line["stage"] for line in done.metrics)) == list(stages(names))
        losses = {
            "pix2pix": {"G_GAN", "G_L1", "D_fake", "D_real"},
            "cycle_gan": {"G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B", "D_A", "D_B"},
        }
        for stage in stages(names):
            lines = [line for line in done.metrics if line["stage"] == stage and "epoch" in line]
            assert [(line["step"], line["epoch"]) for line in lines] == list(enumerate([1, 1, 1, 2, 2, 2], 1))
            assert all(losses[model] <= line.keys() for line in lines)
        assert [line["seconds"] for line in done.metrics] == sorted(line["seconds"] for line in done.metrics)

    def test_checkpoints_are_the_generators_of_the_table(self, done, model, names, generators, discriminators):
        for stage, folder in stages(names).items():
            row = done.rows[re.sub(" seed .*", "", stage)]
            for name in generators:
                net = load_generator(done.folder / folder / f"latest_net_{name}.pth")
                assert count_parameters(net) == row["parameters"]
                assert count_macs(net, (1, 3, SIZE, SIZE)) == row["macs"]
        listed = [entry["file"] for entry in done.report["files"]]
        assert listed == [f"{folder}/latest_net_{name}.pth" for folder in stages(names).values() for name in generators]

    def test_the_table_is_what_was_measured(self, done, model, names, generators, discriminators):
        assert list(done.rows) == names
        metrics = {
            "pix2pix": ["mIoU", "accuracy", "teacher_psnr"],
            "cycle_gan": ["teacher_psnr A to B", "teacher_psnr B to A"],
        }[model]
        columns = [column["key"] for column in done.report["table"]["columns"]]
        assert columns == ["name", "parameters", "macs", *metrics, "seconds_per_step"]
        for name, row in done.rows.items():
            for metric in metrics:
                if name == "teacher":
                    assert [row[metric]] == (done.logged("teacher", metric) or [None])
                    continue
                values = [value for seed in (0, 1) for value in done.logged(f"{name} seed {seed}", metric)]
                assert row[metric]["n"] == len(values) == 2
                assert row[metric]["mean"] == pytest.approx(statistics.mean(values))
                assert row[metric]["std"] == pytest.approx(statistics.stdev(values))

    def test_the_table_is_printed(self, done, model, names, generators, discriminators):
        lines = {re.split(r"\s{2,}", line)[0]: line for line in done.output.splitlines()}
        for name, row in done.rows.items():
            assert f"{row['parameters']:,}" in lines[name]
            assert f"{row['macs']:,}" in lines[name]
        assert all(note in done.output for note in done.report["table"]["notes"])

    def test_the_page_shows_it_all(self, done, model, names, generators, discriminators):
        page = (done.folder / "index.html").read_text()
        assert all(name in page for name in names)
        samples = done.report["samples"]
        assert len(samples) == len(generators)
        shown = ["input", *names, *(["truth"] if model == "pix2pix" else [])]
        assert all([entry["label"] for entry in sample["images"]] == shown for sample in samples)
        for relation in done.report["relations"]:
            assert [entry["label"] for entry in relation["panels"]] == ["the chosen pixel", *names]
        linked = re.findall(r'(?:href|src)="([^"#]+\.(?:png|pth))"', page)
        assert linked and all((done.folder / unquote(link)).is_file() for link in linked)
        assert {"images/curves_srp.png", "images/curves_kd_A.png"} & set(linked)

    def test_the_command_can_be_repeated(self, done, model, names, generators, discriminators):
        prefix = "python -m srpkd.train "
        assert done.report["command"].startswith(prefix)
        repeated = parse_arguments(shlex.split(done.report["command"].removeprefix(prefix)))
        assert repeated == parse_arguments([f"--config={done.folder / 'config.yaml'}"])


def test_notes_compare_arms_seed_by_seed(pix2pix):
    notes = pix2pix.report["table"]["notes"]
    assert [note.partition(", mIoU")[0] for note in notes] == ["alone minus output", "output + SRP minus output"]
    gains = [
        pix2pix.logged(f"alone seed {seed}", "mIoU")[0] - pix2pix.logged(f"output seed {seed}", "mIoU")[0]
        for seed in (0, 1)
    ]
    assert f"{statistics.mean(gains):+.2f} on average; by seed {gains[0]:+.2f}, {gains[1]:+.2f}" in notes[0]


def test_unpaired_students_are_compared_by_their_likeness_to_the_teacher(cycle_gan):
    [note] = cycle_gan.report["table"]["notes"]
    assert note.startswith("b minus a, PSNR to teacher dB A to B: ")


def test_a_plain_model_needs_no_teacher(run):
    done = run(*PIX2PIX, "--seeds=1")
    assert list(done.rows) == ["student"]
    assert "without a teacher" in done.report["task"]
    assert load_generator(done.folder / "latest_net_G.pth")
    assert not {"kd", "srp"} & set().union(*done.metrics)


def test_the_other_way_round_it_makes_photos(run):
    done = run(*PIX2PIX, "--direction=BtoA")
    assert isinstance(done.rows["student"]["psnr"], float)
    assert "mIoU" not in done.rows["student"]


def test_pairs_from_files(run, tmp_path):
    write_synthetic(tmp_path / "pairs", 4, 2, 20)
    arguments = ["--model=pix2pix", "--load_size=18", "--crop_size=16", *TEACHER, *TINY]
    done = run("--dataroot=pairs", *arguments)
    assert list(done.rows) == ["teacher", "student"]
    assert isinstance(done.rows["student"]["psnr"], float)


# A teacher from a file


@pytest.mark.parametrize("given", ["folder", "file"])
def test_both_directions_are_distilled_from_a_folder_or_the_file_beside(run, folders, cycle_gan, given):
    path = cycle_gan.folder / "teacher" / ("" if given == "folder" else "latest_net_G_A.pth")
    done = run("--dataroot", str(folders), *CYCLE, *TINY, "--teacher", str(path))
    assert {"kd_A", "srp_A", "kd_B", "srp_B"} <= done.metrics[0].keys()
    assert "no teacher from B to A" not in done.output
    assert list(done.rows) == ["teacher", "student"]
    assert done.rows["teacher"]["parameters"] == cycle_gan.rows["teacher"]["parameters"]
    assert done.rows["teacher"]["seconds_per_step"] is None
    assert {"teacher_psnr A to B", "teacher_psnr B to A"} <= done.rows["student"].keys()


def test_one_direction_alone_if_there_is_no_other_teacher(run, folders, cycle_gan, tmp_path):
    path = tmp_path / "my teacher.pth"
    path.write_bytes((cycle_gan.folder / "teacher" / "latest_net_G_A.pth").read_bytes())
    done = run("--dataroot", str(folders), *CYCLE, *TINY, "--teacher", str(path))
    assert "no teacher from B to A (--teacher_B): only the generator from A to B is distilled" in done.output
    assert {"kd_A", "srp_A"} <= done.metrics[0].keys()
    assert not {"kd_B", "srp_B"} & done.metrics[0].keys()
    captions = [sample["caption"] for sample in done.report["samples"]]
    assert captions == ["test image 0 A to B", "test image 0 B to A"]


def test_the_other_teacher_may_lie_elsewhere(run, folders, cycle_gan, tmp_path):
    files = [tmp_path / "forth.pth", tmp_path / "back.pth"]
    for file, name in zip(files, ("G_A", "G_B")):
        file.write_bytes((cycle_gan.folder / "teacher" / f"latest_net_{name}.pth").read_bytes())
    done = run("--dataroot", str(folders), *CYCLE, *TINY, f"--teacher={files[0]}", f"--teacher_B={files[1]}")
    assert {"kd_A", "kd_B"} <= done.metrics[0].keys()


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_pix2pix_teacher_from_a_file(run, pix2pix, given):
    path = pix2pix.folder / "teacher" / ("" if given == "folder" else "latest_net_G.pth")
    done = run(*PIX2PIX, "--teacher", str(path), "--teacher_netG=resnet_9blocks")  # the file wins
    assert {"kd", "srp"} <= done.metrics[0].keys()
    assert done.rows["teacher"]["mIoU"] == pytest.approx(pix2pix.rows["teacher"]["mIoU"])
    assert not (done.folder / "teacher").exists()


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_the_folder_of_a_run_stands_for_its_teacher(tmp_path, model):
    names = {"pix2pix": ["G"], "cycle_gan": ["G_A", "G_B"]}[model]
    config = parse_arguments([f"--model={model}", *WORLD, f"--teacher={tmp_path}"])
    for ngf, folder in ((2, tmp_path), (3, tmp_path / "teacher")):  # its student's weights, and its teacher's
        for name in names:
            save_weights(define_generator("resnet_1blocks", ngf=ngf), folder / f"latest_net_{name}.pth")
        assert plan.teacher_files(config) == {name: folder / f"latest_net_{name}.pth" for name in names}


@pytest.mark.parametrize("dropout", [False, True])
def test_a_loaded_teacher_is_frozen_and_in_eval_mode(tmp_path, dropout):
    save_weights(
        define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=dropout), tmp_path / "latest_net_G.pth"
    )
    [(direction, teacher)] = plan.load_teachers(config_of(f"--teacher={tmp_path}")).items()
    assert direction == "G"
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.rand(1, 3, SIZE, SIZE)
    assert torch.equal(teacher(x), teacher(x))


# Nothing is overwritten


def test_a_second_run_gets_a_folder_beside_the_first(run):
    first = run(*PIX2PIX, "--name=same")
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    again = [run(*PIX2PIX, "--name=same", f"--seed={seed}").folder.name for seed in (1, 2)]
    assert (first.folder.name, *again) == ("same", "same-2", "same-3")
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before


def test_runs_dir_is_made(run, tmp_path):
    done = run(*PIX2PIX, "--runs_dir=a/b", "--name=c")
    assert done.folder == tmp_path / "a/b/c"


# What cannot work is said before anything is written or trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataroot=nowhere"],
            "The data set nowhere (unaligned, train) cannot be used:\n  1. dataroot nowhere does not",
        ),
        (["--dataroot=empty"], r"The data set empty (unaligned, train) cannot be used:"),
        (["--crop_size=18", "--load_size=20"], "1. --crop_size 18 is no multiple of 4"),
        (["--netG=unet_32"], "--crop_size 16 is no multiple of 32, as this generator needs: use 32"),
        (["--teacher_netG=unet_32"], "--crop_size 16 is no multiple of 32"),
        (["--teacher_netG=unet_16", "--variants={a: {netG: unet_32}}"], "--crop_size 16 is no multiple of 32"),
        (["--netG=resnet_x"], "netG='resnet_x' is unknown: expected 'resnet_<n>blocks'"),
        ([*TEACHER, "--variants={a: {netG: resnet}}"], "netG='resnet' is unknown"),
        (["--teacher=none.pth"], "none.pth does not exist"),
        (["--teacher=text.pth"], "text.pth is a text file"),
        (["--teacher=D.pth"], "these look like a discriminator's: give the generator's"),
        (["--teacher=empty"], "latest_net_G_A.pth does not exist"),
        (["--teacher=grey.pth"], "grey.pth: this generator goes from 1 to 1 channels, the images from 3 to 3: set"),
        (
            [*TEACHER, "--layers={model.9: model.99}"],
            "the teacher has no module named 'model.99'; the nearest names are",
        ),
        (
            [*TEACHER, "--layers={model.4: model.9}"],
            "student layer 'model.4' gives (4, 8, 8) and teacher layer 'model.9'",
        ),
        (
            [*TEACHER, "--variants={a: {}, b: {layers: {model.4: model.9}}}"],
            "variant 'b': student layer 'model.4' gives",
        ),
        (
            [*TEACHER, "--lambda_kd=0", "--lambda_srp=0"],
            "lambda_kd, lambda_srp and lambda_feature are all 0: nothing w",
        ),
        ([*TEACHER, "--variants={a: {lambda_kd: 0, lambda_srp: 0}}"], "nothing would be learnt from the teacher"),
        ([*TEACHER, "--variants={a: {}, b: {ngf: 0}}"], "variant 'b': ngf=0: expected at least 1"),
        (["--backend=blokced"], "backend='blokced' is not one of"),
        ([*TEACHER, "--backend=closed_form", "--distance=l1"], "backend='closed_form' computes distance in"),
        (["--n_layers_D=5"], "images of 16 x 16 pixels are too small for netD n_layers: use larger ones, or --netD n_"),
        (["--input_nc=1"], "lambda_identity=0.5 needs images of equal channels on both sides"),
        (["--runs_dir=text.pth"], "runs_dir text.pth: this folder cannot be made: File exists"),
        (["--runs_dir=text.pth/runs"], "runs_dir text.pth/runs: this folder cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_said_first(refusal, folders, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("weights, as it were")
    save_weights(define_discriminator(ndf=2), tmp_path / "D.pth")
    save_weights(define_generator("resnet_1blocks", 1, 1, 2), tmp_path / "grey.pth")
    before = sorted(tmp_path.rglob("*"))

    def fit(*_: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(pipeline, "fit", fit)
    assert message in refusal("--dataroot", str(folders), *CYCLE, *TINY, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--dataroot=nowhere"], ["--dataroot=:synthetic:", "--teacher=none.pth"]])
def test_the_command_line_ends_without_a_traceback(tmp_path, arguments):
    done = command(*arguments, *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_generated_images_must_fit_too(refusal):
    message = "synthetic_size=20 must be a multiple of 16 for these generators"
    assert refusal(*PIX2PIX, "--synthetic_size=20", "--netG=unet_16").startswith(message)


def test_every_image_that_some_stage_sees_is_looked_at(refusal, folders, tmp_path):
    shutil.copytree(folders, tmp_path / "images")
    (tmp_path / "images/trainA/00004.png").write_bytes(b"broken")
    arguments = ["--dataroot=images", *CYCLE, *TINY, *TEACHER, "--max_dataset_size=2", "--teacher_max_dataset_size=5"]
    assert "00004.png" in refusal(*arguments)
    config = parse_arguments([argument.replace("=5", "=4") for argument in arguments])
    assert "4 images in trainA" in datasets.validate_data(config, [config, train.teacher_config(config)], {})


# Images that keep their own sizes


@pytest.fixture(scope="module")
def oblong(tmp_path_factory) -> Path:
    """Unpaired images, 24 pixels wide and 40 high in A, 48 wide and 36 high in B; and pairs of 48 x 36 each."""
    root = tmp_path_factory.mktemp("oblong")
    sizes = {"trainA": (24, 40), "testA": (24, 40), "trainB": (48, 36), "testB": (48, 36), "train": (96, 36)}
    for name, (width, height) in sizes.items():
        (root / name).mkdir()
        for index in range(2):
            Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()).save(
                root / name / f"{index}.png"
            )
    return root


@pytest.mark.parametrize(
    ("flags", "size_A", "size_B"),
    [
        ("--preprocess=none --crop_size=8", (40, 24), (36, 48)),
        ("--preprocess=none --direction=BtoA", (36, 48), (40, 24)),
        ("--preprocess=none --model=pix2pix", (36, 48), (36, 48)),
        ("--preprocess=scale_width --load_size=12 --crop_size=16", (20, 12), (16, 12)),
        ("--preprocess=scale_width_and_crop --load_size=24 --crop_size=16", (16, 16), (16, 16)),
        ("--preprocess=crop --crop_size=20", (20, 20), (20, 20)),
    ],
)
def test_the_size_of_what_is_trained_on(oblong, flags, size_A, size_B):
    config = parse_arguments([f"--dataroot={oblong}", *TINY, *flags.split()])
    before = torch.get_rng_state()
    assert (datasets.input_size(config, "G_A"), datasets.input_size(config, "G_B")) == (size_A, size_B)
    assert torch.equal(torch.get_rng_state(), before)
    item = datasets.open_data(config, "train")[0]
    assert (item["A"].shape[1:], item["B"].shape[1:]) == (size_A, size_B)


def test_macs_are_of_the_size_that_images_have(run, oblong):
    done = run(f"--dataroot={oblong}", *TINY, *TEACHER, "--preprocess=none", "--crop_size=8", "--epoch_steps=1")
    net = load_generator(done.folder / "latest_net_G_A.pth")
    assert done.rows["student"]["macs"] == count_macs(net, (1, 3, 40, 24))
    [column] = [column for column in done.report["table"]["columns"] if column["key"] == "macs"]
    assert column["help"] == "multiply-accumulates of 40 x 24 pixels, the first image's size"


@pytest.mark.parametrize(("direction", "size"), [("AtoB", "40 x 24"), ("BtoA", "36 x 48")])
def test_images_that_are_too_small_are_refused_by_their_own_size(refusal, oblong, direction, size):
    arguments = [f"--dataroot={oblong}", *TINY, "--preprocess=none", f"--direction={direction}", "--n_layers_D=5"]
    assert f"images of {size} pixels are too small for netD n_layers" in refusal(*arguments)


def test_a_mistake_of_ours_shows_its_traceback(monkeypatch, tmp_path):
    def wrong(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(summary, "evaluate", wrong)
    with pytest.raises(ValueError, match="a bug"):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_the_training_is_said_in_a_line(run, folders, tmp_path, monkeypatch, workers):
    shutil.copytree(folders, tmp_path / "images")
    open_data = datasets.open_data

    def broken(config: TrainConfig, phase: str) -> Any:
        for path in (tmp_path / "images/trainA").iterdir() if phase == "train" else ():
            path.write_bytes(b"broken")
        return open_data(config, phase)

    monkeypatch.setattr(loop, "open_data", broken)
    with pytest.raises(SystemExit, match=r"(?s)error: .*trainA/0000\d\.png: not an image, whatever its name says"):
        run("--dataroot=images", *CYCLE, *TINY, f"--num_threads={workers}")


def test_every_page_is_written_once(monkeypatch, tmp_path):
    pages = []
    monkeypatch.setattr(
        "srpkd.training.run_dir.write_report",
        lambda folder: pages.append(json.loads((folder / "report.json").read_text())),
    )
    train.main([*PIX2PIX, *TEACHER, "--seeds=2", f"--runs_dir={tmp_path}"])
    shown = [(page["status"], len(page["table"]["rows"])) for page in pages]
    assert shown == [("running", 1), ("running", 2), ("finished", 2)]


def test_a_run_that_breaks_off_says_so(monkeypatch, tmp_path):
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}", "--name=broken"])
    folder = tmp_path / "broken"
    assert json.loads((folder / "report.json").read_text())["status"] == "stopped"
    assert "stopped" in (folder / "index.html").read_text()
    assert (folder / "latest_net_G.pth").exists()


# How a stage is trained


@pytest.fixture
def record(tmp_path) -> Iterator[RunDir]:
    record = RunDir(new_folder(str(tmp_path), "run"))
    yield record
    record.close()


def config_of(*arguments: str) -> TrainConfig:
    return parse_arguments([*PIX2PIX, *arguments])


def stage_of(config: TrainConfig, record: RunDir, seed: int = 0) -> Stage:
    return Stage("student", config, seed, record.folder)


def teacher_of(ngf: int = 3, **others: Any) -> dict[str, nn.Module]:
    torch.manual_seed(7)
    return {"G": define_generator("resnet_2blocks", ngf=ngf, init_gain=0.2, **others).eval().requires_grad_(False)}


@pytest.fixture
def watched(monkeypatch) -> list[tuple[Any, dict[str, Tensor], list[float]]]:
    """Grows by (objective, batch, learning rates) at each step of any stage."""
    steps: list[tuple[Any, dict[str, Tensor], list[float]]] = []
    make_objective = loop.make_objective

    def make(*arguments: Any) -> Any:
        objective = make_objective(*arguments)
        step = objective.step

        def stepped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            rates = [group["lr"] for optimizer in objective.optimizers.values() for group in optimizer.param_groups]
            steps.append((objective, batch, rates))
            return step(batch)

        objective.step = stepped
        return objective

    monkeypatch.setattr(loop, "make_objective", make)
    return steps


def test_the_learning_rate_of_every_epoch(record, watched):
    config = config_of("--n_epochs=2", "--n_epochs_decay=3", "--epoch_steps=2", "--lr=0.01")
    loop.fit(stage_of(config, record), record, {})
    expected = [0.01, 0.01, 0.01, 0.01, 0.0075, 0.0075, 0.005, 0.005, 0.0025, 0.0025]
    assert [rates for _, _, rates in watched] == [[pytest.approx(rate)] * 2 for rate in expected]


def test_an_epoch_is_one_pass_by_default(record, watched):
    config = replace(config_of("--batch_size=3", "--no_flip"), epoch_steps=None)
    trained = loop.fit(stage_of(config, record), record, {})
    assert trained.steps == len(watched) == 2 * (8 // 3)
    assert all(batch["A"].shape == (3, 3, SIZE, SIZE) for _, batch, _ in watched)


def seen(watched: list, side: str = "A") -> list[Tensor]:
    return [image for _, batch, _ in watched for image in batch[side]]


def distinct(images: list[Tensor]) -> int:
    return len({image.numpy().tobytes() for image in images})


@pytest.mark.parametrize(("model", "count"), [("pix2pix", 2), ("cycle_gan", 2)])
def test_max_dataset_size_is_a_number_of_images(record, watched, model, count):
    config = parse_arguments(
        ["--model", model, *WORLD, "--no_flip", "--epoch_steps=20", "--max_dataset_size=2", "--batch_size=5"]
    )
    loop.fit(stage_of(config, record), record, {})
    assert [distinct(seen(watched, side)) for side in "AB"] == [count, count]
    assert {len(batch["A"]) for _, batch, _ in watched} == {2}  # a batch that the images cannot fill is smaller


def test_serial_batches_take_the_images_in_order(record, watched):
    config = parse_arguments(["--model=cycle_gan", *WORLD, "--no_flip", "--serial_batches", "--epoch_steps=8"])
    loop.fit(stage_of(config, record), record, {})
    for side in "AB":
        images = seen(watched, side)
        assert distinct(images) == 4
        assert all(torch.equal(a, b) for a, b in zip(images, images[4:]))


def test_arms_of_a_seed_start_alike_and_see_the_same_images(record, watched):
    teachers = teacher_of()
    variants = [(config_of("--lambda_kd=0", "--lambda_srp=0"), teachers), (config_of("--lambda_feature=1"), teachers)]
    variants.append((config_of(), {}))
    starts = []
    for config, own in variants:
        objective = loop.make_objective(config, 3, own)
        networks = objective.generators | objective.discriminators
        starts.append([p.detach().clone() for net in networks.values() for p in net.parameters()])
        loop.fit(stage_of(config, record, seed=3), record, own)
    assert all(all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True)) for other in starts[1:])
    images = [seen([entry]) + seen([entry], "B") for entry in watched]
    runs = [images[:6], images[6:12], images[12:]]
    assert all(torch.equal(a, b) for other in runs[1:] for x, y in zip(runs[0], other) for a, b in zip(x, y))
    assert distinct(seen(watched)) > 2
    other = loop.make_objective(variants[0][0], 4, teachers)
    assert not torch.equal(starts[0][0], next(other.generators["G"].parameters()))


def test_arms_of_other_networks_see_the_same_images_too(record, watched):
    for flag in ("--ngf=2", "--ngf=3", "--ndf=3", "--n_layers_D=2"):
        loop.fit(stage_of(config_of(flag), record, seed=3), record, {})
    runs = [seen(watched[start : start + 6]) for start in range(0, 24, 6)]
    assert all(all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True)) for other in runs[1:])


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_the_same_seed_gives_the_same_bits(run, model):
    arguments = ["--model", model, *WORLD, *TEACHER, "--lambda_feature=1", "--name=same"]
    arguments.append("--no_dropout=false")
    results = [run(*arguments, f"--seed={seed}") for seed in (5, 5, 6)]
    files = sorted(path.relative_to(results[0].folder) for path in results[0].folder.rglob("*.pth"))
    assert len(files) == {"pix2pix": 4, "cycle_gan": 8}[model]
    first, second, other = ([load_weights(done.folder / file) for file in files] for done in results)
    for a, b, c in zip(first, second, other):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


def test_two_threads_give_the_same_bits_twice(record, one_thread):
    torch.set_num_threads(2)  # put back by one_thread
    config = config_of("--n_epochs_decay=0", "--epoch_steps=2", "--lambda_feature=1")
    first, second = (loop.fit(stage_of(config, record), record, teacher_of()).generators["G"] for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_teacher_stays_as_it_is(record, norm):
    teachers = teacher_of(norm=norm, dropout=True)
    before = copy.deepcopy(teachers["G"].state_dict())
    loop.fit(stage_of(config_of("--lambda_feature=1"), record), record, teachers)
    assert all(torch.equal(value, before[key]) for key, value in teachers["G"].state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teachers["G"].parameters())
    assert not any(module.training or module._forward_hooks for module in teachers["G"].modules())


@pytest.mark.parametrize(
    ("model", "distilled", "names"),
    [
        ("pix2pix", (), ("G_L1",)),
        ("pix2pix", ("G",), ("kd", "srp", "feature")),
        ("cycle_gan", ("G_A", "G_B"), ("cycle_A", "cycle_B", "idt_A", "idt_B", "kd_A", "srp_A", "kd_B", "srp_B")),
    ],
)
def test_students_learn(record, model, distilled, names):
    flags = "--n_epochs=2 --epoch_steps=20 --lr=0.01 --batch_size=4 --ngf=4 --lambda_kd=50 --lambda_feature=1"
    # a teacher that knows nothing of the task would pull against it
    config = parse_arguments(["--model", model, *WORLD, *flags.split(), f"--lambda_L1={0 if distilled else 100}"])
    loop.fit(stage_of(config, record), record, dict.fromkeys(distilled, teacher_of()["G"]))
    done = Run(record.folder, "")
    for name in names:
        values = done.logged("student", name)
        assert len(values) == 60
        assert statistics.mean(values[-10:]) < 0.9 * statistics.mean(values[:5]), name


def test_what_a_stage_gives_is_ready_for_use(record):
    trained = loop.fit(stage_of(config_of("--no_dropout=false"), record), record, teacher_of())
    assert trained.steps == 6 and 0 < trained.seconds_per_step < 10
    net = trained.generators["G"]
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    saved = load_weights(record.folder / "latest_net_G.pth")
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())


def test_checkpoints_in_between(record):
    config = config_of("--n_epochs=3", "--n_epochs_decay=2", "--epoch_steps=1", "--save_epoch_freq=2")
    loop.fit(stage_of(config, record), record, {})
    assert {path.name for path in record.folder.glob("*.pth")} == {
        f"{name}_net_{net}.pth" for name, net in (("2", "G"), ("4", "G"), ("latest", "G"), ("latest", "D"))
    }
    second, latest = (load_weights(record.folder / f"{name}_net_G.pth") for name in ("2", "latest"))
    assert any(not torch.equal(second[key], latest[key]) for key in second)


@pytest.mark.parametrize(("freq", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (4, [1, 4]), (100, [1])])
def test_print_freq(record, freq, steps):
    loop.fit(stage_of(config_of(f"--print_freq={freq}"), record), record, {})
    assert [line["step"] for line in Run(record.folder, "").metrics] == steps


def test_a_time_budget_stops_after_two_seeds(run):
    done = run(*PIX2PIX, *TEACHER, "--seeds=9", "--time_budget=0", "--epoch_steps=1")
    assert "2 seeds: another would take longer than the time budget" in done.output
    assert done.rows["student"]["mIoU"]["n"] == 2


# The teacher's and the variants' options


def test_a_teachers_options():
    config = config_of(*TEACHER, "--teacher_n_epochs=7", "--max_dataset_size=4", "--teacher_max_dataset_size=6")
    teacher = train.teacher_config(config)
    changed = {"netG": "resnet_2blocks", "ngf": 3, "n_epochs": 7, "max_dataset_size": 6}
    assert teacher == replace(config, **changed)
    assert teacher.n_epochs_decay == config.n_epochs_decay


def test_an_arms_options():
    config = config_of(*TEACHER, "--variants={a: {lambda_kd: 3, ngf: 5, no_dropout: false}, b: {}}")
    assert train.arm_config(config, "a") == replace(config, lambda_kd=3, ngf=5, no_dropout=False)
    assert train.arm_config(config, "b") == config


def test_a_run_can_be_called_from_python(tmp_path):
    # as few options as possible, and not resolved
    config = TrainConfig(
        dataroot=":synthetic:", model="pix2pix", netG="resnet_1blocks", ngf=2, ndf=2, n_epochs=1, samples=1
    )
    config = replace(config, n_epochs_decay=0, epoch_steps=1, runs_dir=str(tmp_path), name="from python")
    record = pipeline.run(config)
    assert record.folder == tmp_path / "from python"
    assert yaml.safe_load((record.folder / "config.yaml").read_text())["name"] == "from python"
    with pytest.raises(DataError, match="nowhere"):
        pipeline.run(replace(config, dataroot="nowhere"))
    with pytest.raises(ValueError, match=r"variant 'a': there is no option 'ngff'; did you mean ngf\?"):
        pipeline.run(replace(config, teacher="x", variants={"a": {"ngff": 3}}))


# The table


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([3.0], 3.0),
        ([1.0, 3.0], {"mean": 2.0, "std": 2**0.5, "n": 2}),
        ([float("inf"), 1.0], {"mean": float("inf"), "std": float("nan"), "n": 2}),
        ([float("nan"), 1.0], {"mean": float("nan"), "std": float("nan"), "n": 2}),
    ],
)
def test_a_cell_is_a_value_or_its_mean_and_spread(values, expected):
    rows = [{"psnr": value} for value in values] + [{"parameters": 7}, {"parameters": 7}]
    assert summary.summarise("psnr", rows) == pytest.approx(expected, nan_ok=True)
    assert summary.summarise("parameters", rows) == 7
