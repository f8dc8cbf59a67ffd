"""Write tables and pictures into the README: ``python -m bench readme RUN_DIR``."""

import json
import re
from pathlib import Path

from srpkd.files import write_file
from srpkd.reporting.page import overview, read_report
from srpkd.reporting.table import format_table


def between_markers(file: Path, name: str) -> str:
    """What stands between a file's markers, the lines ``<!-- NAME: begin ... -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: it has no such markers.
    """
    return _marked(file, name)[2]


def put_between_markers(file: Path, name: str, text: str) -> None:
    """Replace it by other lines; as `between_markers`."""
    whole, begin, old, end = _marked(file, name)
    write_file(file, whole.replace(begin + old + end, f"{begin}{text}\n{end}", 1).encode())


def _marked(file: Path, name: str) -> tuple[str, str, str, str]:
    """A file's text, and of it the opening marker's line, what comes before the closing marker, and that marker."""
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"(<!-- {name}: begin[^\n]*\n)(.*?)(<!-- {name}: end -->)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{file}: expected the markers <!-- {name}: begin --> and <!-- {name}: end -->")
    return text, *found.groups()


def update_readme(run_dir: str | Path, readme: str | Path) -> None:
    """Put a run's table between a README's markers, its overview and the table's numbers into `docs/` beside it.

    Raises:
        ValueError: the README has no such markers, or the run no table yet.
    """
    run, readme = Path(run_dir), Path(readme)
    between_markers(readme, "demo table")  # before anything is written
    report, _ = read_report(run / "report.json")
    if not report.get("table"):
        raise ValueError(f"{run}: report.json has no table yet: expected a run that has measured a network")
    overview(run, readme.parent / "docs" / "demo.png")
    kept = {key: report.get(key) for key in ("command", "environment", "elapsed_seconds", "table")}
    write_file(readme.parent / "docs" / "demo.json", json.dumps(kept, indent=1).encode())
    put_between_markers(readme, "demo table", format_table(report["table"], markdown=True))
