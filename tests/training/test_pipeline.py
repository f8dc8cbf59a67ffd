"""Whole runs: what they write, their stages, and how they end."""

import errno
import json
import os
import re
import shlex
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import yaml
from PIL import Image
from runs import CYCLE_GAN, PIX2PIX, SIZE, SYNTHETIC, TEACHER, TINY, Run, assert_same_weights
from sample_images import save_plain

from srpkd import train
from srpkd.data.images import DataError, left_half, right_half
from srpkd.data.listing import image_files
from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import load_generator, load_weights
from srpkd.models.complexity import count_macs, count_parameters
from srpkd.training import datasets, loop, pipeline, summary
from srpkd.training.config import parse_arguments
from srpkd.training.options import TrainConfig
from srpkd.training.pipeline import is_over_budget, selected_convolutions

NAMES = {"pix2pix": ["teacher", "alone", "output", "output + SRP"], "cycle_gan": ["teacher", "a", "b"]}
GENERATORS = {"pix2pix": ["G"], "cycle_gan": ["G_A", "G_B"]}
DISCRIMINATORS = {"pix2pix": ["D"], "cycle_gan": ["D_A", "D_B"]}


@pytest.fixture(params=NAMES)
def model(request) -> str:
    return request.param


@pytest.fixture
def done(request, model) -> Run:
    """A whole run of the model."""
    return request.getfixturevalue(model)


def stage_folders(model: str) -> dict[str, str]:
    """Return stage -> folder of a run with two seeds."""
    students = [f"{name} seed {seed}" for seed in (0, 1) for name in NAMES[model][1:]]
    return {"teacher": "teacher"} | {stage: stage.replace(" ", "-") for stage in students}


def test_files_of_a_run(done, model):
    assert done.folder.name == {"pix2pix": "tiny", "cycle_gan": "experiment"}[model]
    there = {path.name for path in done.folder.iterdir()}
    assert there == {
        "config.yaml",
        "metrics.jsonl",
        "report.json",
        "index.html",
        "images",
        "state.pt",
        *stage_folders(model).values(),
    }
    assert parse_arguments([f"--config={done.folder / 'config.yaml'}"]).model == model
    for folder in stage_folders(model).values():
        files = {f"latest_net_{network}.pth" for network in GENERATORS[model] + DISCRIMINATORS[model]}
        final_state = {"final_state.pt"} if folder != "teacher" else set()  # a teacher is not extended
        assert {path.name for path in (done.folder / folder).iterdir()} == files | final_state
    assert done.report["status"] == "finished"
    assert done.report["elapsed_seconds"] > 0
    assert not list(done.folder.rglob("*.tmp"))


def test_metrics_of_every_stage_and_step(done, model):
    assert list(dict.fromkeys(line["stage"] for line in done.metrics)) == list(stage_folders(model))
    losses = {
        "pix2pix": {"G_GAN", "G_L1", "D_fake", "D_real"},
        "cycle_gan": {"G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B", "D_A", "D_B"},
    }
    for stage in stage_folders(model):
        lines = [line for line in done.metrics if line["stage"] == stage and "epoch" in line]
        assert [(line["step"], line["epoch"]) for line in lines] == list(enumerate([1, 1, 1, 2, 2, 2], 1))
        assert all(losses[model] <= line.keys() for line in lines)
    assert [line["seconds"] for line in done.metrics] == sorted(line["seconds"] for line in done.metrics)


def test_checkpoints_are_the_generators_of_the_table(done, model):
    for stage, folder in stage_folders(model).items():
        row = done.rows[re.sub(" seed .*", "", stage)]
        for name in GENERATORS[model]:
            net = load_generator(done.folder / folder / f"latest_net_{name}.pth")
            assert count_parameters(net) == row["parameters"]
            assert count_macs(net, (1, 3, SIZE, SIZE)) == row["macs"]
    listed = [entry["file"] for entry in done.report["files"]]
    assert listed == [
        f"{folder}/latest_net_{name}.pth" for folder in stage_folders(model).values() for name in GENERATORS[model]
    ]


def test_the_table_has_the_logged_metrics(done, model):
    assert list(done.rows) == NAMES[model]
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


def test_the_table_is_printed(done):
    lines = {re.split(r"\s{2,}", line)[0]: line for line in done.output.splitlines()}
    for name, row in done.rows.items():
        assert f"{row['parameters']:,}" in lines[name]
        assert f"{row['macs']:,}" in lines[name]
    assert all(note in done.output for note in done.report["table"]["notes"])


def test_the_page_shows_all_networks(done, model):
    page = (done.folder / "index.html").read_text("utf-8")
    assert all(name in page for name in NAMES[model])
    samples = done.report["samples"]
    assert len(samples) == len(GENERATORS[model])
    shown = ["input", *NAMES[model], *(["truth"] if model == "pix2pix" else [])]
    assert all([entry["label"] for entry in sample["images"]] == shown for sample in samples)
    for relation in done.report["relations"]:
        assert [entry["label"] for entry in relation["panels"]] == ["the chosen pixel", *NAMES[model]]
    linked = re.findall(r'(?:href|src)="([^"#]+\.(?:png|pth))"', page)
    assert linked and all((done.folder / unquote(link)).is_file() for link in linked)
    assert {"images/curves_srp.png", "images/curves_kd_A.png"} & set(linked)


def test_the_command_can_be_repeated(done):
    prefix = "python -m srpkd.train "
    assert done.report["command"].startswith(prefix)
    repeated = parse_arguments(shlex.split(done.report["command"].removeprefix(prefix)))
    assert repeated == parse_arguments([f"--config={done.folder / 'config.yaml'}"])


def test_a_run_without_a_teacher(run):
    done = run(*PIX2PIX, "--seeds=1")
    assert list(done.rows) == ["student"]
    assert "without a teacher" in done.report["task"]
    assert load_generator(done.folder / "latest_net_G.pth")
    assert not {"kd", "srp"} & set().union(*done.metrics)


def test_direction_b_to_a(run):
    done = run(*PIX2PIX, "--direction=BtoA")
    assert isinstance(done.rows["student"]["psnr"], float)
    assert "mIoU" not in done.rows["student"]


def test_pairs_from_files(run, tmp_path):
    write_synthetic(tmp_path / "pairs", 4, 2, 20)
    arguments = ["--model=pix2pix", "--load_size=18", "--crop_size=16", *TEACHER, *TINY]
    done = run("--dataroot=pairs", *arguments)
    assert list(done.rows) == ["teacher", "student"]
    assert isinstance(done.rows["student"]["psnr"], float)


def split_pairs(folder: Path, form: str) -> None:
    """Write the halves of the images in train and test to two folders each, and delete train and test."""
    for phase in ("train", "test"):
        for path in map(Path, image_files(folder / phase)):
            with Image.open(path) as image:
                for half, name in zip((left_half, right_half), form.format(phase, phase).split()):
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    half(image, "").save(folder / name / path.name)
            path.unlink()
        if not any((folder / phase).iterdir()):
            (folder / phase).rmdir()


@pytest.mark.parametrize("form", ["{}/A {}/B", "A/{} B/{}", "{}A {}B", "{}_A {}_B"])
@pytest.mark.core(2)
def test_pairs_in_two_folders_train_like_pairs_side_by_side(run, tmp_path, form):
    arguments = ["--model=pix2pix", "--load_size=18", "--crop_size=16", "--direction=BtoA", *TINY]
    one = run(f"--dataroot={write_synthetic(tmp_path / 'one', 4, 2, 20)}", *arguments)
    split_pairs(write_synthetic(tmp_path / "two", 4, 2, 20), form)
    other = run(f"--dataroot={tmp_path / 'two'}", *arguments)
    assert_same_weights(one.folder, other.folder)
    assert one.rows["student"]["psnr"] == other.rows["student"]["psnr"]
    a, b = form.format("train", "train").split()
    assert f"train images (pairs by file name): 4 images in {a} and 4 images in {b}, 20 x 20 pixels" in other.output
    a, b = form.format("test", "test").split()
    assert f"test images (pairs by file name): 2 images in {a} and 2 images in {b}, 20 x 20 pixels" in other.output
    assert "train images (pairs side by side, A left and B right): 4 images in train" in one.output


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
@pytest.mark.core(1)
def test_training_needs_no_test_images(run, tmp_path, model):
    mode = "aligned" if model == "pix2pix" else "unaligned"
    folder = write_synthetic(tmp_path / "images", 4, 2, 20, layout=mode)
    arguments = [f"--dataroot={folder}", f"--model={model}", "--load_size=18", "--crop_size=16", *TEACHER, *TINY]
    arguments += ["--variants={a: {}, b: {lambda_srp: 0}}", "--seeds=2", "--update_html_freq=2"]
    whole = run(*arguments)
    for path in folder.glob("test*"):
        path.rename(folder / path.name.replace("test", "val"))
    renamed = run(*arguments)
    assert renamed.rows.keys() == whole.rows.keys() and "test images (from val, " in renamed.output
    for name, row in renamed.rows.items():
        assert {key: row[key] for key in row if key != "seconds_per_step"} == {
            key: whole.rows[name][key] for key in row if key != "seconds_per_step"
        }
    for path in folder.glob("val*"):
        shutil.rmtree(path)
    (folder / "tset").mkdir()
    without = run(*arguments)
    assert_same_weights(whole.folder, without.folder)
    expected = "test, or val, or testA" if model == "pix2pix" else "testA and testB, or valA"
    assert f"no test images: validation is skipped, and the report has no sample images (expected {expected}" in (
        without.output
    )
    assert "which has train" in without.output and ", tset)" in without.output
    assert "no test images: validation is skipped" in without.report["environment"]["data"]
    assert set(without.rows["a"]) == {"name", "parameters", "macs", "seconds_per_step"}
    assert without.report["samples"] == without.report["relations"] == []
    assert without.report["status"] == "finished"
    assert without.report["table"]["notes"] == ["No test images: validation was skipped."]
    assert all("epoch" in line for line in without.metrics)


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
@pytest.mark.core(1)
def test_the_same_seed_gives_bit_identical_weights(run, model):
    arguments = ["--model", model, *SYNTHETIC, *TEACHER, "--lambda_feature=1", "--name=same"]
    arguments.append("--no_dropout=false")
    results = [run(*arguments, f"--seed={seed}") for seed in (5, 5, 6)]
    files = sorted(path.relative_to(results[0].folder) for path in results[0].folder.rglob("*.pth"))
    assert len(files) == {"pix2pix": 5, "cycle_gan": 10}[model]  # also the student's adapters
    first, second, other = ([load_weights(done.folder / file) for file in files] for done in results)
    for a, b, c in zip(first, second, other):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


def test_a_time_budget_stops_after_two_seeds(run):
    done = run(*PIX2PIX, *TEACHER, "--seeds=9", "--time_budget=0", "--epoch_steps=1")
    assert "2 seeds: another one would exceed the time budget" in done.output
    assert done.rows["student"]["mIoU"]["n"] == 2


@pytest.mark.parametrize(
    ("number", "budget", "started", "expected"),
    [
        (2, 40.0, "", False),  # two seeds took 20 seconds, so that a third one ends after 40
        (2, 39.9, "", True),
        (2, 39.9, "a seed 2", False),
        (1, 0.0, "", False),
        (2, None, "", False),
    ],
)
def test_the_time_budget_is_that_of_the_whole_run(number, budget, started, expected):
    run_dir, config = SimpleNamespace(elapsed=30.0), SimpleNamespace(time_budget=budget)
    stages = {"done": ["teacher"], "extended": [], "training": (started, {})}
    plan = SimpleNamespace(config=config, run_dir=run_dir, students_began=10.0, **stages)
    assert is_over_budget(plan, number) == expected


def test_a_run_can_be_called_from_python(tmp_path):
    # few options, not resolved
    config = TrainConfig(
        dataroot=":synthetic:", model="pix2pix", netG="resnet_1blocks", ngf=2, ndf=2, n_epochs=1, samples=1
    )
    config = replace(config, n_epochs_decay=0, epoch_steps=1, runs_dir=str(tmp_path), name="from python")
    run_dir = pipeline.run(config)
    assert run_dir.folder == tmp_path / "from python"
    assert yaml.safe_load((run_dir.folder / "config.yaml").read_text("utf-8"))["name"] == "from python"
    with pytest.raises(DataError, match="nowhere"):
        pipeline.run(replace(config, dataroot="nowhere"))
    with pytest.raises(ValueError, match=r"variant 'a': unknown option 'ngff'; did you mean ngf\?"):
        pipeline.run(replace(config, teacher="x", variants={"a": {"ngff": 3}}))


def test_macs_are_of_the_image_size(run, oblong):
    done = run(f"--dataroot={oblong}", *TINY, *TEACHER, "--preprocess=none", "--crop_size=8", "--epoch_steps=1")
    net = load_generator(done.folder / "latest_net_G_A.pth")
    assert done.rows["student"]["macs"] == count_macs(net, (1, 3, 40, 24))
    [column] = [column for column in done.report["table"]["columns"] if column["key"] == "macs"]
    assert column["help"] == "multiply-accumulates of 40 x 24 pixels, the first image's size"


# Folders


@pytest.mark.parametrize(
    "flags", [CYCLE_GAN, ["--model=cycle_gan", "--preprocess=none"], ["--dataset_mode=aligned", *CYCLE_GAN]]
)
def test_a_run_lists_each_folder_of_images_once(run, tmp_path, monkeypatch, flags):
    """On a network drive, this takes seconds for many files."""
    folders = [f"images/{phase}/{side}" for phase in ("train", "test") for side in "AB"]
    for folder in folders:
        for name in ("0.png", "inner/1.png"):
            save_plain(tmp_path / folder / name, (24, 24))
        (tmp_path / folder / "notes.txt").touch()
    scandir, listed = os.scandir, Counter()

    def counting(path="."):
        listed[os.path.relpath(path)] += 1
        return scandir(path)

    def of_images() -> dict[str, int]:
        return {path: count for path, count in listed.items() if path.startswith("images") and os.path.isdir(path)}

    monkeypatch.setattr(os, "scandir", counting)
    arguments = ["--dataroot=images", *flags, *TINY, *TEACHER, "--epoch_steps=1", "--update_html_freq=1", "--name=run"]
    done = run(*arguments)
    assert "1 other file (1 .txt) in train/A left out" in done.output
    once = dict.fromkeys([*folders, *(f"{folder}/inner" for folder in folders)], 1)
    if "--dataset_mode=aligned" in flags:
        once |= {"images/train": 1, "images/test": 1}  # which may have had pairs side by side
    assert of_images() == once
    listed.clear()
    run("--resume=run", "--n_epochs=2")
    assert of_images() == once


def test_a_second_run_of_the_same_name_gets_a_numbered_folder(run):
    first = run(*PIX2PIX, "--name=same")
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    again = [run(*PIX2PIX, "--name=same", f"--seed={seed}").folder.name for seed in (1, 2)]
    assert (first.folder.name, *again) == ("same", "same-2", "same-3")
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before


def test_runs_dir_is_created(run, tmp_path):
    done = run(*PIX2PIX, "--runs_dir=a/b", "--name=c")
    assert done.folder == tmp_path / "a/b/c"


# How a run ends


def test_every_page_is_written_once(monkeypatch, tmp_path):
    pages = []
    monkeypatch.setattr(
        "srpkd.training.run_dir.write_report",
        lambda folder, _: pages.append(json.loads((folder / "report.json").read_text("utf-8"))),
    )
    train.main([*PIX2PIX, *TEACHER, "--seeds=2", f"--runs_dir={tmp_path}"])
    shown = [(page["status"], len(page["table"]["rows"])) for page in pages]
    assert shown == [("running", 1), ("running", 2), ("finished", 2)]


def test_an_interrupted_run_is_marked_as_stopped(monkeypatch, tmp_path):
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}", "--name=broken"])
    folder = tmp_path / "broken"
    assert json.loads((folder / "report.json").read_text("utf-8"))["status"] == "stopped"
    assert "stopped" in (folder / "index.html").read_text("utf-8")
    assert (folder / "latest_net_G.pth").exists()


def test_a_page_that_cannot_be_written_does_not_hide_why_the_run_stopped(run, monkeypatch):
    """Because a file that it shows cannot be read, for example."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr("srpkd.training.run_dir.write_report", refuse)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*PIX2PIX)


def test_a_second_interrupt_does_not_hide_how_to_resume(run, monkeypatch, capsys):
    def interrupted(*_: Any) -> None:
        monkeypatch.setattr("srpkd.training.run_dir.write_report", interrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*PIX2PIX, "--name=two words")
    assert "stopped; resume with: python -m srpkd.train --resume 'runs/two words'\n" in capsys.readouterr().out


def test_a_run_that_could_not_be_resumed_is_not_locked(run):
    """Even if the error is kept, as by a notebook, with the frames of its traceback."""
    run(*PIX2PIX, "--name=kept")
    config = parse_arguments(["--resume=kept", "--n_epochs=1", "--n_epochs_decay=0"])
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="has already trained") as error:
            pipeline.run(config)
        errors.append(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_during_training_ends_the_run_with_a_message(
    run, unpaired, tmp_path, monkeypatch, workers
):
    shutil.copytree(unpaired, tmp_path / "images")
    open_data = datasets.open_data

    def broken(config: TrainConfig, phase: str, layout: Any) -> Any:
        for path in (tmp_path / "images/trainA").iterdir() if phase == "train" else ():
            path.write_bytes(b"broken")
        return open_data(config, phase, layout)

    monkeypatch.setattr(loop, "open_data", broken)
    with pytest.raises(SystemExit, match=r"^error: images/trainA/0000\d\.png: not an image"):
        run("--dataroot=images", *CYCLE_GAN, *TINY, f"--num_threads={workers}")


@pytest.mark.parametrize(("preprocess", "expected"), [("resize_and_crop", True), ("none", False)])
def test_cudnn_selects_convolutions_for_images_of_one_size(preprocess, expected):
    config = TrainConfig(dataroot="x", preprocess=preprocess, device="cpu").resolved()
    assert not torch.backends.cudnn.benchmark
    with selected_convolutions(config):
        assert torch.backends.cudnn.benchmark == expected
    assert not torch.backends.cudnn.benchmark
