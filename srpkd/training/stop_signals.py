"""Signals that stop a run between two training steps: Ctrl-C, and those that clusters and closed terminals send.

A KeyboardInterrupt that is raised at any moment can be lost: Python ignores exceptions in callbacks of weak references
and in ``__del__``, which run all the time. In torch.save it aborts the process. So the first signal only sets a flag,
which training and evaluation read, and a second one ends the process at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

# SIGBREAK is Ctrl-Break; a closed console window, which sends it too, ends the process right after the handler
SIGNALS: tuple[signal.Signals, ...]
if sys.platform == "win32":
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
else:
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOADER_SECONDS = 25  # until SIGTERM ends a process that loads images; torchrun and Slurm kill all after 30
REPEAT = 1.0  # seconds: launchers may send a signal to a process and, right after that, to its group
NOTICE = "stopping after this step; Ctrl-C again stops at once"

_received = 0  # number of the first signal, or 0


class Stopped(KeyboardInterrupt):
    """A signal stops the run; ``number`` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def received() -> int:
    """Return the number of the signal that asked this process to stop, or 0."""
    return _received


def raise_if_received() -> None:
    """Raise ``Stopped`` if a signal asked this process to stop. Call it where nothing is half done."""
    if _received:
        raise Stopped(_received)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Context in which Ctrl-C ends the process at once, by no exception that could be lost."""
    with _handlers((signal.SIGINT,), signal.SIG_DFL):
        yield


@contextmanager
def handled(last_words: Callable[[], str] | None) -> Iterator[None]:
    """Context in which the first signal makes ``received`` return its number, and the second ends the process.

    Signals that the process ignores, as under nohup, remain ignored. Outside the main thread nothing changes.

    Args:
        last_words: returns what is written to stderr before the second signal ends the process. None in a process that
            writes nothing.
    """
    global _received
    _received, process, first = 0, os.getpid(), 0.0
    terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        global _received
        nonlocal first
        if os.getpid() != process:
            _end(number)  # a fork that has not replaced the handler
        elif not _received:
            _received, first = number, time.monotonic()
            if sys.platform != "win32" and number == signal.SIGHUP:
                _discard_output(terminals)
            if number == signal.SIGINT and last_words:  # torchrun sends SIGTERM after another process failed
                _write(NOTICE)
        elif time.monotonic() - first > REPEAT:
            if last_words:
                _write(last_words())
            for child in multiprocessing.active_children():
                child.kill()
            _end(number)

    try:
        with _handlers(SIGNALS, handle):
            yield
    finally:
        _received = 0


@contextmanager
def _handlers(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Context with a handler of signals, except those that the process ignores; only the main thread can have one."""
    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if main and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave_to_parent() -> None:
    """Let this process, which loads images, continue after a signal that all processes get: the run still needs them.

    The run then ends this process.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":  # there, SIGTERM does not reach other processes
        # by SIGTERM, Python also ends processes that remain when it exits
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LOADER_SECONDS))


def _end(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _write(text: str) -> None:
    """Write a line to stderr. ``print`` could be what the signal interrupted, and cannot be called twice."""
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode(errors="replace"))


def _is_terminal(descriptor: int) -> bool:
    with suppress(OSError):
        return os.isatty(descriptor)
    return False


def _discard_output(descriptors: list[int]) -> None:
    """Redirect output to nowhere: the terminal was closed, and every write to it would raise an OSError."""
    with open(os.devnull, "wb") as null:
        for descriptor in descriptors:
            os.dup2(null.fileno(), descriptor)
