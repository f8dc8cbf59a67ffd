"""A lock on the folder of a run: two processes that resume it would write over each other's metrics and states.

Not by the package filelock, which cannot lock a folder: it would leave a file in every run, and refuse to lock a folder
that is read-only.
"""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WINDOWS_FILE = ".lock"


class FolderLock:
    """Lock a folder for this process, until ``close``, or until the process ends.

    The lock belongs to the folder itself, so no file is left behind. Windows can lock only files, and there it belongs
    to an empty file in the folder. File systems without locks are not locked.

    Raises:
        ValueError: another process has the lock.
    """

    _descriptor = -1

    def __init__(self, folder: Path) -> None:
        self._descriptor = _open(folder)
        try:
            _lock(self._descriptor)
        except (BlockingIOError, PermissionError) as error:  # EWOULDBLOCK, on Windows EACCES
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
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    __del__ = close


if sys.platform == "win32":

    def _open(folder: Path) -> int:
        return os.open(folder / WINDOWS_FILE, os.O_RDWR | os.O_CREAT)

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # which is released when the descriptor is closed

else:

    def _open(folder: Path) -> int:
        return os.open(folder, os.O_RDONLY)

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close the descriptors in a forked process, such as one that loads data: it may live longer than its parent."""
    for lock in list(_locks):
        lock.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_inherited)
