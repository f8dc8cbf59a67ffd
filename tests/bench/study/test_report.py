"""The report of the recorded study."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from bench.study import report
from bench.study.plan import SETTINGS

pytest.importorskip("scipy.stats", reason="scipy is not installed")

DOCS = ROOT / "docs"


def test_docs_contain_the_recorded_report():
    result = json.loads((DOCS / "study.json").read_text("utf-8"))
    assert (DOCS / "study.md").read_text("utf-8") == report.render(result), (
        "bench.study.report.write(result, DOCS) writes it again"
    )
    assert (DOCS / "study.png").is_file()
    assert {entry["setting"] for entry in result["judged"]} == set(SETTINGS)
