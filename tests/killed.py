"""A server of runs that are killed: a request, a line of JSON on stdin, is done in a fork and answered on stdout.

    {"arguments": [...], "cwd": ..., "kill": ["step", 3]}  ->  how the fork ended, as subprocess' returncode

Imports are done once, and no tensor is made here, so that a fork may do what it likes.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from srpkd import checkpoint, objectives, record, results, state, train


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(number: int, function: Callable, instead: Callable = die) -> Callable:
    """The function, but for its call of this number: that is another's."""
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == number else function)(*arguments, **keywords)

    return counted


def save_half(content: Any, file: Any) -> None:
    whole(content, file)
    file.flush()
    file.truncate(file.tell() // 2)
    die()


whole = torch.save
WAYS = {
    # before a training step; in an evaluation; in a write of a state or of weights; before a state takes its name
    "step": lambda n: [setattr(kind, "step", at(n, kind.step)) for kind in (objectives.Pix2Pix, objectives.CycleGAN)],
    "evaluate": lambda n: setattr(results, "evaluate", at(n, results.evaluate)),
    "save": lambda n: setattr(torch, "save", at(n, torch.save, save_half)),
    "rename": lambda n: setattr(state, "os", type("", (), {"replace": at(n, os.replace)})),
    "fsync": lambda n: setattr(checkpoint.os, "fsync", at(n, os.fsync)),
}


def main() -> None:
    # a page takes longer than the training
    record.write_report = lambda folder: folder / "index.html"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(Path(request["cwd"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(request["cwd"])
            if request["kill"]:
                way, number = request["kill"]
                WAYS[way](number)
            code = 1
            try:
                train.main(request["arguments"])
                code = 0
            except SystemExit as message:
                print(message)
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
