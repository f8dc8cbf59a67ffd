"""The command ``python -m srpkd.train``."""

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from runs import PIX2PIX, TINY, command

from srpkd import train
from srpkd.training import summary
from srpkd.training.objectives import Pix2Pix


@pytest.mark.slow
def test_invalid_input_ends_the_process_without_a_traceback(tmp_path):
    done = command("--dataroot=:synthetic:", "--teacher=none.pth", *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def wrong(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(summary, "evaluate", wrong)
    with pytest.raises(ValueError, match="a bug"):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}"])


def test_an_error_of_the_operating_system_keeps_no_traceback(monkeypatch, tmp_path, capsys):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Pix2Pix, "step", refuse)
    with pytest.raises(SystemExit, match=r"^error: \[Errno 24\] Too many open files$"):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}", "--name=run"])
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_gpu_on_which_nothing_runs_ends_the_process_with_one_message(monkeypatch, tmp_path):
    """Such as one that is older than torch supports, of which torch.cuda.is_available() is true."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 100)
    message = r"^error: device='cuda:99': torch cannot use it here \(.*\); use --device cpu$"
    with pytest.raises(SystemExit, match=message):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}", "--device=cuda:99"])
    assert not list(tmp_path.iterdir())


def cuda_allocation(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "allocate",
    [cuda_allocation, lambda *_: torch.empty(2**50), lambda *_: np.empty(2**50)],
    ids=["GPU", "CPU", "NumPy"],
)
def test_too_little_memory_ends_a_run_with_one_message(monkeypatch, tmp_path, capsys, allocate: Callable[..., Any]):
    monkeypatch.setattr(Pix2Pix, "update_networks", allocate)
    with pytest.raises(SystemExit, match=r"(?s)^error: .*allocate.*smaller --batch_size .* or free memory and resume"):
        train.main([*PIX2PIX, f"--runs_dir={tmp_path}", "--name=run"])
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
