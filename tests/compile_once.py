"""Compile a source once for all worker processes of pytest-xdist, which have no fixtures in common."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def compile_once(
    factory: pytest.TempPathFactory,
    command: Sequence[str | Path],
    suffix: str,
    environment: Mapping[str, str] | None = None,
) -> tuple[str, Path]:
    """Run a compiler's command, followed by -o and a file. Return what it printed, and the file.

    The processes of one test run that compile with the same command share the result.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    words = [str(word) for word in command]
    target = folder / (hashlib.sha256("\0".join(words).encode()).hexdigest()[:16] + suffix)
    log = target.with_suffix(".log")
    with open(target.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not target.exists():
            done = subprocess.run(
                [*words, "-o", str(target)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            log.write_text(done.stdout)
    return log.read_text("utf-8"), target
