"""Stands in for the process of a kernel in ``srpkd check``: case 1 ends the process, case 2 never returns."""

import os
import sys
import time

from srpkd.checking import processes


def work(kernel, everything, numbers, results, errors):
    sys.stderr = open(errors, "w", encoding="utf-8")  # noqa: SIM115
    for number in numbers:
        results.send({"case": number})
        if number == 1:
            print("illegal instruction", file=sys.stderr, flush=True)
            os._exit(7)
        if number == 2:
            time.sleep(600)
        results.send({"case": number, "status": "ok", "reason": "", "gradient": 1e-3})


if __name__ == "__main__":  # runs two kernels until it is interrupted
    from pathlib import Path

    processes.work = work
    processes.Runner(processes.checks("cpu")[:4], 600, 600, Path("log")).run(["native", "blocked"])
