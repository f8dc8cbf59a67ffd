"""Tables as text and Markdown."""

from __future__ import annotations

import pytest
from example_run import TABLE

from srpkd.reporting.table import format_table


def test_table_as_text() -> None:
    assert format_table(TABLE) == "\n".join(
        [
            "generator  parameters    mIoU (%)",
            "---------  ----------  ----------",
            "teacher       712,345        82.1",
            "kd             98,765  49.0 ± 1.3",
            "kd + srp       98,765           –",
            "",
            "Mean ± standard deviation over 3 runs.",
            "",
            "Students see 16 pairs.",
        ]
    )


def test_table_as_markdown() -> None:
    table = TABLE | {"rows": [*TABLE["rows"], {"name": "a|b <i>", "miou": {"mean": 50.0, "std": 2.0, "n": 2}}]}
    assert format_table(table, markdown=True) == "\n".join(
        [
            "| generator | parameters | mIoU (%) |",
            "| --- | ---: | ---: |",
            "| teacher | 712,345 | 82.1 |",
            "| kd | 98,765 | 49.0 ± 1.3 |",
            "| kd + srp | 98,765 | – |",
            r"| a\|b &lt;i> | – | 50.0 ± 2.0 |",
            "",
            "Mean ± standard deviation over 2 to 3 runs.",
            "",
            "Students see 16 pairs.",
        ]
    )


def test_table_without_rows() -> None:
    assert format_table({"columns": TABLE["columns"], "rows": []}).splitlines() == [
        "generator  parameters  mIoU (%)",
        "---------  ----------  --------",
    ]
    with pytest.raises(ValueError):
        format_table({"columns": [{"key": "x", "format": "d"}], "rows": [{"x": 0.5}]})
