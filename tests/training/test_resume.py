import errno
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from resumable_runs import ARGUMENTS, outcome
from small_generators import errors_of_the_system

from srpkd.data.synthetic import write_synthetic
from srpkd.files import WriteError
from srpkd.models.checkpoints import CheckpointError
from srpkd.training import resume
from srpkd.training.config import parse_arguments
from srpkd.training.resume import (
    NAMES,
    load_state,
    random_state,
    remove_older_states,
    remove_state,
    resume_command,
    save_state,
    seed_everything,
    set_random_state,
)

Server = Callable[..., int]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_synthetic(folder / "images", 5, 1, 24, layout="unaligned")
    return folder


@pytest.fixture(scope="module")
def undisturbed(server, root) -> Callable[[str], Path]:
    """A function that returns the folder of a model's uninterrupted run."""

    def done(model: str) -> Path:
        cwd = root / f"undisturbed {model}"
        if not cwd.exists():
            cwd.mkdir()
            assert server(ARGUMENTS[model], cwd) == 0, (cwd / "log").read_text("utf-8")
        return cwd / "runs/run"

    return done


def assert_equal(run: Path, other: Path) -> None:
    found, expected = outcome(run), outcome(other)
    for name, weights in expected.pop("weights").items():
        theirs = found["weights"].pop(name)
        assert theirs.keys() == weights.keys()
        assert all(torch.equal(theirs[key], weights[key]) for key in weights), name
    assert not found.pop("weights")
    assert found == expected


@pytest.mark.parametrize("model", ARGUMENTS)
@pytest.mark.core(0)
def test_two_runs_are_bit_identical(server, undisturbed, root, model):
    """Weights, metrics and images are bit-identical in another process."""
    cwd = root / f"again {model}"
    cwd.mkdir()
    assert server(ARGUMENTS[model], cwd) == 0, (cwd / "log").read_text("utf-8")
    assert_equal(cwd / "runs/run", undisturbed(model))


KILLS = {
    "pix2pix": [
        [("step", 1)],
        [("step", 4)],
        [("step", 7)],
        [("step", 10)],  # in the first variant, after its first state
        [("save", 3)],  # the teacher's second state
        [("save", 5)],  # the teacher's weights
        [("rename", 2)],  # the older of two states is renamed, the newer is not
        [("rename", 5)],
        [("evaluate", 1)],
        [("step", 3), ("step", 3), ("save", 2), ("rename", 3), ("step", 2)],
    ],
    "cycle_gan": [[("step", 9), ("save", 2)], [("step", 12)]],
}


@pytest.mark.parametrize(
    ("model", "kills"),
    [(model, kills) for model, cases in KILLS.items() for kills in cases],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{way}{number}" for way, number in value),
)
@pytest.mark.core(2)
def test_killed_and_resumed_run_is_bit_identical(server, undisturbed, root, model, kills):
    expected = undisturbed(model)
    cwd = root / f"{model} {kills}"
    cwd.mkdir()
    arguments = ARGUMENTS[model]
    for kill in kills:
        assert server(arguments, cwd, kill) == -signal.SIGKILL, (cwd / "log").read_text("utf-8")
        arguments = ["--resume=run"]
    assert server(arguments, cwd) == 0, (cwd / "log").read_text("utf-8")
    assert_equal(cwd / "runs/run", expected)


@pytest.mark.parametrize(
    ("model", "stops"),
    [
        # in the second and the last step of the teacher, and in its evaluation
        ("pix2pix", [("interrupt step", 2), ("interrupt step", 4), ("interrupt evaluate", 1)]),
        ("cycle_gan", [("interrupt step", 3)]),
    ],
)
@pytest.mark.core(1)
def test_stopped_and_resumed_run_is_bit_identical(server, undisturbed, root, model, stops):
    """A signal lets the run finish its step and save its state."""
    expected = undisturbed(model)
    cwd = root / f"stopped {model}"
    cwd.mkdir()
    arguments = ARGUMENTS[model]
    for stop in stops:
        (cwd / "log").unlink(missing_ok=True)
        assert server(arguments, cwd, stop) == 128 + signal.SIGINT, (cwd / "log").read_text("utf-8")
        output = (cwd / "log").read_text("utf-8")
        assert "\nstopping after this step" in output and "Traceback" not in output
        assert output.endswith("stopped; resume with: python -m srpkd.train --resume runs/run\n")
        metrics = (cwd / "runs/run/metrics.jsonl").read_bytes()
        if stop[0] == "interrupt step":
            assert load_state(cwd / "runs/run")["record"]["metrics_bytes"] == len(metrics)  # nothing is computed again
        arguments = ["--resume=run"]
    assert server(arguments, cwd) == 0, (cwd / "log").read_text("utf-8")
    assert_equal(cwd / "runs/run", expected)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.core(1)
def test_damaged_state_is_skipped(server, undisturbed, root, damage):
    cwd = root / f"damaged {damage}"
    cwd.mkdir()
    assert server(ARGUMENTS["pix2pix"], cwd, ("step", 12)) == -signal.SIGKILL
    newest = cwd / "runs/run/state.pt"
    content = newest.read_bytes()
    middle = len(content) // 2
    # enough bytes that some are not padding
    flipped = content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 256]) + content[middle + 256 :]
    newest.write_bytes({"cut": content[:middle], "flipped": flipped}[damage])
    assert server(["--resume", "runs/run"], cwd) == 0
    assert "state.pt is damaged" in (cwd / "log").read_text("utf-8")
    assert "resuming from state.previous.pt" in (cwd / "log").read_text("utf-8")
    assert_equal(cwd / "runs/run", undisturbed("pix2pix"))


def test_reasons_why_a_run_cannot_be_resumed(server, root):
    cwd = root / "refused"
    cwd.mkdir()

    def refusal(*arguments: str) -> str:
        (cwd / "log").unlink(missing_ok=True)
        assert server(list(arguments), cwd) == 1
        return (cwd / "log").read_text("utf-8")

    assert server(ARGUMENTS["pix2pix"], cwd, ("step", 5)) == -signal.SIGKILL
    assert "--resume rum: expected the path of a run or the name of one in runs, which contains run" in refusal(
        "--resume=rum"
    )
    assert "--resume keeps the options of the run: remove --lr, --preset" in refusal(
        "--resume=run", "--lr=1", "--preset=demo"
    )
    before = {path: path.read_bytes() for path in cwd.rglob("runs/**/*") if path.is_file()}
    config = cwd / "runs/run/config.yaml"
    config.write_text(config.read_text("utf-8").replace("lr: 0.01", "lr: 0.02"))
    assert "lr is 0.02 and was 0.01: a resumed run must keep its options" in refusal("--resume=run")
    config.write_text(config.read_text("utf-8").replace("lr: 0.02", "lr: 0.01"))
    for name in NAMES:
        if (cwd / "runs/run" / name).exists():
            (cwd / "runs/run" / name).write_bytes(b"PK")
    assert "no state to resume from, start a new run" in refusal("--resume=run")
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= set(NAMES)  # no other file changed
    (cwd / "runs/run/state.pt").unlink()
    (cwd / "runs/run/state.previous.pt").unlink()
    assert "has no state.pt to resume from: the run has finished and did not keep its state" in refusal("--resume=run")


@pytest.mark.core(0)
def test_options_that_may_change_on_resume(server, undisturbed, root):
    cwd = root / "changed"
    cwd.mkdir()
    assert server(ARGUMENTS["cycle_gan"], cwd, ("step", 9)) == -signal.SIGKILL
    # the main process now loads the images, in the same order
    assert server(["--resume=run", "--num_threads=0", "--save_latest_freq=5", "--time_budget=9"], cwd) == 0
    assert_equal(cwd / "runs/run", undisturbed("cycle_gan"))


@pytest.mark.core(0)
def test_a_state_from_before_an_option_existed_takes_its_default(server, undisturbed, root):
    """Also of options whose default follows from other options, as that of gan_mode."""
    cwd = root / "older"
    cwd.mkdir()
    assert server(ARGUMENTS["cycle_gan"], cwd, ("step", 9)) == -signal.SIGKILL
    folder, new = cwd / "runs/run", ("rectify", "detach_norms", "gan_mode")
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    config = {name: value for name, value in config.items() if name not in new}
    for path in folder.glob("state*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"config": {name: state["config"][name] for name in config}}, path)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"rectify": True}))
    assert server(["--resume=run"], cwd) == 1
    assert "rectify is True and was False: a resumed run must keep its options" in (cwd / "log").read_text("utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert server(["--resume=run"], cwd) == 0, (cwd / "log").read_text("utf-8")
    (folder / "config.yaml").write_text((undisturbed("cycle_gan") / "config.yaml").read_text("utf-8"))
    assert_equal(folder, undisturbed("cycle_gan"))


def test_resume_reads_the_options_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere/x").mkdir(parents=True)
    (tmp_path / "elsewhere/x/config.yaml").write_text("{dataroot: d, ngf: 5, num_threads: 3}")
    for given in (["--resume", "x", "--runs_dir", "elsewhere"], ["--resume=elsewhere/x"]):
        config = parse_arguments([*given, "--num_threads=1"])
        assert (config.ngf, config.num_threads, config.resume) == (5, 1, "elsewhere/x")


# The state


def test_load_state_returns_what_was_saved(tmp_path):
    content = {"tensors": {"x": torch.rand(3), "i": torch.arange(2)}, "list": [(1, 2.5, None, "é", True)]}
    save_state(tmp_path, content)
    save_state(tmp_path, content | {"number": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "state.previous.pt"}
    found = load_state(tmp_path)
    assert found["number"] == 2 and found["list"] == content["list"]
    torch.testing.assert_close(found["tensors"], content["tensors"], rtol=0, atol=0)


@pytest.mark.parametrize("renamed", [1, 2])
def test_a_state_that_cannot_be_renamed(tmp_path, monkeypatch, renamed):
    """The newest of the two states is loaded, under either name."""
    save_state(tmp_path, {"number": 1})
    calls = []

    def refuse(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == renamed:
            raise PermissionError(errno.EACCES, "Access is denied")
        source.rename(target)

    monkeypatch.setattr(resume, "replace_file", refuse)
    with pytest.raises(WriteError, match=r"state\.pt cannot be written: Access is denied"):
        save_state(tmp_path, {"number": 2})
    assert load_state(tmp_path)["number"] == 2


def test_states_that_cannot_be_deleted(tmp_path, monkeypatch):
    """An older one does no harm in a finished run; with --no_keep_state, a message says it."""
    for number in (1, 2):
        save_state(tmp_path, {"number": number})

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    remove_older_states(tmp_path)
    assert load_state(tmp_path)["number"] == 2
    with pytest.raises(WriteError, match=f"{tmp_path} cannot be written: Access is denied"):
        remove_state(tmp_path)


def test_damage_that_raises_an_error_without_a_message(tmp_path, capsys):
    for number in (1, 2):
        save_state(tmp_path, {"number": number})
    content = bytearray((tmp_path / "state.pt").read_bytes())
    content[29] ^= 255  # the length of a header: the file ends before the data that follow it
    (tmp_path / "state.pt").write_bytes(content)
    assert load_state(tmp_path)["number"] == 1
    assert "state.pt is damaged (EOFError): resuming from state.previous.pt" in capsys.readouterr().err


@errors_of_the_system
def test_states_that_the_system_does_not_read(tmp_path, monkeypatch, error, reason):
    """They are not damaged: a new run would lose them."""
    save_state(tmp_path, {"number": 1})
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path)
    expected = f"{tmp_path}: state.pt cannot be read ({reason}): no state to resume from, make one of them readable"
    assert str(caught.value) == expected


def test_load_state_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"version": 1, "x": Evil()}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        load_state(tmp_path)


def test_unsupported_state_version(tmp_path):
    torch.save({"version": 0}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"unsupported state version 0 \(this srpkd reads 2\): resume with"):
        load_state(tmp_path)


def test_all_random_states_are_restored(tmp_path):
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()]

    seed_everything(3)
    draw()
    save_state(tmp_path, {"random": random_state()})
    expected = draw()
    set_random_state(load_state(tmp_path)["random"])
    assert draw() == expected
    seed_everything(3)
    assert draw() != expected


def test_the_command_to_resume_on_windows(monkeypatch):
    """cmd.exe takes single quotes as part of the path."""
    monkeypatch.setattr("srpkd.arguments.sys", SimpleNamespace(platform="win32"))
    command = "python -m srpkd.train --resume "
    assert resume_command(r"C:\runs\h2z", 1) == command + r"C:\runs\h2z"
    assert resume_command(r"C:\my runs\h2z", 1) == command + r'"C:\my runs\h2z"'
