"""The progress bar of the commands."""

import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_command_that_is_killed_warns_about_no_leak():
    """As Python's process for semaphores does, if the bar has one: "forkserver" is the default of Python 3.14."""
    code = """
import multiprocessing, os, signal
multiprocessing.set_start_method("forkserver")
from srpkd.progress import ProgressBar
ProgressBar(total=2, desc="translating").update()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and "translating" in done.stderr
    assert "leaked" not in done.stderr
