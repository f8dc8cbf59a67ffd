"""Windows and macOS, as far as Linux can tell: what they lack, and what they spell differently."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from srpkd.files import windows_name_problem


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it hides what Windows does not have from Linux")
def test_commands_in_a_simulated_windows(tmp_path):
    """Train, stop by Ctrl-C, resume, report, translate, evaluate, export and check; see ``simulated_windows``."""
    command = [sys.executable, "-X", "warn_default_encoding", ROOT / "tests" / "simulated_windows.py", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs/run: another process is training this run: wait until it has finished" in done.stdout
    assert "stopped; resume with: python -m srpkd.train --resume runs/run\ninterrupted\n" in done.stdout
    assert "triton       no: the package triton is not installed" in done.stdout
    assert "All backends that are available are right on cpu." in done.stdout
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"runs/run/latest_net_G_A.pt2", "runs/run/index.html", "out/00001.png", "scores.json"} <= written
    assert not [name for name in written if windows_name_problem(Path(name).name)]
    assert b"\r" not in (tmp_path / "runs/run/metrics.jsonl").read_bytes()


def test_a_checkout_without_symbolic_links_says_so(tmp_path):
    """git on Windows makes text files in their place."""
    (tmp_path / "srpkd").mkdir()
    (tmp_path / "srpkd/__init__.py").write_text((ROOT / "srpkd/__init__.py").read_text(encoding="utf-8"), "utf-8")
    (tmp_path / "srpkd/kernels").write_text("../kernels", "utf-8")
    command = [sys.executable, "-S", "-c", "import srpkd"]  # -S: without an installed srpkd
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is in a checkout without symbolic links, which git makes on Windows by default: run" in done.stderr
