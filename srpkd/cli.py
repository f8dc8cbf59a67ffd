"""The command ``srpkd``: ``srpkd COMMAND ...`` runs ``python -m srpkd.COMMAND ...``."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, BinaryIO, cast

from .extras import imports_of
from .files import WriteError, writing

COMMANDS = {
    "train": "train a generator, or distil a small one from a large one; without options, a demo on synthetic images",
    "evaluate": "score generated images: FID, KID, PSNR, SSIM, mIoU, FCN scores",
    "translate": "run a generator on every image of a folder",
    "profile": "compare parameters, MACs, file size and latency of generators",
    "export": "convert a generator to ONNX and check it against PyTorch; 8-bit on request",
    "compare": "compare generators on your images in the browser",
    "report": "rewrite the report page of a run",
    "check": "check every backend on this machine, and on its GPUs, against float64",
    "info": "list the backends that this machine can run, and why it cannot run the others",
}
HELP = f"""usage: srpkd COMMAND [OPTION ...]
       srpkd --version

{chr(10).join(f"  {command:<10} {text}" for command, text in COMMANDS.items())}

From a large generator to a small one that runs without PyTorch:

  srpkd train --dataroot datasets/horse2zebra --name h2z --teacher latest_net_G_A.pth --ngf 16
  srpkd profile latest_net_G_A.pth runs/h2z/latest_net_G_A.pth
  srpkd translate runs/h2z/latest_net_G_A.pth datasets/horse2zebra/testA zebras
  srpkd evaluate zebras datasets/horse2zebra/testB
  srpkd export runs/h2z/latest_net_G_A.pth

srpkd COMMAND --help lists a command's options."""


# errors of a write to a pipe whose reader has ended
NO_READER = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


class _Output(io.FileIO):
    """stdout or stderr, which ignores that its reader has ended.

    After Ctrl-C, ``srpkd train 2>&1 | tee log`` still has to save its state when tee has ended. Other errors, such as a
    full disk, are raised once for stdout, and ignored for stderr: no progress bar may end a training.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.title, self.is_lost = name, False

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self.is_lost:
            return size
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in NO_READER or self.title == "stderr":
                return size
            self.is_lost = True  # Python writes what is left when it exits, and would print a traceback
            with writing(self.title):
                raise


def prepare_terminal() -> None:
    """Let neither Ctrl-C nor stdout and stderr end this process with a traceback.

    After Ctrl-C, it would hide what a command printed before, as to resume. The process still ends by the signal, so
    that a shell script that called it ends too. Characters that the terminal does not have are replaced. Output that
    has no reader, or whose descriptor was closed, is discarded. stdout on a full disk ends the process with one line.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # so that no file of the command gets its number
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if sys.platform == "win32" and isinstance(stream, io.TextIOWrapper) and stream.isatty():
            stream.reconfigure(errors="replace")  # a console takes Unicode from Python, and bytes in its code page only
        elif stream is None or isinstance(stream, io.TextIOWrapper):
            unbuffered = stream is not None and stream.write_through
            raw = _Output(descriptor, name)
            output = io.TextIOWrapper(
                cast(BinaryIO, raw) if unbuffered else io.BufferedWriter(raw),
                encoding=stream.encoding if stream else None,
                errors="replace",
                line_buffering=True,  # errors are raised by print(), and a log shows what has happened so far
                write_through=unbuffered,
            )
            setattr(sys, name, output)
    previous = sys.excepthook

    def print_others(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, WriteError):
            print(f"error: {error}", file=sys.stderr)
        elif not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, traceback)

    sys.excepthook = print_others


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 if the command is unknown."""
    if arguments is None:
        prepare_terminal()
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP)
        return
    if command == "--version":
        print(import_module("srpkd").__version__)
        return
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {command!r}; {hint}\nsrpkd --help describes the commands", file=sys.stderr)
        sys.exit(2)
    with imports_of(command):
        module = import_module(f"srpkd.{command}")
    module.main(rest)
