import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from runs import PIX2PIX, TEACHER

from srpkd import train
from srpkd.files import WriteError
from srpkd.training.config import parse_arguments
from srpkd.training.loggers import TensorBoard, import_loggers

ARGUMENTS = [*PIX2PIX, *TEACHER, "--epoch_steps=4", "--n_epochs_decay=0", "--print_freq=2"]
PAGES = "srpkd.training.run_dir.write_report"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Path]:
    """A function that trains and returns the run's folder; `page` gets report.json whenever the page is updated."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str, name: str = "run", page: Callable[[dict[str, Any]], None] = lambda report: None) -> Path:
        monkeypatch.setattr(PAGES, lambda folder, _: page(json.loads((folder / "report.json").read_text("utf-8"))))
        train.main([*ARGUMENTS, *arguments, f"--name={name}"])
        return tmp_path / "runs" / name

    return main


def logged(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(stage, step, values) of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(line.pop("stage"), line.pop("step"), {k: v for k, v in line.items() if k != "seconds"}) for line in lines]


def test_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("--tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = {
        (f"{stage}/{name}", step): value for stage, step, values in logged(folder) for name, value in values.items()
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_tensorboard_on_a_full_disk(tmp_path):
    """Its own message has no path."""

    class Writer:
        def __init__(self, folder: str) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    board = TensorBoard(SimpleNamespace(SummaryWriter=Writer), tmp_path)
    with pytest.raises(WriteError, match=r"tensorboard cannot be written: No space left on device; make room"):
        board.log("teacher", 1, {"loss": 0.5})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_receive_the_values_of_metrics_jsonl(run, monkeypatch, name):
    """With a fake package: the real one would ask for an account."""
    calls: list[Any] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(log=calls.append, finish=lambda: calls.append("finished"))

    package = ModuleType(name)
    package.init = init
    monkeypatch.setitem(sys.modules, name, package)
    folder = run(f"--{name}")
    options, *values, end = calls
    assert (options["project"], options["name"], options["config"]["ngf"], end) == ("srpkd", "run", 2, "finished")
    assert values == [
        {f"{stage}/step": step} | {f"{stage}/{key}": value for key, value in line.items()}
        for stage, step, line in logged(folder)
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_package_is_reported_before_training(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    assert import_loggers(parse_arguments(ARGUMENTS)) == {}
    with pytest.raises(SystemExit, match=rf"--{name} needs .*{name}.*: pip install \"srpkd\[{name}\]\""):
        train.main([*ARGUMENTS, f"--{name}"])
    assert not list(tmp_path.iterdir())


def test_page_is_updated_during_training(run):
    pages: list[tuple[int, list[str], list[str]]] = []

    def page(report: dict[str, Any]) -> None:
        [sample] = report["samples"] or [{"images": []}]
        rows = [row["name"] for row in report["table"]["rows"]]
        pages.append((len(logged(Path("runs/run"))), [entry["label"] for entry in sample["images"]], rows))

    run("--update_html_freq=2", page=page)
    assert pages == [
        (2, ["input", "teacher", "truth"], []),  # the teacher at step 2, of 4
        (4, ["input", "teacher", "truth"], ["teacher"]),
        (6, ["input", "student", "teacher", "truth"], ["teacher"]),
        (8, ["input", "teacher", "student", "truth"], ["teacher", "student"]),
    ]


def test_page_updates_do_not_change_training(run):
    options = ["--no_dropout=false", "--norm=batch", "--ema=0.9", "--print_freq=1"]
    often, never = (logged(run(*options, f"--update_html_freq={freq}", name=f"run{freq}")) for freq in (1, 9))
    assert often == never


def test_progress_bar_shows_losses_and_images_per_second(run, capsys):
    run("--batch_size=2")
    bar = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "4/4" in bar and "img/s=" in bar and "G_L1=" in bar and "kd=" in bar and "D_real=" in bar


@pytest.mark.parametrize(("batch_size", "images"), [(2, 2), (16, 8)])
def test_images_per_second_of_the_batches_that_were_used(run, capsys, monkeypatch, batch_size, images):
    """A batch has at most as many images as the data: here 8."""
    monkeypatch.setattr("srpkd.training.loop._StepTimer.lap", lambda timer, step: 0.5)
    run(f"--batch_size={batch_size}")
    assert f"img/s={images / 0.5:.3g}," in capsys.readouterr().err.rsplit("\r", 1)[-1]
