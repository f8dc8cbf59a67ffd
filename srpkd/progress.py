"""The progress bar of the commands and of ``distill``."""

from __future__ import annotations

from threading import RLock

from tqdm import tqdm


class ProgressBar(tqdm):
    """A bar of tqdm whose lock is not shared with other processes.

    With Python 3.14, tqdm's own lock starts a process, which warns about a leak when a signal ends the command.
    """


ProgressBar.set_lock(RLock())
