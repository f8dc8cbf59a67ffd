"""The script bench/gpu_check.sh."""

from __future__ import annotations

import subprocess

from helpers import ROOT


def test_wrong_arguments_print_the_usage(tmp_path):
    script = ROOT / "bench" / "gpu_check.sh"
    for arguments in ([], [tmp_path, "--only", "nothing"], [tmp_path, "tests"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert done.returncode != 0 and "usage: bench/gpu_check.sh" in done.stderr
    assert not list(tmp_path.iterdir())
