"""Two processes, as torchrun starts them, against one."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import serving

from srpkd.data.folders import DataError
from srpkd.data.synthetic import generate_scenes, open_synthetic, write_synthetic
from srpkd.models.checkpoints import load_weights
from srpkd.training.config import parse_arguments
from srpkd.training.datasets import make_loader
from srpkd.training.options import TrainConfig

TINY = shlex.split(
    "--netG resnet_1blocks --ngf 2 --ndf 2 --netD n_layers --n_layers_D 1 --norm instance --no_dropout "
    "--teacher_netG=resnet_2blocks --teacher_ngf=3 --epoch_steps 3 --n_epochs 1 --n_epochs_decay 1 --print_freq 1 "
    "--samples 1 --device cpu --batch_size 4 --lambda_feature 1 --ema 0.9 --init_gain 0.2 --clip_grad_norm 5"
)
ARGUMENTS = {
    "pix2pix": [
        "--model=pix2pix",
        "--dataroot=:synthetic:",
        "--synthetic_size=16",
        "--synthetic_pairs=12",
        "--synthetic_test_pairs=2",
    ],
    "cycle_gan": [
        "--model=cycle_gan",
        "--dataroot=images",
        "--load_size=20",
        "--crop_size=16",
        "--num_threads=1",
        "--scope=global",
    ],
}


def launch(cwd: Path, *arguments: str, processes: int = 1, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python arguments` in so many processes on this machine."""
    launcher = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[..., int]]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module", params=ARGUMENTS)
def runs(request, server, tmp_path_factory) -> tuple[str, Path, Path]:
    """A model, and the folders of one process's run, and of two processes' on the same global batches."""
    cwd = tmp_path_factory.mktemp(request.param)
    write_synthetic(cwd / "images", 8, 2, 20, layout="unaligned")
    for processes in (1, 2):
        code = server([*ARGUMENTS[request.param], *TINY, f"--name=of{processes}"], cwd, processes=processes)
        assert code == 0, (cwd / "log").read_text()
    return request.param, cwd / "runs/of1", cwd / "runs/of2"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does(runs):
    _, one, two = runs
    ours, theirs = lines(one), lines(two)
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage", "seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["stage"], a["step"], name)
    files = sorted(path.relative_to(one) for path in one.rglob("*.pth"))
    for file in files:
        expected, found = load_weights(one / file), load_weights(two / file)
        for key in expected:
            if expected[key].ndim == 4:  # a bias before a norm follows rounding alone
                torch.testing.assert_close(found[key], expected[key], rtol=1e-2, atol=1e-4)


def test_one_of_them_writes_and_prints(runs):
    _, one, two = runs
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(two) for p in two.rglob("*"))
    assert sorted(path.name for path in two.parent.glob("of*")) == ["of1", "of2"]
    output = (two.parent.parent / "log").read_text()
    assert output.count(f"writing to {Path(*two.parts[-2:])}\n") == 1
    assert output.count(f"report: {Path(*two.parts[-2:])}/index.html") == 1


def test_torchrun_starts_them(runs):
    model, _, two = runs
    if model == "cycle_gan":
        pytest.skip("one model is enough")
    done = launch(two.parent.parent, "-m", "srpkd.train", *ARGUMENTS[model], *TINY, "--name=torchrun", processes=2)
    assert done.returncode == 0, done.stderr
    timeless = [[{**line, "seconds": 0} for line in lines(run)] for run in (two, two.with_name("torchrun"))]
    assert timeless[0] == timeless[1]


def test_images_too_few_to_be_shared_out_evenly(monkeypatch):
    monkeypatch.setattr("srpkd.training.distributed.ranks", lambda: 2)
    config = TrainConfig(dataroot=":synthetic:", batch_size=4)
    with pytest.raises(DataError, match="3 images cannot be shared out evenly to 2 processes: use fewer"):
        make_loader(open_synthetic(generate_scenes(3, 16)), config, seed=0)


def test_a_batch_has_to_be_shared_out_evenly(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS["pix2pix"], *TINY])
    assert (
        "batch_size=4 cannot be shared out evenly to 3 processes: --batch_size 3, or a mul" in capsys.readouterr().err
    )
    assert parse_arguments([*ARGUMENTS["pix2pix"], *TINY, "--batch_size=6"]).batch_size == 6


def threads() -> list[str]:
    """Gloo's in this process: one that lives on while Python ends may abort it."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


# A program of its own: what two processes do beside each other
PAIR = """
import math, torch
from srpkd import fit, parallel
from test_parallel import threads
from test_updates import images, options, spoil


def tell():
    assert parallel.ranks() == 2
    assert parallel.share("of 0" if parallel.rank() == 0 else "of 1") == "of 0"
    assert parallel.gather(parallel.rank()) == [0, 1]
    for here in (True, False):
        for there in (True, False):
            mine = here if parallel.rank() == 0 else there
            assert parallel.all_reduce_and(torch.tensor(mine)).item() == (here and there)


def step(model):
    # a loss that is not finite in one process leaves the step out in both
    objective = fit.make_objective(options(model, batch_size=2, norm="batch"), 0, {})
    objective.step(images())
    before = [p.clone() for net in objective.networks.values() for p in net.parameters()]
    if parallel.rank() == 1:
        spoil(objective, next(iter(objective.generators)), math.nan)
    objective.step(images())
    after = [p for net in objective.networks.values() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert objective.optimizers.skipped == 1
    assert objective.optimizers.nonfinite_loss == {"pix2pix": "D_fake", "cycle_gan": "G_A"}[model]
    torch.manual_seed(parallel.rank())
    for _ in range(2):
        objective.step(images())
    weights = torch.cat([p.detach().flatten() for net in objective.networks.values() for p in net.parameters()])
    assert weights.isfinite().all()
    one, other = parallel.gather(weights)
    assert torch.equal(one, other)
    objective.itself = objective  # a cycle, such as hooks make: it has to be looked for


with parallel.processes(torch.device("cpu")):
    tell()
    step("pix2pix")
    step("cycle_gan")
    assert threads()
assert not threads(), threads()
print("fine")
"""


def test_what_they_tell_each_other(tmp_path):
    program = tmp_path / "pair.py"
    program.write_text(PAIR)
    done = launch(tmp_path, str(program), processes=2, path=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


# A program of its own: a run that fails
FAILS = """
import sys
from srpkd import objectives, train
from srpkd.data import DataError
from test_parallel import threads

def step(objective, batch):
    assert threads()
    raise DataError("an image that is none")

objectives.Pix2Pix.step = step
try:
    train.main(sys.argv[1:])
except SystemExit as end:
    assert str(end) == "error: an image that is none", end
    assert not threads(), threads()
print("fine")
"""


def test_a_run_that_fails_leaves_no_threads(tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    done = launch(tmp_path, str(program), *ARGUMENTS["pix2pix"], *TINY, processes=2, path=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


def test_both_go_on_with_what_each_had(server, runs):
    """Pools and random numbers are each process's own."""
    model, _, expected = runs
    cwd = expected.parent.parent
    arguments = [*ARGUMENTS[model], *TINY, "--name=killed", "--save_latest_freq=2"]
    assert server(arguments, cwd, ("step", 10), processes=2) == -signal.SIGKILL
    assert server(["--resume=killed"], cwd) == 1
    message = "this run had 2 processes, and now 1: go on with torchrun --nproc_per_node=2"
    assert message in (cwd / "log").read_text()
    assert server(["--resume=killed"], cwd, processes=2) == 0, (cwd / "log").read_text()
    for file in expected.rglob("*.pth"):
        ours, theirs = load_weights(file), load_weights(cwd / "runs/killed" / file.relative_to(expected))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file
