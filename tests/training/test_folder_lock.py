"""The lock on the folder of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from srpkd.training.folder_lock import FolderLock
from srpkd.training.run_dir import RunDir

# locks the folder, forks a process that lives on, and waits
OWNER = """
import os, sys, time
from pathlib import Path
from srpkd.training.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    os.close(0), os.close(1), os.close(2)
    time.sleep(30)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_another_process_cannot_train_the_run(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        for lock in (FolderLock, RunDir):
            with pytest.raises(ValueError, match=f"{tmp_path}: another process is training this run: wait until"):
                lock(tmp_path)
        assert os.listdir(tmp_path) == []
        owner.kill()
        owner.wait()
        FolderLock(tmp_path).close()  # although the forked process still runs
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


@pytest.mark.filterwarnings("error")  # of an exception in __del__
def test_a_folder_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "none")


def test_a_closed_folder_can_be_resumed(tmp_path):
    for _ in range(2):
        RunDir(tmp_path).close()
    FolderLock(tmp_path)  # is freed at once
    RunDir(tmp_path).close()
