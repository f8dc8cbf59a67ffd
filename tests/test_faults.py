"""The faults of tests/mutations.py fit the sources. Whether a test detects them is the matter of ``make mutations``."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import BACKENDS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_text_of_each_fault_occurs_once(backend):
    assert BACKENDS[backend].faults
    for fault in BACKENDS[backend].faults:
        text = (ROOT / fault.path).read_text("utf-8")
        assert text.count(fault.old) == 1, f"{fault.name}: {fault.path} does not contain this once:\n{fault.old}"
        assert fault.old != fault.new
