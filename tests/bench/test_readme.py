"""The command ``python -m bench readme``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_run import fill_run
from helpers import ROOT

from bench.__main__ import main
from srpkd.reporting.table import format_table

README = ROOT / "README.md"


def test_readme_contains_the_table_of_the_recorded_demo() -> None:
    demo = json.loads((README.parent / "docs" / "demo.json").read_text("utf-8"))
    assert format_table(demo["table"], markdown=True) in README.read_text("utf-8")


def test_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    run = fill_run(tmp_path / "demo")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo table: begin -->\nold\n<!-- demo table: end -->\nafter\n")
    main(["readme", str(run), "--readme", str(readme)])
    table = format_table(json.loads((run / "report.json").read_text("utf-8"))["table"], markdown=True)
    assert (
        readme.read_text("utf-8") == f"before\n<!-- demo table: begin -->\n{table}\n<!-- demo table: end -->\nafter\n"
    )
    assert (tmp_path / "docs" / "demo.png").read_bytes().startswith(b"\x89PNG")
    before = readme.read_text("utf-8"), (tmp_path / "docs" / "demo.json").read_text("utf-8")
    with pytest.raises(SystemExit, match=r"early: report\.json has no table, expected a run that has evaluated a net"):
        main(["readme", str(fill_run(tmp_path / "early", table=None)), "--readme", str(readme)])
    assert before == (readme.read_text("utf-8"), (tmp_path / "docs" / "demo.json").read_text("utf-8"))
    plain = tmp_path / "plain" / "README.md"
    plain.parent.mkdir()
    plain.write_text("no markers")
    with pytest.raises(SystemExit, match=r"README\.md: expected the markers"):
        main(["readme", str(run), "--readme", str(plain)])
    assert list(plain.parent.iterdir()) == [plain], "no picture beside a page that cannot show it"
    with pytest.raises(SystemExit, match=r"No such file or directory: '.*none\.md'"):
        main(["readme", str(run), "--readme", str(tmp_path / "none.md")])
