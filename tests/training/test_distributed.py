"""Training in two processes, as torchrun starts them, compared with one."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_weights

from srpkd import train
from srpkd.data.synthetic import write_synthetic
from srpkd.models.checkpoints import load_weights
from srpkd.training import distributed
from srpkd.training.config import parse_arguments
from srpkd.training.folder_lock import FolderLock
from srpkd.training.resume import load_state

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


TESTS = Path(__file__).parents[1]


def launch(cwd: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run `python arguments` in a number of processes, which can import srpkd and the modules of the tests."""
    launcher = []
    if processes > 1:
        where = ["--standalone", "--local_addr=127.0.0.1"]  # at a free port
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where]
    path = [TESTS.parent, TESTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module", params=ARGUMENTS)
def runs(request, server, tmp_path_factory) -> tuple[str, Path, Path]:
    """A model, the folder of a run in one process, and that of a run in two with the same global batches."""
    cwd = tmp_path_factory.mktemp(request.param)
    write_synthetic(cwd / "images", 8, 2, 20, layout="unaligned")
    for processes in (1, 2):
        code = server([*ARGUMENTS[request.param], *TINY, f"--name=of{processes}"], cwd, processes=processes)
        assert code == 0, (cwd / "log").read_text("utf-8")
    return request.param, cwd / "runs/of1", cwd / "runs/of2"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.core(1)
def test_two_processes_train_like_one(runs):
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
            if expected[key].ndim == 4:  # a bias before a norm has only rounding errors for a gradient
                torch.testing.assert_close(found[key], expected[key], rtol=1e-2, atol=1e-4)


def test_only_rank_0_writes_and_prints(runs):
    _, one, two = runs
    assert sorted(p.relative_to(one) for p in one.rglob("*")) == sorted(p.relative_to(two) for p in two.rglob("*"))
    assert sorted(path.name for path in two.parent.glob("of*")) == ["of1", "of2"]
    output = (two.parent.parent / "log").read_text("utf-8")
    assert output.count(f"writing to {Path(*two.parts[-2:])}\n") == 1
    assert output.count(f"report: {Path(*two.parts[-2:])}/index.html") == 1


@pytest.mark.core(1)
def test_an_error_of_one_rank_is_raised_on_all(server, runs):
    """Before training starts, without the traceback of a rank that waited for the others."""
    _, _, two = runs
    cwd, before = two.parent.parent, (two.parent.parent / "log").read_text("utf-8")
    lock = FolderLock(two)
    assert server([f"--resume={two.name}", "--n_epochs=2"], cwd, processes=2) == 1
    lock.close()
    new = [*ARGUMENTS["pix2pix"], *TINY, "--runs_dir=log"]
    assert server(new, cwd, processes=2) == 1
    output = (cwd / "log").read_text("utf-8").removeprefix(before)
    for message in (f"{Path(*two.parts[-2:])}: another process is training this run", "runs_dir log: this folder"):
        assert output.count(f"error: {message}") + output.count(f"error: rank 0: {message}") == 1
    assert "Traceback" not in output


def test_all_ranks_distil_from_the_teacher_that_was_saved(server, tmp_path):
    """Its batch norms have other running statistics on each rank; a resumed run reads the file of rank 0."""
    arguments = [*ARGUMENTS["pix2pix"], *TINY, "--norm=batch", "--epoch_steps=1"]
    in_first_step_of_student = "interrupt step", 3
    for given, stop, code in (
        ([*arguments, "--name=whole"], None, 0),
        ([*arguments, "--name=resumed"], in_first_step_of_student, 128 + signal.SIGINT),
        (["--resume=resumed"], None, 0),
    ):
        assert server(given, tmp_path, stop, processes=2) == code, (tmp_path / "log").read_text("utf-8")
    whole, resumed = (lines(tmp_path / "runs" / name) for name in ("whole", "resumed"))
    assert [line | {"seconds": 0} for line in resumed] == [line | {"seconds": 0} for line in whole]


@pytest.mark.slow
@pytest.mark.core(0)
@pytest.mark.parametrize("runs", ["pix2pix"], indirect=True)
def test_torchrun(runs):
    model, _, two = runs
    done = launch(two.parent.parent, "-m", "srpkd.train", *ARGUMENTS[model], *TINY, "--name=torchrun", processes=2)
    assert done.returncode == 0, done.stderr
    timeless = [[{**line, "seconds": 0} for line in lines(run)] for run in (two, two.with_name("torchrun"))]
    assert timeless[0] == timeless[1]


def test_the_batch_size_must_be_a_multiple_of_the_world_size(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS["pix2pix"], *TINY])
    assert (
        "batch_size=4 is not divisible by the number of processes, 3: use --batch_size 3 or" in capsys.readouterr().err
    )
    assert parse_arguments([*ARGUMENTS["pix2pix"], *TINY, "--batch_size=6"]).batch_size == 6


@pytest.mark.parametrize("setting", ["", "0", "-2", "two"])
def test_a_world_size_that_is_no_number_of_processes(monkeypatch, setting):
    monkeypatch.setenv("WORLD_SIZE", setting)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{setting}': expected the number of processes, which"):
        distributed.launched_world_size()


def test_processes_that_cannot_connect(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"^error: the 2 processes of WORLD_SIZE cannot connect \(.* variable RANK .*\)"
    with pytest.raises(SystemExit, match=f"{message}: start them with torchrun, or unset"):
        train.main([*ARGUMENTS["pix2pix"], *TINY])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "started by torchrun")
    with pytest.raises(SystemExit, match=f"{message}$"):
        train.main([*ARGUMENTS["pix2pix"], *TINY])


# programs that launch() runs; its PYTHONPATH makes gloo_threads and small importable
PAIR = """
import math, torch
from gloo_threads import gloo_threads
from small import SMALL, images
from srpkd.training import distributed, loop
from srpkd.training.options import TrainConfig


def make_next_output_nan(network):
    def hook(module, inputs, output):
        handle.remove()
        return output.index_fill(0, torch.tensor([1]), math.nan)

    handle = network.register_forward_hook(hook)


def test_collectives():
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.broadcast_object(f"of {rank}") == "of 0"
    assert distributed.all_gather_object(rank) == [0, 1]
    for on_0 in (True, False):
        for on_1 in (True, False):
            found = distributed.all_reduce_and(torch.tensor((on_0, on_1)[rank]))
            assert found.item() == (on_0 and on_1)


def test_steps(model):
    # a loss that is not finite on one rank makes both ranks skip the step
    config = TrainConfig(**SMALL | {"model": model, "norm": "batch", "ngf": 2, "ndf": 2, "lr": 0.01}).resolved()
    objective = loop.make_objective(config, 0, {})
    objective.step(images())
    before = [p.clone() for net in objective.networks.values() for p in net.parameters()]
    if distributed.rank() == 1:
        make_next_output_nan(objective.networks[next(iter(objective.generators))])
    objective.step(images())
    objective.find_nonfinite()
    after = [p for net in objective.networks.values() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert objective.optimizers.skipped == 1
    assert objective.optimizers.nonfinite_loss == {"pix2pix": "D_fake", "cycle_gan": "G_A"}[model]
    torch.manual_seed(distributed.rank())
    for _ in range(2):
        objective.step(images())
    weights = torch.cat([p.detach().flatten() for net in objective.networks.values() for p in net.parameters()])
    assert weights.isfinite().all()
    one, other = distributed.all_gather_object(weights)
    assert torch.equal(one, other)
    objective.cycle = objective  # a reference cycle, as hooks make: only the garbage collector frees it


with distributed.process_group(torch.device("cpu")):
    test_collectives()
    test_steps("pix2pix")
    test_steps("cycle_gan")
    assert gloo_threads()
assert not gloo_threads(), gloo_threads()
print("fine")
"""


@pytest.mark.slow
def test_collectives_and_steps_of_two_ranks(tmp_path):
    program = tmp_path / "pair.py"
    program.write_text(PAIR)
    done = launch(tmp_path, str(program), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


FAILS = """
import sys
from fork_server import KILL_POINTS
from gloo_threads import gloo_threads
from srpkd import train

KILL_POINTS["fail on rank 1"](3)
try:
    train.main(sys.argv[1:])
finally:
    assert not gloo_threads(), gloo_threads()
"""
HOW_TO_RESUME = "stopped; resume with: torchrun --nproc_per_node=2 -m srpkd.train --resume runs/experiment\n"


@pytest.mark.slow
@pytest.mark.core(0)
def test_a_failed_run_leaves_no_threads_and_torchrun_repeats_its_message(tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    done = launch(tmp_path, str(program), *ARGUMENTS["pix2pix"], *TINY, processes=2)
    assert done.returncode == 1
    ours, _, torchrun = done.stderr.partition("torch/distributed/elastic")
    assert ours.count("error: a damaged image\n") == 1, done.stderr
    assert not [word for word in ("Traceback", "gloo", "AssertionError") if word in ours], done.stderr
    assert "error: a damaged image" in torchrun.partition("Root Cause")[2], done.stderr
    assert done.stdout.count(HOW_TO_RESUME) == 1, done.stdout


@pytest.mark.parametrize(
    ("point", "message", "tracebacks"),
    [
        ("fail", "error: a damaged image\n", 0),
        ("crash", "ZeroDivisionError: a bug\n", 1),
        ("kill", "another process of this run was killed or crashed", 0),
    ],
)
@pytest.mark.core(1)
def test_only_the_process_that_fails_shows_its_message(server, tmp_path, point, message, tracebacks):
    assert server([*ARGUMENTS["pix2pix"], *TINY], tmp_path, (f"{point} on rank 1", 3), processes=2) == 1
    output = (tmp_path / "log").read_text("utf-8")
    assert (output.count(message), output.count("Traceback")) == (1, tracebacks), output
    assert output.count(HOW_TO_RESUME) == 1 and ("gloo" in output) == (point == "kill"), output


@pytest.mark.slow
@pytest.mark.core(0)
def test_resumed_processes_continue_bit_identically(server, runs):
    """Each process has its own image pools and random state. A signal that one of them receives stops all."""
    model, _, expected = runs
    cwd = expected.parent.parent
    arguments = [*ARGUMENTS[model], *TINY, "--name=killed", "--save_latest_freq=2"]
    assert server(arguments, cwd, ("interrupt on rank 1", 4), processes=2) == 128 + signal.SIGINT
    assert load_state(cwd / "runs/killed")["training"][1]["step"] == 4
    assert server(["--resume=killed"], cwd, ("step", 6), processes=2) == -signal.SIGKILL
    assert server(["--resume=killed"], cwd) == 1
    message = "the number of processes is 1 and was 2: resume with torchrun --nproc_per_node=2 -m srpkd.train --resume"
    assert message in (cwd / "log").read_text("utf-8")
    assert server(["--resume=killed"], cwd, processes=2) == 0, (cwd / "log").read_text("utf-8")
    assert_same_weights(expected, cwd / "runs/killed")
    # the state of a finished stage is that of as many processes
    (cwd / "log").unlink()
    assert server(["--resume=killed", "--n_epochs=4"], cwd) == 1
    assert message in (cwd / "log").read_text("utf-8")
    assert server(["--resume=killed", "--n_epochs=4"], cwd, processes=2) == 0, (cwd / "log").read_text("utf-8")
