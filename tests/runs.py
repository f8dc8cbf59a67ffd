"""Training runs so small that each takes a second or two, and what they print and write."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from srpkd.models.checkpoints import load_weights
from srpkd.models.networks import define_generator
from srpkd.training.config import parse_arguments
from srpkd.training.loop import Stage
from srpkd.training.options import ResolvedConfig
from srpkd.training.run_dir import RunDir

SIZE = 16  # side of an image in pixels
TINY = shlex.split(
    "--netG resnet_1blocks --ngf 2 --ndf 2 --netD n_layers --n_layers_D 1 --norm instance --no_dropout "
    "--epoch_steps 3 --n_epochs 1 --n_epochs_decay 1 --print_freq 1 --samples 1 --num_threads 0 --device cpu"
)
SYNTHETIC = [
    *shlex.split(f"--dataroot :synthetic: --synthetic_size {SIZE} --synthetic_pairs 8 --synthetic_test_pairs 3"),
    *TINY,
]
PIX2PIX = ["--model", "pix2pix", *SYNTHETIC]
CYCLE_GAN = ["--model=cycle_gan", "--load_size=18", f"--crop_size={SIZE}"]
TEACHER = ["--teacher_netG=resnet_2blocks", "--teacher_ngf=3"]


class Run(NamedTuple):
    """A finished run: its folder, and what it printed."""

    folder: Path
    output: str = ""

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text("utf-8"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.report["table"]["rows"]}

    def logged(self, stage: str, name: str) -> list[float]:
        return [line[name] for line in self.metrics if line["stage"] == stage and name in line]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run the command line in a process, with one thread like the runs in the tests' process."""
    arguments = (sys.executable, "-m", "srpkd.train", *arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def as_run(done: subprocess.CompletedProcess, cwd: Path) -> Run:
    assert done.returncode == 0, done.stderr
    return Run(cwd / report_folder(done.stdout), done.stdout)


def report_folder(output: str) -> str:
    """Return the folder of the report that a run printed."""
    [path] = re.findall(r"^report: (.*)/index\.html$", output, re.MULTILINE)
    return path


def config_of(*arguments: str) -> ResolvedConfig:
    return parse_arguments([*PIX2PIX, *arguments])


def stage_of(config: ResolvedConfig, run_dir: RunDir, seed: int = 0) -> Stage:
    return Stage("student", config, seed, run_dir.folder)


def teacher_of(ngf: int = 3, **others: Any) -> dict[str, nn.Module]:
    """Return a random teacher for pix2pix."""
    torch.manual_seed(7)
    return {"G": define_generator("resnet_2blocks", ngf=ngf, init_gain=0.2, **others).eval().requires_grad_(False)}


def assert_same_weights(one: Path, other: Path) -> None:
    """The folders of two runs have the same files of weights, bit by bit."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.pth"))
    assert files and files == sorted(path.relative_to(other) for path in other.rglob("*.pth"))
    for file in files:
        first, second = load_weights(one / file), load_weights(other / file)
        assert all(torch.equal(first[key], second[key]) for key in first), file
