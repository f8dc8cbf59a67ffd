"""Signals that stop a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from runs import CYCLE_GAN, PIX2PIX, TINY

from srpkd import train
from srpkd.data import batches
from srpkd.training import datasets, objectives, stop_signals
from srpkd.training.resume import load_state


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """SIGHUP, which nohup ignores, has its usual effect."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def in_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """Calls a function at the start of the training step with a number (from 1)."""

    def install(number: int, action: Callable[[], None]) -> None:
        for kind in (objectives.Pix2Pix, objectives.CycleGAN):
            numbers = iter(range(1, 1000))

            def step(self, batch, original=kind.step, numbers=numbers):
                if next(numbers) == number:
                    action()
                return original(self, batch)

            monkeypatch.setattr(kind, "step", step)

    return install


def test_ctrl_c_is_not_lost(run, in_step, tmp_path):
    """KeyboardInterrupt was, in the callback of a weak reference."""

    class Target:
        pass

    def interrupt() -> None:
        target = Target()
        callbacks.append(weakref.ref(target, lambda _: os.kill(os.getpid(), signal.SIGINT)))

    callbacks: list[weakref.ref] = []
    in_step(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(*PIX2PIX, "--name=run")
    assert load_state(tmp_path / "runs/run")["training"][1]["step"] == 2
    assert json.loads((tmp_path / "runs/run/report.json").read_text("utf-8"))["status"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_the_run_too(run, in_step, tmp_path, capsys, number):
    before = signal.getsignal(number)
    in_step(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        run(*PIX2PIX, "--name=run")
    assert stopped.value.code == 128 + number
    assert load_state(tmp_path / "runs/run")["training"][1]["step"] == 3
    assert capsys.readouterr().out.endswith("stopped; resume with: python -m srpkd.train --resume runs/run\n")
    assert signal.getsignal(number) == before


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals.handled(None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_signals.received()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_before_the_run_starts_ends_the_process_at_once(run, monkeypatch):
    monkeypatch.setattr(train, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    child = os.fork()
    if not child:
        try:
            train.main(PIX2PIX)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_second_signal_ends_the_process_at_once(tmp_path, monkeypatch):
    """But not one that follows the first immediately, as launchers send them. The folder's name may not be UTF-8."""
    output = tmp_path / "output"
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
            monkeypatch.setattr("sys.stderr", os.fdopen(2, "w"))
            with stop_signals.handled(lambda: "last words of r\udce9n"):
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                assert stop_signals.received() == signal.SIGINT
                monkeypatch.setattr(stop_signals, "REPEAT", 0)
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert output.read_text("utf-8") == f"\n{stop_signals.NOTICE}\n\nlast words of r?n\n"


@pytest.fixture
def default_of_python_3_14() -> Iterator[None]:
    """Processes are started through a server, unless a context is given."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    resource_tracker.ensure_running()  # it is a child, too
    yield
    multiprocessing.set_start_method(before, force=True)


def child_processes() -> set[int]:
    return {
        int(child) for file in Path("/proc/self/task").glob("*/children") for child in file.read_text("utf-8").split()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loader_processes_leave_signals_to_the_run(run, in_step, unpaired, default_of_python_3_14):
    """A terminal and torchrun send them to all processes of a group."""
    before = child_processes()

    def send() -> None:
        loaders = {loader.pid for loader in multiprocessing.active_children()}
        assert len(loaders) == 2
        for child in loaders | child_processes() - before:
            for number in stop_signals.SIGNALS:
                os.kill(child, number)

    in_step(2, send)
    done = run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")
    assert done.report["status"] == "finished"


def test_a_loader_process_that_is_killed_ends_the_run_with_a_message(run, in_step, unpaired):
    def kill() -> None:
        loader = multiprocessing.active_children()[0]
        loader.kill()
        time.sleep(5)  # until the signal that it has ended

    in_step(2, kill)
    with pytest.raises(SystemExit, match=r"^error: a process that loads images ended unexpectedly \(.*--num_threads"):
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")


def without_shared_memory() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the shared memory of a forked process")
def test_little_shared_memory_ends_the_run_with_a_message(run, unpaired, monkeypatch):
    """As in Docker, where it has 64 MB by default. The run waited forever."""
    monkeypatch.setattr(datasets, "leave_to_parent", without_shared_memory)
    message = r"^error: shared memory is too small for the images of a batch \(File too large.*--num_threads 0"
    with pytest.raises(SystemExit, match=message) as caught:  # `caught` keeps the frames, as a traceback does
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")
    assert not multiprocessing.active_children(), caught


@pytest.mark.skipif(sys.platform != "linux", reason="replaces a function in a forked process")
def test_loader_processes_that_cannot_send_images_end_the_run_with_a_message(run, unpaired, monkeypatch):
    """They send through sockets in /tmp, which may be full. The run waited forever."""

    def refuse() -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.util.get_temp_dir", refuse)
    with pytest.raises(SystemExit, match=r"^error: a process that loads images ended unexpectedly"):
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the loader that is half made
def test_loader_processes_that_cannot_be_started_end_the_run_with_a_message(run, unpaired, monkeypatch):
    """Their locks are files in /dev/shm, which may be read-only."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    message = r"^error: the processes that load images cannot be started \(Read-only file system\): .*--num_threads 0"
    with pytest.raises(SystemExit, match=message):
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")


def end_as_by_ctrl_c() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    os._exit(1)


def test_ctrl_c_while_loader_processes_start(run, unpaired, monkeypatch, capsys):
    """A process that is spawned takes seconds until it can ignore the signal, which all processes get."""
    monkeypatch.setattr(datasets, "leave_to_parent", end_as_by_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=1", "--name=run")
    assert capsys.readouterr().out.endswith("stopped; resume with: python -m srpkd.train --resume runs/run\n")


@pytest.mark.parametrize("place", ["step", "loader"])
def test_a_bug_ends_the_loader_processes(run, in_step, unpaired, monkeypatch, place):
    """Although its traceback exists: Python would wait for them when it exits."""

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    if place == "step":
        in_step(2, crash)
    else:
        monkeypatch.setattr(batches.SeededDataset, "__getitem__", crash)
    with pytest.raises(ZeroDivisionError) as caught:
        run(f"--dataroot={unpaired}", *CYCLE_GAN, *TINY, "--num_threads=2")
    assert not multiprocessing.active_children(), caught


def test_a_run_whose_folder_was_moved_stops(run, in_step, tmp_path):
    """Instead of writing its results to a new folder that cannot be resumed."""
    in_step(2, lambda: os.rename(tmp_path / "runs/run", tmp_path / "runs/moved"))
    with pytest.raises(SystemExit, match=r"^error: runs/run was moved or deleted during the run"):
        run(*PIX2PIX, "--name=run", "--save_latest_freq=1")
    assert [path.name for path in Path("runs").iterdir()] == ["moved"]
    assert run("--resume=moved").report["status"] == "finished"
