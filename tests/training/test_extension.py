"""Finished and stopped runs that are resumed with a new number of epochs."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resumable_runs import ARGUMENTS, outcome
from runs import PIX2PIX, assert_same_weights

from srpkd.data.synthetic import write_synthetic
from srpkd.training.loop import make_objective
from srpkd.training.objectives import lr_factor
from srpkd.training.resume import load_final_state

Server = Callable[..., int]
SCHEDULE = ["--n_epochs_decay=0", "--teacher_n_epochs=1", "--teacher_n_epochs_decay=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    write_synthetic(folder / "images", 5, 1, 24, layout="unaligned")
    return folder


@pytest.fixture(scope="module")
def long_runs(server, root) -> dict[str, Path]:
    """Model -> folder of a run of three epochs."""
    for model, arguments in ARGUMENTS.items():
        cwd = root / f"long {model}"
        cwd.mkdir()
        assert server([*arguments, *SCHEDULE, "--n_epochs=3"], cwd) == 0, (cwd / "log").read_text("utf-8")
    return {model: root / f"long {model}" / "runs/run" for model in ARGUMENTS}


def assert_same_result(run: Path, other: Path) -> None:
    """Weights, images, table and options are equal; the metrics of the shorter run contain one more evaluation."""
    found, expected = outcome(run), outcome(other)
    assert found["listing"] == expected["listing"]
    for name, weights in expected["weights"].items():
        assert all(torch.equal(found["weights"][name][key], weights[key]) for key in weights), name
    for key in ("pictures", "table", "config"):
        assert found[key] == expected[key], key
    for line in expected["metrics"]:
        assert line in found["metrics"]
    assert found["rest"]["files"] == expected["rest"]["files"] and found["rest"]["status"] == "finished"


# in order: in the extension of the first or second stage, while files are written, before the run records its end
KILLS = {
    "pix2pix": [[], [("step", 1)], [("step", 6)], [("save", 1)], [("save", 4)], [("save", 8)], [("evaluate", 2)]],
    "cycle_gan": [[], [("step", 3), ("save", 3)]],
}


@pytest.mark.parametrize(
    ("model", "kills"),
    [(model, kills) for model, cases in KILLS.items() for kills in cases],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{way}{number}" for way, number in value),
)
@pytest.mark.core(1)
def test_extended_run_is_bit_identical_to_a_longer_one(server, long_runs, root, model, kills):
    cwd = root / f"{model} {kills}"
    cwd.mkdir()
    assert server([*ARGUMENTS[model], *SCHEDULE, "--n_epochs=1"], cwd) == 0, (cwd / "log").read_text("utf-8")
    arguments = ["--resume=run", "--n_epochs=3"]
    for kill in kills:
        assert server(arguments, cwd, kill) == -signal.SIGKILL, (cwd / "log").read_text("utf-8")
        arguments = ["--resume=run"]  # the run remembers its new number of epochs
    assert server(arguments, cwd) == 0, (cwd / "log").read_text("utf-8")
    assert_same_result(cwd / "runs/run", long_runs[model])


def test_a_stopped_run_is_extended_too(server, long_runs, root):
    cwd = root / "stopped"
    cwd.mkdir()
    # the first of two variants is done, the second is in training
    arguments = [*ARGUMENTS["pix2pix"], *SCHEDULE, "--n_epochs=2", "--save_latest_freq=1"]
    assert server(arguments, cwd, ("step", 9)) == -signal.SIGKILL, (cwd / "log").read_text("utf-8")
    assert server(["--resume=run", "--n_epochs=3", "--save_latest_freq=2"], cwd) == 0, (cwd / "log").read_text("utf-8")
    assert_same_weights(cwd / "runs/run", long_runs["pix2pix"])


TINY = [*PIX2PIX, "--name=run"]  # epochs of 3 steps: 1 at the full learning rate, 1 of decay


def rates(folder: Path) -> set[float]:
    state = load_final_state(folder)
    return {
        group["lr"]
        for optimizer in state["objective"]["updates"]["optimizers"].values()
        for group in optimizer["param_groups"]
    }


def test_the_learning_rate_follows_the_new_total(run, monkeypatch):
    seen: list[float] = []

    def recording(*arguments):
        objective = make_objective(*arguments)
        step = objective.step

        def recorded(batch):
            seen.append(float(objective.optimizers.by_group["G"].param_groups[0]["lr"]))
            return step(batch)

        objective.step = recorded
        return objective

    monkeypatch.setattr("srpkd.training.loop.make_objective", recording)
    done = run(*TINY)
    assert seen == pytest.approx([lr * 0.0002 for lr in (1, 1, 1, 0.5, 0.5, 0.5)]) and rates(done.folder) == {0.0}
    seen.clear()
    run("--resume=run", "--n_epochs=3", "--n_epochs_decay=2")
    assert seen == pytest.approx([0.0002 * lr_factor(epoch, 3, 2) for epoch in (3, 4, 5) for _ in range(3)])
    assert seen[0] == pytest.approx(0.0002)


def test_a_finished_run_says_how_to_extend_it(run):
    done = run(*TINY)
    before = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    for arguments, message in (
        ([], "the run has finished; to train it further, increase the epochs, now n_epochs=1 and n_epochs_decay=1: "),
        (["--num_threads=1"], "--resume runs/run --n_epochs 2"),
        (["--n_epochs=0"], "student has already trained 2 epochs, received n_epochs=0 and n_epochs_decay=1: their sum"),
        (["--n_epochs=2", "--n_epochs_decay=0"], "their sum must be above 2"),
    ):
        with pytest.raises(SystemExit) as caught:
            run("--resume=run", *arguments)
        assert message in str(caught.value)
    assert {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()} == before


def test_a_damaged_or_missing_final_state_is_refused(run):
    done = run(*TINY)
    final = done.folder / "final_state.pt"
    content = final.read_bytes()
    final.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r"final_state\.pt is damaged .*start a new run with --init_student \S+run"):
        run("--resume=run", "--n_epochs=2")
    final.unlink()
    with pytest.raises(SystemExit, match=r"has no final_state\.pt: the run did not keep .* --init_student \S+run"):
        run("--resume=run", "--n_epochs=2")
    final.write_bytes(content)
    run("--resume=run", "--n_epochs=2")


def test_state_that_is_kept(run):
    done = run(*TINY)
    assert {path.name for path in done.folder.rglob("*state*")} == {"state.pt", "final_state.pt"}
    run("--resume=run", "--n_epochs=2", "--no_keep_state")
    assert not list(done.folder.rglob("*state*"))
    assert "n_epochs: 2\n" in (done.folder / "config.yaml").read_text("utf-8")
    with pytest.raises(SystemExit, match="has finished and did not keep its state"):
        run("--resume=run", "--n_epochs=3")


def test_a_run_without_its_state(run):
    done = run(*TINY, "--no_keep_state")
    assert not list(done.folder.rglob("*state*"))


def test_variants_with_epochs_of_their_own(run):
    teacher = ["--teacher_netG=resnet_2blocks", "--teacher_ngf=3"]
    done = run(*TINY, *teacher, "--seeds=2", "--variants={a: {}, b: {n_epochs: 2, n_epochs_decay: 0}}")
    before = {path: path.read_bytes() for path in done.folder.rglob("*.pth")}
    run("--resume=run", "--n_epochs=2")
    changed = {path.parent.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"a-seed-0", "a-seed-1"}
    rows = json.loads((done.folder / "report.json").read_text("utf-8"))["table"]["rows"]
    assert sorted(row["name"] for row in rows) == ["a", "b", "teacher"]
    assert all(row["mIoU"]["n"] == 2 for row in rows if row["name"] != "teacher")
    steps = {(line["stage"], line["step"]) for line in done.metrics if "mIoU" in line}
    assert {("a seed 1", 6), ("a seed 1", 9), ("b seed 1", 6)} <= steps and ("b seed 1", 9) not in steps


def test_weights_of_a_warm_start_are_not_read_again(run):
    first = run(*PIX2PIX, "--name=first")
    second = run(*TINY, "--init_student", str(first.folder))
    for path in first.folder.glob("*.pth"):
        path.unlink()
    run("--resume=run", "--n_epochs=2")
    assert second.metrics[-1]["step"] == 9


def test_a_run_that_older_versions_stopped_can_be_resumed(server, root):
    cwd = root / "older"
    cwd.mkdir()
    arguments = [*TINY, "--save_latest_freq=1"]
    assert server(arguments, cwd, ("step", 3)) == -signal.SIGKILL
    path = cwd / "runs/run/state.pt"
    state = torch.load(path, weights_only=True)
    for name in ("extended", "finished"):
        del state[name]
    for name in ("init_student", "init_discriminator", "init_adapter", "no_keep_state"):
        del state["config"][name]
    torch.save(state, path)
    assert server(["--resume=run"], cwd) == 0, (cwd / "log").read_text("utf-8")
