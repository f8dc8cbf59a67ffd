"""Fixtures of the trainer's tests: training runs, refused command lines, and run folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fork_server import serving
from PIL import Image
from runs import CYCLE_GAN, PIX2PIX, TEACHER, TINY, Run, as_run, command, report_folder

from srpkd import train
from srpkd.data.synthetic import write_synthetic
from srpkd.training.config import parse_arguments
from srpkd.training.run_dir import RunDir, new_folder

VARIANTS = "{alone: {lambda_kd: 0, lambda_srp: 0}, output: {lambda_srp: 0}, output + SRP: {}}"


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[..., int]]:
    """A server of training runs in forks; see ``fork_server``."""
    with serving() as server:
        yield server


@pytest.fixture
def run(tmp_path, capsys, monkeypatch, one_thread) -> Callable[..., Run]:
    """A run in this process and in an empty folder, without its page: drawing the curves takes most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpkd.training.run_dir.write_report", lambda folder, _: folder / "index.html")

    def main(*arguments: str) -> Run:
        train.main(list(arguments))
        output = capsys.readouterr().out
        return Run(tmp_path / report_folder(output), output)

    return main


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """The error message of a command line that must not start a run, nor write anything."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            train.main(list(arguments))
        assert not (tmp_path / "runs").exists()
        assert str(caught.value).startswith("error: ")  # to stderr, with exit status 1
        return str(caught.value).removeprefix("error: ")

    return main


@pytest.fixture
def yaml_file(tmp_path) -> Callable[[str | bytes], str]:
    """Writes a YAML file and returns the flag that reads it."""
    numbers = itertools.count()

    def written(content: str | bytes) -> str:
        path = tmp_path / f"{next(numbers)}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"--config={path}"

    return written


@pytest.fixture
def usage_error(capsys) -> Callable[..., str]:
    """The error message of a command line that the parser must refuse."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse_arguments(arguments)
        assert caught.value.code == 2
        usage, _, message = capsys.readouterr().err.partition("\nerror: ")
        assert usage.startswith("usage: python -m srpkd.train")
        return message.strip()

    return refused


@pytest.fixture(scope="session")
def unpaired(tmp_path_factory) -> Path:
    """A folder of unpaired image files."""
    return write_synthetic(tmp_path_factory.mktemp("images") / "wheat2maize", 5, 2, 20, layout="unaligned")


@pytest.fixture(scope="session")
def oblong(tmp_path_factory) -> Path:
    """Unpaired images of 40 x 24 pixels (H x W) in A and 36 x 48 in B, and pairs of 36 x 48 each."""
    root = tmp_path_factory.mktemp("oblong")
    sizes = {"trainA": (24, 40), "testA": (24, 40), "trainB": (48, 36), "testB": (48, 36), "train": (96, 36)}
    for name, (width, height) in sizes.items():
        (root / name).mkdir()
        for index in range(2):
            Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()).save(
                root / name / f"{index}.png"
            )
    return root


@pytest.fixture(scope="session")
def pix2pix(tmp_path_factory) -> Run:
    """A finished run of pix2pix with a teacher, three variants and two seeds."""
    cwd = tmp_path_factory.mktemp("pix2pix")
    return as_run(command(*PIX2PIX, *TEACHER, "--seeds=2", f"--variants={VARIANTS}", "--name=tiny", cwd=cwd), cwd)


@pytest.fixture(scope="session")
def cycle_gan(tmp_path_factory, unpaired) -> Run:
    """A finished run of CycleGAN with a teacher, two variants and two seeds."""
    cwd = tmp_path_factory.mktemp("cycle_gan")
    arguments = [*CYCLE_GAN, *TINY, *TEACHER, "--seeds=2", "--variants={a: {lambda_srp: 0}, b: {}}", "--num_threads=1"]
    return as_run(command("--dataroot", str(unpaired), *arguments, cwd=cwd), cwd)


@pytest.fixture
def run_dir(tmp_path) -> Iterator[RunDir]:
    folder = RunDir(new_folder(str(tmp_path), "run"))
    yield folder
    folder.close()
