"""The page of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from example_run import Page, fill_run, metrics_line
from PIL import Image

from srpkd import report
from srpkd.reporting.page import _duration, overview, write_report
from srpkd.reporting.pictures import save_image


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill_run(tmp_path / "demo")


def test_page_shows_all_parts(run: Path) -> None:
    path = write_report(run)
    assert path == run / "index.html"
    page = Page(path)
    for text in (
        "demo: photo to label map",
        "From 16 pairs, learn to label a photo.",
        "python -m srpkd.train",
        "finished 4 min 41 s",
        "generator parameters mIoU (%) teacher 712,345 82.1 kd 98,765 49.0 ± 1.3 kd + srp 98,765 –",
        "Mean ± standard deviation over 3 runs. Students see 16 pairs.",
        "input teacher student: alone student: kd student: kd + srp student: kd + features truth test pair 0",
        "pixel (3, 4) of test pair 1",
        "preset: demo ngf: 16",
        "exported student (student.onnx: not written yet)",
        f"torch {torch.__version__} device cpu",
    ):
        assert text in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * 7 + 2 * 2 + 3
    sample = images[0]
    assert sample["src"] == "images/000_0.png" and sample["alt"] == "input: test pair 0"
    assert sample["class"] == "small" and int(sample["width"]) % 32 == 0  # all pixels have the same size
    # evaluations first, then the losses in logging order
    assert [image["src"] for image in images[-3:]] == [
        f"images/curves_{name}.png" for name in ("mIoU", "G_GAN", "G_L1")
    ]


def test_an_overview_has_a_row_for_each_sample_and_relation(run: Path, tmp_path: Path) -> None:
    with Image.open(overview(run, tmp_path / "overview.png")) as image:
        assert image.size == (round(7 * 1.5 * 120), round(4 * 1.65 * 120))
        assert np.asarray(image.convert("L")).std() > 20


def test_durations() -> None:
    assert [_duration(seconds) for seconds in (59.6, 3599.4, 3599.6, 7384.0)] == [
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 03 min",
    ]


def test_page_is_self_contained(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"}
    assert (
        "http" not in path.read_text("utf-8")
        and "url(" not in path.read_text("utf-8")
        and "@import" not in path.read_text("utf-8")
    )
    for link in page.links:
        if not link.startswith("#") and link != "data:,":
            assert (run / unquote(link)).is_file(), link
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert all(link[1:] in anchors for link in page.links if link.startswith("#"))


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&{{ 7 * 7 }}"
    picture = {"label": evil, "file": 'images/a" onerror="x<script>.png'}
    run = fill_run(
        tmp_path,
        title=evil,
        task=evil,
        command=evil,
        environment={evil: evil},
        status=evil,
        samples=[{"caption": evil, "images": [picture]}],
        relations=[{"caption": evil, "panels": [picture]}],
        files=[{"label": evil, "file": "javascript:alert(1)"}, {"label": evil, "file": "//elsewhere.example/x"}],
        table={
            "columns": [{"key": "name", "label": evil, "format": "", "help": evil}],
            "rows": [{"name": evil}],
            "notes": [evil],
        },
    )
    save_image(torch.zeros(3, 4, 4), run / picture["file"])
    (run / "javascript:alert(1)").touch()
    (run / "config.yaml").write_text(evil)
    (run / "metrics.jsonl").write_text(metrics_line(evil, 1, **{evil: 1.0, "$\\bad$": 2.0, "D": float("nan")}))
    page = Page(write_report(run))
    assert not {tag for tag, _ in page.tags} & {"script"}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert not any(link.startswith(("javascript:", "//")) for link in page.links)
    assert "javascript%3Aalert%281%29" in page.links
    assert page.text.count(evil) >= 14
    assert [unquote(a["src"]) for tag, a in page.tags if tag == "img"][:2] == [picture["file"]] * 2
    assert all(path.parent == run / "images" for path in run.rglob("curves_*"))
    assert f"D of {evil} is not finite at 1 of 1 points, first at step 1" in page.text


MISSING = {
    "config.yaml": "No configuration",
    "metrics.jsonl": "No curves yet",
    "report.json": "report.json does not exist yet",
}


@pytest.mark.parametrize("missing", MISSING)
def test_missing_part_is_named(run: Path, missing: str) -> None:
    (run / missing).unlink()
    text = Page(write_report(run)).text
    assert [message in text for message in MISSING.values()] == [part == missing for part in MISSING]
    assert ("No table yet" in text) == ("No samples yet" in text) == (missing == "report.json")


@pytest.mark.parametrize("only", [*MISSING, "images/000_0.png"])
def test_one_part_suffices(tmp_path: Path, run: Path, only: str) -> None:
    alone = tmp_path / "alone"
    (alone / only).parent.mkdir(parents=True)
    (run / only).rename(alone / only)
    page = Page(write_report(alone))
    for part, message in MISSING.items():
        assert (message in page.text) == (part != only)
    if only == "report.json":  # the pictures that it names do not exist
        assert page.text.count("not written yet") == 2 * 7 + 2 * 2 + 2
    if only.endswith("png"):
        assert "PNG files in images/ so far: 1;" in page.text


def test_empty_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert "No table yet" in page.text and tmp_path.name in page.text


@pytest.mark.parametrize("content", ['{"title": "half', "[1, 2]", ""])
def test_unreadable_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    assert "report.json cannot be read" in Page(write_report(tmp_path)).text


def test_samples_of_different_lengths_share_columns(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    first = {"caption": "first", "images": [{"label": "input", "file": "images/000_0.png"}]}
    other = {"caption": "other", "images": [{"label": "truth", "file": "images/000_1.png"}]}
    content = json.loads((run / "report.json").read_text("utf-8")) | {"samples": [first, other]}
    (run / "report.json").write_text(json.dumps(content))
    assert "input truth first – other –" in Page(write_report(run)).text


def test_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found nothing in it, expected config\.yaml, metrics\.jsonl, report"):
        write_report(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"found notes\.txt, expected"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="found no such folder"):
        write_report(tmp_path / "absent")


def test_page_is_replaced_atomically(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "metrics.jsonl").write_text("".join(metrics_line("kd seed 1", step, D=1 / step) for step in range(1, 9)))
    path = write_report(run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    write_report(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before  # no other input

    content = json.loads((run / "report.json").read_text("utf-8")) | {"status": "running", "title": "second"}
    (run / "report.json").write_text(json.dumps(content))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        write_report(run)
    assert path.read_bytes() == before[path]
    assert {file for file in run.rglob("*") if file.is_file()} == set(before)  # no temporary file remains

    write_report(run)
    page = Page(path)
    assert "second" in page.text and "running" in page.text
    assert "last logged step: 8 of kd seed 1" in page.text


def test_command_line(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    done = subprocess.run([sys.executable, "-m", "srpkd.report", run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "index.html") and (run / "index.html").is_file()
    with pytest.raises(SystemExit, match=r"error: .*absent is not the folder of a run"):
        report.main([str(run / "absent")])
