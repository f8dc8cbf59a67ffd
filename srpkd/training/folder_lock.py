"""A lock on the folder of a run: two processes that resume it would write over each other's metrics and states."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


class FolderLock:
    """Lock a folder for this process, until ``close``, or until the process ends.

    The lock belongs to the folder itself, so no file is left behind. File systems without locks are not locked.

    Raises:
        ValueError: another process has the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"{folder}: another process is training this run: wait until it has finished, or stop it"
            ) from error
        except OSError:  # such as of a network file system
            self.close()
            return
        _locks.add(self)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close the descriptors in a forked process, such as one that loads data: it may live longer than its parent."""
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited)
