"""What Linux tells about the processor."""

from __future__ import annotations

from pathlib import Path

PATH = Path("/proc/cpuinfo")


def cpu_info() -> dict[str, str]:
    """Return what is known about the first core, by name, such as "model name"; {} if the file cannot be read."""
    try:
        lines = PATH.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    entries = (line.partition(":") for line in reversed(lines))  # of equal names, the last one remains
    return {name.strip(): value.strip() for name, _, value in entries}
