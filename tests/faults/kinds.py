"""What a fault and the tests of a backend are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    path: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str = ""  # arguments of pytest, if not those of the backend


@dataclass
class Backend:
    tests: str  # arguments of pytest: the tests that must detect the faults
    faults: list[Fault]
    environment: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
