"""A server that runs trainings in forked processes, several per run if asked, and can kill them at a chosen point.

    with serving() as server:
        code = server(arguments, cwd, kill=("step", 3), processes=2)

The server imports srpkd and what a run imports once, which takes longer than a run. It creates no tensor itself:
torch's threads do not survive a fork.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from srpkd import train
from srpkd.data.images import DataError
from srpkd.training import objectives, resume, run_dir, summary


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(number: int, function: Callable, instead: Callable = die) -> Callable:
    """Wrap a function so that its call with this number (from 1) calls ``instead``."""
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == number else function)(*arguments, **keywords)

    return counted


def interrupted(function: Callable) -> Callable:
    """Wrap a function so that SIGINT arrives at its start."""

    def with_signal(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **keywords)

    return with_signal


def on_rank_1(number: int, instead: Callable[[Callable], Callable]) -> None:
    """Call ``instead(step)`` on rank 1 in place of the training step with this number (from 1)."""
    if os.environ["RANK"] == "1":
        for kind in (objectives.Pix2Pix, objectives.CycleGAN):
            kind.step = at(number, kind.step, instead(kind.step))


def fail(*_: Any) -> None:
    raise DataError("a damaged image")


def crash(*_: Any) -> None:
    raise ZeroDivisionError("a bug")


def save_half(content: Any, file: Any) -> None:
    """Write half of a file, and kill the process."""
    save(content, file)
    file.flush()
    file.truncate(file.tell() // 2)
    die()


save = torch.save
KILL_POINTS = {
    # SIGINT in a training step or an evaluation
    "interrupt step": lambda n: [
        setattr(kind, "step", at(n, kind.step, interrupted(kind.step)))
        for kind in (objectives.Pix2Pix, objectives.CycleGAN)
    ],
    "interrupt evaluate": lambda n: setattr(
        summary, "evaluate", at(n, summary.evaluate, interrupted(summary.evaluate))
    ),
    "fail on rank 1": lambda n: on_rank_1(n, lambda _: fail),
    "crash on rank 1": lambda n: on_rank_1(n, lambda _: crash),
    "interrupt on rank 1": lambda n: on_rank_1(n, interrupted),
    "kill on rank 1": lambda n: on_rank_1(n, lambda _: die),
    # killed before a training step; in an evaluation; while a state or weights are written; before a state is renamed
    "step": lambda n: [setattr(kind, "step", at(n, kind.step)) for kind in (objectives.Pix2Pix, objectives.CycleGAN)],
    "evaluate": lambda n: setattr(summary, "evaluate", at(n, summary.evaluate)),
    "save": lambda n: setattr(torch, "save", at(n, torch.save, save_half)),
    "rename": lambda n: setattr(resume, "replace_file", at(n, resume.replace_file)),
}


@contextmanager
def serving() -> Iterator[Callable[..., int]]:
    """Start a server, and yield a function that runs ``python -m srpkd.train`` with given arguments.

    ``server(arguments, cwd, kill, processes)`` returns the exit code of rank 0; it is negative after a signal. Output
    is appended to <cwd>/log.
    """
    command = [sys.executable, __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: tests compare bits
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def request(arguments: list[str], cwd: Path, kill: tuple[str, int] | None = None, processes: int = 1) -> int:
            asked = {"arguments": arguments, "cwd": str(cwd), "kill": kill, "processes": processes}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield request
        process.stdin.close()


def main() -> None:
    # here, as the GPU tests of the trainer import this module too, on machines that may lack jsonargparse
    import jsonargparse  # noqa: F401
    import torch._dynamo  # noqa: F401  # of optimizers
    import torchvision.transforms.v2  # noqa: F401

    # writing the page takes longer than the training
    run_dir.write_report = lambda folder, _: folder / "index.html"
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forks = [fork(request, rank, port) for rank in range(request["processes"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in forks]
        print(codes[0], flush=True)


def fork(request: dict[str, Any], rank: int, port: int) -> int:
    if child := os.fork():
        return child
    log = os.open(Path(request["cwd"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    if request["processes"] > 1:  # as torchrun does
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if request["kill"]:
        point, number = request["kill"]
        KILL_POINTS[point](number)
    code = 1
    try:
        train.main(request["arguments"])
        code = 0
    except SystemExit as message:
        print(message)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
