"""The command ``python -m srpkd.train``."""

from typing import Any

import pytest
from runs import PIX2PIX, TINY, command

from srpkd import train
from srpkd.training import summary


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
