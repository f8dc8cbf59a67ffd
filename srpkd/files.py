"""Writing files: each replaced in one step, errors that say what to do."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class WriteError(OSError):
    """A file that cannot be written; the message says which, why, and what to do."""


FULL = "make room on that disk, or write to another"
FORBIDDEN = "write to a folder where that is allowed"
NO_FOLDER = "a file stands where a folder is needed: remove it, or write elsewhere"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), NO_FOLDER),
    errno.EISDIR: "give the name of a file in it, or another",
}


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What the system refuses in the block, which writes `path`, is raised as a `WriteError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error
        while reason and not isinstance(reason, OSError):  # what torch.save raises of a full disk has it as its context
            reason = reason.__context__
        if reason is None or isinstance(reason, WriteError):
            raise
        why = reason.strerror or str(reason)
        wrong = WriteError(f"{path} cannot be written: {why}; {ADVICE.get(reason.errno, 'write elsewhere')}")
        wrong.errno = reason.errno
        raise wrong from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes such that at any moment it holds all the new bytes or what it held before.

    The bytes go to a temporary file beside it, which takes its name once they are on the disk. Missing folders are
    made, and a symbolic link is followed. If the block raises, the temporary file and these folders are removed.

    Raises:
        WriteError: the system refuses it.
    """
    target = Path(path).expanduser().resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    made: list[Path] = []
    with writing(path):
        try:
            made += [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
            raise


def write_file(path: Path, content: bytes) -> Path:
    """Write a whole file in one step, and return its path. Errors are those of `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)
    return path
