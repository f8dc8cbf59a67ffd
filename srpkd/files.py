"""Writing files: atomically, with errors that say what to do."""

import errno
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

Sync = Literal["name", "content", "nothing"]  # see atomic_write


class WriteError(OSError):
    """A file cannot be written; the message says which file, the reason, and what to do."""


FULL = "make room on that disk, or write to another"
FORBIDDEN = "write to a folder that you have permission to write to"
if sys.platform == "win32":
    FORBIDDEN = f"close other programs that have it open, or {FORBIDDEN}"
NOT_A_FOLDER = "a file exists where a folder is needed: remove it, or write elsewhere"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), NOT_A_FOLDER),
    errno.EISDIR: "give the name of a file in it, or another name",
}
REPLACE_SECONDS = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)  # before each repetition
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path in which ~ is the home folder. Unlike Path.expanduser, accept a name that starts with ~."""
    return Path(os.path.expanduser(path))


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a `WriteError` for `path` if the operating system refuses a write in the block."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError on a full disk, with the OSError as its context
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            if isinstance(cause, KeyboardInterrupt):  # in torch.save, which then fails to close its archive
                raise cause from None
            cause = cause.__context__
        if cause is None or isinstance(cause, WriteError):
            raise
        advice = ADVICE.get(cause.errno or 0, "write elsewhere")
        wrapped = WriteError(f"{path} cannot be written: {cause.strerror or cause}; {advice}")
        wrapped.errno = cause.errno
        raise wrapped from error


@contextmanager
def atomic_write(path: str | os.PathLike[str], sync: Sync = "name") -> Iterator[BinaryIO]:
    """Open `path` for writing bytes such that at any moment it has either all the new bytes or its previous content.

    The bytes are written to a temporary file in the same folder, which is then renamed. Missing folders are created,
    and a symbolic link is followed. If the block raises, the temporary file and the new folders are removed.

    Args:
        path: the file.
        sync: what survives a power failure:
            "name"     the new content, once this returns;
            "content"  the new content or the previous one, but not an empty file: use it for many files, and for what
                       can be written again, since each wait for the disk takes milliseconds;
            "nothing"  use it in a temporary folder.

    Raises:
        WriteError: the operating system refuses it.
    """
    created: list[Path] = []
    with writing(path):
        target = expand_user(path).absolute()
        if target.is_symlink():
            target = target.resolve()
        # without the name of the file, which may be as long as names can be
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with _open_new(temporary, created) as file:
                yield file
                file.flush()
                if sync != "nothing":
                    os.fsync(file.fileno())  # otherwise the new name may be on the disk before the new bytes
            replace_file(temporary, target)
            if sync == "name":
                for folder in (target.parent, *(folder.parent for folder in created)):
                    sync_folder(folder)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                for folder in created:
                    folder.rmdir()
            raise


def _open_new(path: Path, created: list[Path]) -> BinaryIO:
    """Open a new file for writing, and add the folders that are created for it to a list."""
    with suppress(FileNotFoundError):
        return open(path, "xb")
    created += [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "xb")


def replace_file(source: Path, target: Path) -> None:
    """Rename a file, over another one if that exists.

    Windows refuses it while another program has one of them open, such as a virus scanner, a backup or a browser: it is
    repeated for a few seconds.
    """
    for seconds in REPLACE_SECONDS if sys.platform == "win32" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the operating system can do that: Windows cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def windows_name_problem(name: str) -> str:
    """Return why Windows cannot have a file or folder of this name, in words, or "" if it can."""
    if forbidden := "".join(sorted({*re.findall(r'[<>:"/\\|?*\x00-\x1f]', name)})):
        return f"names on Windows cannot contain {forbidden!r}"
    if name.endswith((".", " ")):
        return "Windows removes dots and spaces at the end of names"
    return "Windows reserves this name for a device" if WINDOWS_DEVICES.fullmatch(name) else ""


def is_case_sensitive(folder: Path) -> bool:
    """Return whether a folder can hold two files whose names differ only in case. It may not exist yet.

    Raises:
        WriteError: no file can be written there.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    probe = existing / f".srpkd-{secrets.token_hex(8)}.tmp"
    with writing(folder):
        probe.touch(exist_ok=False)
        try:
            return not probe.with_name(probe.name.upper()).exists()
        finally:
            probe.unlink()


def write_file(path: Path, content: bytes, sync: Sync = "name") -> Path:
    """Write a file as `atomic_write` does, and return its path."""
    with atomic_write(path, sync) as file:
        file.write(content)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as JSON, atomically, and return the path. Raises the errors of `atomic_write`.

    Numbers that are not finite become null, because JSON has none: other programs refuse a file with Infinity or NaN.
    """
    return write_file(Path(path), json.dumps(_finite(value), indent=1, allow_nan=False).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
