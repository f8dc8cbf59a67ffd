"""The command ``python -m bench table``."""

from __future__ import annotations

import pytest
from bench_helpers import as_read, relation_rows, run, train_rows

from bench import relation, results, table, train
from bench.markers import between_markers


def test_table_of_training_steps(tmp_path):
    results.upsert(tmp_path / "train.csv", train_rows(), train.KEY)
    text = table.train_table(results.read(tmp_path / "train.csv"))
    assert text.count("| auto: native | 2.50 | 0.400 | 20.0 | – |") == 2
    assert text.count("| without relation loss | 2.00 | 0.500 | – | – |") == 2
    assert text.index("some cpu, 2 threads; cycle_gan, resnet_9blocks 64 to resnet_9blocks 16, 256 x 256 pixels") == 0
    assert table.train_table([]) == "" and "fast" not in text


def test_gain_of_fast():
    """The smallest and the largest, of steps with the same networks and images."""
    same = dict.fromkeys(train.KEY, "1")
    seconds = {"teacher": 6, "a": 3, "b": 3, "a, fast": 2, "c, fast": 1}
    rows = [same | {"variant": name, "median_s": str(value)} for name, value in seconds.items()]
    rows.append(same | {"variant": "a", "median_s": "30", "batch": "4"})
    assert table.gain_of_fast([]) == ""
    assert table.gain_of_fast(rows) == "; a step with `--fast` is 1.50 times as fast"
    rows.append(same | {"variant": "b, fast", "median_s": "1.714"})
    assert table.gain_of_fast(rows) == "; a step with `--fast` is 1.50 to 1.75 times as fast"


def test_times_of_gpu_and_host_have_columns_where_they_are_recorded():
    rows = as_read(relation_rows("cuda", dtype="bfloat16", batch=16))
    for row in rows:
        row |= {"gpu_s": "0.002", "host_s": "0.003"}
    text = table.table(rows)
    assert "| case | provider | ms | GPU ms | host ms | x eager's speed |" in text
    assert "| N = 4,096, C = 64/256, B = 16, bfloat16, row l1 | eager | 671.09 | 2.000 | 3.000 | 1.00 |" in text
    for row in rows:
        row["gpu_s"] = row["host_s"] = ""
    assert "| case | provider | ms | x eager's speed |" in table.table(rows)


def test_tables_are_put_into_the_readme(recorded, tmp_path, capsys):
    results.upsert(recorded, relation_rows("cuda", dtype="bfloat16"), relation.KEY)
    training = tmp_path / "train.csv"
    results.upsert(training, train_rows(), train.KEY)
    run("table", "--csv", recorded, "--train-csv", training)
    text = capsys.readouterr().out.strip()
    rows, steps = results.read(recorded), results.read(training)
    assert text == f"{table.table(rows)}\n\n{table.train_table(steps)}"
    assert "some cpu, 2 threads" in text and "some cuda;" in text
    assert "| N = 4,096, C = 64/256, float32, row l1 | eager | 671.09 | 1.00 | 0.50 |" in text
    assert "|  | native | 83.89 | 8.00 | 4.00 | 4.1 |" in text
    assert "out of memory" in text and "keops" not in text

    readme, page = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    for file in (readme, page):
        file.write_text("# a\n<!-- bench table: begin (by hand) -->\nold\n<!-- bench table: end -->\nb\n")
    run("table", "--csv", recorded, "--train-csv", training, "--readme", readme)
    assert between_markers(readme, table.NAME) == f"{table.short_table(rows)}\n\n{table.steps_in_short(steps)}"
    assert between_markers(page, table.NAME) == text
    for file in (readme, page):
        assert file.read_text("utf-8").startswith("# a\n<!-- bench table: begin (by hand) -->\n")
        assert file.read_text("utf-8").endswith("<!-- bench table: end -->\nb\n")
    readme.write_text("# a\n")
    with pytest.raises(SystemExit, match="expected the markers"):
        run("table", "--csv", recorded, "--readme", readme)


def test_short_table_has_a_row_per_case_with_the_fastest_backend():
    rows = as_read(relation_rows())
    eager = [row for row in rows if row["provider"] == "eager"]
    rows += [row | {"provider": name} for name in ("blocked", "keops") for row in eager]
    assert "| keops |" in table.table(rows)
    lines = table.short_table(rows).splitlines()
    assert lines[2] == (
        "| case | eager ms | compile ms | srpkd ms | backend | x eager | x compile | eager MB | srpkd MB |"
    )
    assert lines[4:] == [
        "| N = 4,096, C = 64/256, float32, row l1 | 671.09 | 335.54 | 83.89 | native | 8.0 | 4.0 | 403 | 4 |"
    ]
    rows = [row for row in rows if row["provider"] in ("chunked", "compile")]
    assert table.short_table(rows).splitlines()[4] == (
        "| N = 4,096, C = 64/256, float32, row l1 | – | 335.54 | – | – | – | – | – | – |"
    )
    for row in rows:
        if row["provider"] == "chunked":  # which ran out of memory
            row |= {"provider": "eager", "needed_bytes": "5e9"}
    assert table.short_table(rows).splitlines()[4] == (
        "| N = 4,096, C = 64/256, float32, row l1 | out of memory | 335.54 | – | – | – | – | needs 5,000 | – |"
    )


def test_a_backend_that_failed_is_not_the_fastest():
    rows = as_read(relation_rows())
    (native,) = (row for row in rows if row["provider"] == "native" and row["pixels"] == "4096")
    failed = native | {"provider": "closed_form", "status": "failed", "median_s": ""}
    assert "| 83.89 | native |" in table.short_table([*rows, failed])


def test_cases_that_are_not_shown():
    rows = as_read(relation_rows())
    small = [row | {"device": "another"} for row in rows if row["pixels"] == "1024"]
    assert "another" not in table.table(rows + small)
    with pytest.raises(ValueError, match="no case of the table is recorded: run python -m bench relation first"):
        table.table(small)


def test_steps_in_short_name_the_device():
    rows = as_read(train_rows())
    expected = "in a training step of cycle_gan with 256 x 256 pixels, the relation loss takes 20.0 % of the time."
    assert table.steps_in_short(rows) == f"some cpu: {expected}\n\nsome cuda: {expected}"
    assert table.steps_in_short([row for row in rows if not row["variant"].startswith("auto")]) == ""
