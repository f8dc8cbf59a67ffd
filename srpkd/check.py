"""Check every backend on this machine against float64.

The GPU kernels have run on an H100 only. This command runs every backend that is available, and every CUDA kernel of
the backend native, on some thirty small losses: different relations, distances, dtypes, sizes and strides. Loss and
gradient must agree with float64, and two runs must give equal bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .arguments import parse
from .checking.kernels import KERNELS
from .checking.processes import FINAL, Check, Results, Runner, Verdict, checks, verdict
from .devices import device_name, visible_devices
from .files import expand_user
from .kernels import BACKENDS, native
from .reporting.table import format_table

ISSUES = "https://github.com/srpkd/srpkd/issues"
RECOMMENDED = ("native", "triton", "blocked", "reference")  # the first that is right replaces a wrong backend
MOST_PROBLEMS = 40  # lines


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="srpkd check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: srpkd check --device cuda",
    )
    result.add_argument(
        "--device", nargs="+", metavar="DEVICE", help="devices of torch, such as cpu or cuda:1 (default: all)"
    )
    result.add_argument(
        "--backend", nargs="+", choices=KERNELS, metavar="NAME",
        help=f"from {', '.join(KERNELS)} (default: all that are available)",
    )  # fmt: skip
    result.add_argument("--full", action="store_true", help="fifty cases instead of thirty")
    result.add_argument("--seconds", type=float, default=600.0, help="time for each device (default: %(default)g)")
    result.add_argument(
        "--silence", type=float, default=120.0, metavar="SECONDS",
        help="time without a result after which a backend counts as hung (default: %(default)g)",
    )  # fmt: skip
    result.add_argument(
        "--out", type=expand_user, metavar="FILE",
        help="write results of one device into this file as they arrive; a later run with it runs what is missing",
    )  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 1 if a backend is not right, or if the time was too short to tell."""
    options = parse(parser(), arguments)
    try:
        devices = [checked_device(name) for name in options.device] if options.device else all_devices()
        if options.out and len(devices) > 1:
            raise ValueError(f"--out takes the results of one device, received {', '.join(devices)}: add --device")
        verdicts = {device: check_device(device, options) for device in devices}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if broken := [device for device, found in verdicts.items() if "FAILED" in found]:
        print(f"FAILED on {', '.join(broken)}. Please report it, with this output and that of srpkd info: {ISSUES}")
        sys.exit(1)
    if unfinished := [device for device, found in verdicts.items() if "not finished" in found]:
        again = "with --out FILE, a repetition runs what is missing"
        print(f"Not finished on {', '.join(unfinished)} in {options.seconds:g} s: use a larger --seconds; {again}.")
        sys.exit(1)
    print(f"All backends that are available are right on {', '.join(devices)}.")


def all_devices() -> list[str]:
    """Return the names of the devices that ``srpkd info`` lists."""
    return [str(device) for device in visible_devices()]


def checked_device(name: str) -> str:
    """Return the name of a device that exists.

    Raises:
        ValueError: There is no such device.
    """
    numbered = name if name == "cpu" or ":" in name else f"{name}:0"
    if numbered not in (found := all_devices()):
        raise ValueError(f"--device {name}: expected one of {', '.join(found)}, which are those that torch sees")
    return numbered


def check_device(device: str, options: argparse.Namespace) -> set[Verdict]:
    """Check the backends on a device, print the table, and return the verdicts. Raises as ``Runner``."""
    name = device_name(torch.device(device))
    everything = checks(device, options.full)
    names = options.backend or (BACKENDS if device == "cpu" else KERNELS)
    reasons = {kernel: kernel_unavailable_reason(kernel, everything, build=bool(options.backend)) for kernel in names}
    kernels = [kernel for kernel, reason in reasons.items() if reason is None]
    print(f"{device} ({name}): {len(everything)} cases for each of {', '.join(kernels) or 'no backend'}", flush=True)
    start = time.monotonic()
    runner = Runner(everything, options.seconds, options.silence, options.out)
    runner.run(kernels)
    print(summary(runner.results, kernels, everything))
    for kernel, reason in reasons.items():
        if reason is not None:
            print(f"{kernel}: not checked: {reason}")
    verdicts = {kernel: verdict(runner.results, kernel, len(everything)) for kernel in kernels}
    wrong, right = ([kernel for kernel in kernels if verdicts[kernel] == wanted] for wanted in ("FAILED", "right"))
    print("".join(f"{line}\n" for line in advice(wrong, right)) + f"{time.monotonic() - start:.0f} s\n", flush=True)
    return set(verdicts.values())


def kernel_unavailable_reason(kernel: str, everything: Sequence[Check], build: bool) -> str | None:
    """Return why a kernel can compute none of the cases, or None. With ``build``, build the extension if necessary."""
    if kernel.startswith("native") and native.load_existing() == (None, None):
        if not build:
            return native.status()
        try:
            native.extension()
        except RuntimeError as error:
            return str(error)
    reasons = [KERNELS[kernel].unavailable_reason(check.case) for check in everything]
    return None if None in reasons else reasons[0]


def summary(results: Results, kernels: Sequence[str], everything: Sequence[Check]) -> str:
    """Return a table with a line per kernel, then every result that is not right, in less than 60 lines."""
    rows, problems = [], []
    states = (*FINAL, "crashed", "hung", "not run")
    for kernel in kernels:
        own = [results.get((kernel, number), {"status": "not run"}) for number in range(len(everything))]
        counts = {state: sum(entry["status"] == state for entry in own) for state in states}
        row: dict[str, Any] = {"backend": kernel} | counts
        row["error"] = max((entry["share"] for entry in own if entry.get("share") is not None), default=None)
        row["seconds"] = sum(entry.get("seconds", 0.0) for entry in own)
        row["verdict"] = verdict(results, kernel, len(everything))
        rows.append(row)
        reasons: dict[str, list[str]] = {}
        for check, entry in zip(everything, own):
            if entry["status"] not in ("ok", "not run"):
                key = f"{kernel}: {entry['status']}: {entry.get('reason', '')}"
                reasons.setdefault(key, []).append(check.describe())
        for key, names in reasons.items():
            problems.append(f"{key} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")"))
    used = [state for state in states if state == "ok" or any(row[state] for row in rows)]
    columns = [{"key": "backend"}, *({"key": state} for state in used)]
    columns += [{"key": "error", "label": "largest error / limit", "format": ".2g"}]
    columns += [{"key": "seconds", "format": ".1f"}, {"key": "verdict"}]
    problems.sort(key=lambda line: ": not covered: " in line)
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return "\n".join([format_table({"columns": columns, "rows": rows}), "", *problems[:MOST_PROBLEMS], *more]).rstrip()


def advice(wrong: Sequence[str], right: Sequence[str]) -> list[str]:
    """Return what to do about kernels that are wrong, given those that are right."""
    if not wrong:
        return []
    lines = [f"Do not use {', '.join(wrong)} here."]
    if "native-sm80" in right and {*wrong} <= {"native-sm90", "native"}:
        lines.append("Set SRPKD_CUDA_KERNEL=sm80, which selects the kernel of native that is right.")
    elif (good := next((name for name in RECOMMENDED if name in right), None)) is not None:
        lines.append(f"Set SRPKD_BACKEND={good}, which replaces backend='auto' by a backend that is right.")
    return lines


if __name__ == "__main__":
    main()
