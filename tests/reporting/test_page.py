"""The page of a run, its pictures and its table."""

import json
import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from bench.readme import update_readme
from srpkd import report
from srpkd.reporting import curves, pictures
from srpkd.reporting.page import write_report
from srpkd.reporting.pictures import mark_pixel, relation_picture, relation_row, save_image
from srpkd.reporting.table import format_table

ARMS = ("alone", "kd", "kd + srp", "kd + features")
TABLE = {
    "columns": [
        {"key": "name", "label": "generator", "format": "", "help": ""},
        {"key": "params", "label": "parameters", "format": ",", "help": "trainable numbers"},
        {"key": "miou", "label": "mIoU (%)", "format": ".1f", "help": "mean over classes"},
    ],
    "rows": [
        {"name": "teacher", "params": 712345, "miou": {"mean": 82.13, "std": None, "n": 1}},
        {"name": "kd", "params": 98765, "miou": {"mean": 49.04, "std": 1.26, "n": 3}},
        {"name": "kd + srp", "params": 98765, "miou": None},
    ],
    "notes": ["Students see 16 pairs."],
}


def voronoi(rng: np.random.Generator, size: int = 32) -> torch.Tensor:
    """A coloured scene (3, size, size) in [-1, 1]."""
    centres, colours = rng.uniform(0, size, (9, 2)), rng.uniform(-1, 1, (9, 3))
    places = np.stack(np.mgrid[:size, :size], axis=-1)[:, :, None]
    return torch.tensor(colours[((places - centres) ** 2).sum(-1).argmin(-1)]).permute(2, 0, 1)


def metrics_line(stage: str, step: int, **values: float) -> str:
    return json.dumps({"stage": stage, "step": step, "epoch": 1, "seconds": 0.1 * step, **values}) + "\n"


def fill_run(run: Path, **changes: object) -> Path:
    """Leave in a folder what a finished training run does; changes go into report.json."""
    rng = np.random.default_rng(0)
    labels = ["input", "teacher", *(f"student: {variant}" for variant in ARMS), "truth"]
    samples, relations = [], []
    for i in range(2):
        scene, feature = voronoi(rng), torch.tensor(rng.normal(size=(6, 8, 8)))
        files = [f"images/{i:03d}_{k}.png" for k in range(len(labels))]
        for file in files:
            save_image(scene + 0.1 * torch.randn_like(scene), run / file)
        maps = [f"images/relation_{i:03d}_{k}.png" for k in range(2)]
        save_image(mark_pixel(scene, (3, 4), (8, 8)), run / maps[0])
        save_image(relation_picture(feature, (3, 4), (32, 32)), run / maps[1])
        entries = [{"label": label, "file": file} for label, file in zip(labels, files)]
        samples.append({"caption": f"test pair {i}", "images": entries})
        panels = [{"label": label, "file": file} for label, file in zip(["input", "teacher"], maps)]
        relations.append({"caption": f"pixel (3, 4) of test pair {i}", "panels": panels})
    (run / "config.yaml").write_text("preset: demo\nngf: 16\n")
    with (run / "metrics.jsonl").open("w") as file:
        for stage in ("teacher", *(f"{variant} seed {k}" for variant in ARMS for k in range(2))):
            for step in range(1, 61):
                now_and_then = {"mIoU": step} if step % 20 == 0 else {}
                losses = {"G_GAN": rng.uniform(0.5, 1.5), "G_L1": 50 / step}
                file.write(metrics_line(stage, step, **losses, **now_and_then))
    content = {
        "title": "demo: photo to label map",
        "task": "From 16 pairs, learn to label a photo.",
        "command": "python -m srpkd.train",
        "environment": {"torch": torch.__version__, "device": "cpu"},
        "status": "finished",
        "elapsed_seconds": 281.4,
        "table": TABLE,
        "samples": samples,
        "relations": relations,
        "files": [
            {"label": "the settings", "file": "config.yaml"},
            {"label": "exported student", "file": "student.onnx"},
        ],
    }
    (run / "report.json").write_text(json.dumps(content | changes))
    return run


class Page(HTMLParser):
    """What a browser would make of a page: its tags, links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())
        self.links = [a[key] for _, a in self.tags for key in ("src", "href", "srcset", "action") if key in a]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill_run(tmp_path / "demo")


# --- the page -----------------------------------------------------------------------------------------------


def test_page_shows_everything(run: Path) -> None:
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
        "exported student (student.onnx: not there yet)",
        f"torch {torch.__version__} device cpu",
    ):
        assert text in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * 7 + 2 * 2 + 3
    sample = images[0]
    assert sample["src"] == "images/000_0.png" and sample["alt"] == "input: test pair 0"
    assert sample["class"] == "small" and int(sample["width"]) % 32 == 0  # every pixel of the same size
    # evaluations first, then the losses in the order in which they are logged
    assert [image["src"] for image in images[-3:]] == [
        f"images/curves_{name}.png" for name in ("mIoU", "G_GAN", "G_L1")
    ]


def test_page_stands_alone(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"}
    assert "http" not in path.read_text() and "url(" not in path.read_text() and "@import" not in path.read_text()
    for link in page.links:
        if not link.startswith("#") and link != "data:,":
            assert (run / unquote(link)).is_file(), link
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert all(link[1:] in anchors for link in page.links if link.startswith("#"))


def test_everything_is_escaped(tmp_path: Path) -> None:
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


PARTS = {
    "config.yaml": "No configuration",
    "metrics.jsonl": "No curves yet",
    "report.json": "report.json is not there yet",
}


@pytest.mark.parametrize("missing", PARTS)
def test_a_missing_part_is_said_to_be_missing(run: Path, missing: str) -> None:
    (run / missing).unlink()
    text = Page(write_report(run)).text
    assert [message in text for message in PARTS.values()] == [part == missing for part in PARTS]
    assert ("No table yet" in text) == ("No samples yet" in text) == (missing == "report.json")


@pytest.mark.parametrize("only", [*PARTS, "images/000_0.png"])
def test_one_part_is_enough(tmp_path: Path, run: Path, only: str) -> None:
    alone = tmp_path / "alone"
    (alone / only).parent.mkdir(parents=True)
    (run / only).rename(alone / only)
    page = Page(write_report(alone))
    for part, message in PARTS.items():
        assert (message in page.text) == (part != only)
    if only == "report.json":  # the pictures it names have not been written
        assert page.text.count("not there yet") == 2 * 7 + 2 * 2 + 2
    if only.endswith("png"):
        assert "PNG files in images/ so far: 1;" in page.text


def test_report_without_any_of_its_keys(tmp_path: Path) -> None:
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
    content = json.loads((run / "report.json").read_text()) | {"samples": [first, other]}
    (run / "report.json").write_text(json.dumps(content))
    assert "input truth first – other –" in Page(write_report(run)).text


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found nothing in it, expected config\.yaml, metrics\.jsonl, report"):
        write_report(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"found notes\.txt, expected"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="found no such folder"):
        write_report(tmp_path / "absent")


def test_rewriting_in_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "metrics.jsonl").write_text("".join(metrics_line("kd seed 1", step, D=1 / step) for step in range(1, 9)))
    path = write_report(run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    write_report(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before  # pure

    content = json.loads((run / "report.json").read_text()) | {"status": "running", "title": "second"}
    (run / "report.json").write_text(json.dumps(content))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        write_report(run)
    assert path.read_bytes() == before[path]
    assert {file for file in run.rglob("*") if file.is_file()} == set(before)  # nothing temporary is left

    write_report(run)
    page = Page(path)
    assert "second" in page.text and "running" in page.text
    assert "last step seen: 8 of kd seed 1" in page.text


def test_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    done = subprocess.run([sys.executable, "-m", "srpkd.report", run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "index.html") and (run / "index.html").is_file()
    with pytest.raises(SystemExit, match="2"):
        report.main([str(run / "absent")])
    assert "is not the folder of a run" in capsys.readouterr().err


# --- the curves ---------------------------------------------------------------------------------------------


def test_half_written_last_line(tmp_path: Path) -> None:
    lines = [metrics_line("teacher", step, D=1 / step) for step in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + lines[-1][:-9])
    page = Page(write_report(tmp_path))
    assert "last step seen: 9 of teacher" in page.text
    assert "could not be read" not in page.text


def test_what_the_curves_leave_out_is_said(tmp_path: Path) -> None:
    lines = [metrics_line("teacher", step, D=float("nan") if step in (3, 5) else 0.1) for step in range(1, 10)]
    lines[6:6] = ["\n", "no json\n", '"text"\n', '{"stage": "teacher"}\n', "\N{SNOWMAN}\udcff\n"]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    text = Page(write_report(tmp_path)).text
    assert "D of teacher is not finite at 2 of 9 points, first at step 3;" in text
    assert "Lines of metrics.jsonl that could not be read: 4." in text


def test_seeds_of_an_arm_share_a_colour_and_a_bold_line() -> None:
    steps = np.arange(1.0, 101.0)
    stages = {f"srp seed {k}": np.stack([steps, 0 * steps + k]) for k in range(3)}
    stages["teacher"] = np.stack([steps, steps])
    axes = curves._curve("D", stages, {"srp": "#0072B2", "teacher": "#555555"}, sparse=False).axes[0]
    raw, bold = axes.lines[:4], axes.lines[4:]
    assert [line.get_color() for line in raw] == ["#0072B2"] * 3 + ["#555555"]
    assert [(line.get_label(), line.get_color()) for line in bold] == [("srp", "#0072B2"), ("teacher", "#555555")]
    np.testing.assert_allclose(bold[0].get_ydata(), 1.0)  # the mean of 0, 1 and 2
    assert max(line.get_alpha() for line in raw) < 0.5 and bold[0].get_linewidth() > raw[0].get_linewidth()


def test_scales_of_the_curves() -> None:
    steps = np.arange(1.0, 101.0)
    colours = {"teacher": "k", "srp": "b"}

    def scales(values: np.ndarray, sparse: bool = False, teacher: int = 1) -> tuple[str, str]:
        stages = {"teacher": np.stack([steps * teacher, values]), "srp": np.stack([steps, values])}
        axes = curves._curve("D", stages, colours, sparse).axes[0]
        return axes.get_xscale(), axes.get_yscale()

    assert scales(np.exp(-steps / 10)) == ("linear", "log")
    assert scales(np.exp(-steps / 10), sparse=True) == ("linear", "linear")
    assert scales(np.exp(-steps / 10) - 0.5) == ("linear", "linear")
    assert scales(1 + steps / 100) == ("linear", "linear")
    assert scales(1 + steps / 100, teacher=5) == ("log", "linear")


def test_smoothing() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(20_000.0)
    noisy = np.stack([steps, steps / 20_000 + rng.normal(size=steps.size)])
    at, values = curves._smooth(noisy[:, rng.permutation(steps.size)], share=0.05)
    assert len(at) <= 1001 and (np.diff(at) > 0).all()
    inner = slice(25, -25)  # the window is cut at the ends
    assert abs(values - at / 20_000)[inner].max() < 0.2
    at, values = curves._smooth(np.array([[5.0], [2.0]]), share=0.05)
    assert (at, values) == ([5.0], [2.0])


def test_a_long_run_is_fast(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, values in enumerate(rng.uniform(0.5, 1.5, (50_000, 4)).round(4).tolist()):
            file.write(metrics_line(f"srp seed {step % 2}", step, **dict(zip(("G", "D", "kd", "srp"), values))))
    start = time.process_time()  # of this process alone: others on the machine do not count
    write_report(tmp_path)
    assert time.process_time() - start < 5
    assert (tmp_path / "images/curves_srp.png").stat().st_size < 300_000


# --- the table ----------------------------------------------------------------------------------------------


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
    table = TABLE | {"rows": [*TABLE["rows"], {"name": "a|b <i>", "miou": {"mean": 50.0, "std": 2.0, "n": 5}}]}
    assert format_table(table, markdown=True) == "\n".join(
        [
            "| generator | parameters | mIoU (%) |",
            "| --- | ---: | ---: |",
            "| teacher | 712,345 | 82.1 |",
            "| kd | 98,765 | 49.0 ± 1.3 |",
            "| kd + srp | 98,765 | – |",
            r"| a\|b &lt;i> | – | 50.0 ± 2.0 |",
            "",
            "Mean ± standard deviation over 3 to 5 runs.",
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


# --- the pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["row", "cosine", "none"])
def test_relation_row_is_a_row_of_the_matrix(normalize: str) -> None:
    feature = np.random.default_rng(0).normal(size=(5, 3, 4))
    feature[:, 2, 1] = 0  # a dead pixel
    q = feature.reshape(5, 12).T
    gram = q @ q.T
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore"):
        matrix = {
            "row": gram / np.linalg.norm(gram, axis=1, keepdims=True),
            "cosine": gram / (norms[:, None] * norms[None, :]),
            "none": gram,
        }[normalize]
    for y, x in [(0, 0), (1, 3), (2, 1)]:
        row = relation_row(torch.tensor(feature), (y, x), normalize)
        assert row.dtype == torch.float32 and row.shape == (3, 4)
        expected = np.nan_to_num(matrix[y * 4 + x]).reshape(3, 4)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["row", "cosine", "none"])
def test_relation_picture_colours(normalize: str, dtype: torch.dtype) -> None:
    # columns of the map: alike, unrelated, opposite
    feature = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=dtype, requires_grad=True)
    picture = relation_picture(feature[:, None].expand(2, 3, 3), (0, 0), (30, 60), normalize).astype(int)
    assert picture.shape == (30, 60, 3)
    red, white, blue = picture[25, 5], picture[25, 30], picture[25, 55]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50 and white.min() > 240
    assert (picture[20:, :20] == red).all() and (picture[20:, 40:] == blue).all()  # repeated, not blended
    assert (picture[5, 10] == red).all() and not picture[10, 5].any()  # the cell is seen, and framed


def test_relation_picture_of_dead_features_is_white() -> None:
    picture = relation_picture(torch.zeros(3, 4, 4), (0, 0), (16, 16), "row")
    assert (picture[8:, 8:] > 240).all()


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (3, 3), (37, 64)])
@pytest.mark.parametrize("pixel", [(0, 0), (4, 6), (2, 3)])
def test_marked_cell_is_the_pixels_own(size: tuple[int, int], pixel: tuple[int, int]) -> None:
    """Of any size, also one smaller than the map: the frame is outside of the cell and thinner than 5 places."""
    image = torch.zeros(3, *size)
    image[0] = 0.5
    marked = mark_pixel(image, pixel, (8, 5, 7))
    framed = (marked != pictures._to_pixels(image)).any(-1)
    assert marked.shape == (*size, 3) and framed.any()
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, (5, 7)))
    cell = (rows == pixel[0])[:, None] & (columns == pixel[1])
    assert not (framed & cell).any()
    near = [np.flatnonzero(inside.any(axis)) for inside in (framed | cell,) for axis in (1, 0)]
    assert all(len(places) <= n // cells + 1 + 4 for places, n, cells in zip(near, size, (5, 7)))


def test_bad_pictures_are_refused() -> None:
    feature = torch.randn(4, 5, 6)
    with pytest.raises(ValueError, match=r"\(y, x\) inside the 5 x 6 feature map, got \(5, 0\)"):
        relation_picture(feature, (5, 0), (20, 24))
    with pytest.raises(ValueError, match=r"\(C, h, w\) of one image, got \(1, 4, 5, 6\)"):
        relation_row(feature[None], (0, 0))
    with pytest.raises(ValueError, match='"row", "cosine" or "none", got \'rows\''):
        relation_row(feature, (0, 0), "rows")
    with pytest.raises(ValueError, match=r"got \(0, -1\)"):
        mark_pixel(torch.zeros(3, 20, 24), (0, -1), feature.shape)
    with pytest.raises(ValueError, match=r"got \(4, 5, 6\)"):
        save_image(feature, "never.png")
    with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), got float64 \(4, 4, 3\)"):
        save_image(np.zeros((4, 4, 3)), "never.png")


def test_save_image(tmp_path: Path) -> None:
    ramp = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, float("nan")], dtype=torch.float64, requires_grad=True)
    path = save_image(ramp.expand(1, 2, 6), tmp_path / "new" / "ramp.png")
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2, 6, 3) and pixels[0, :, 1].tolist() == [0, 0, 128, 255, 255, 0]
    colour = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 2, 2)
    save_image(colour, path)
    assert np.asarray(Image.open(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 4
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (np.asarray(Image.open(save_image(array, path))) == array).all()


README = ROOT / "README.md"


def test_the_readme_shows_the_table_that_the_demo_printed() -> None:
    demo = json.loads((README.parent / "docs" / "demo.json").read_text())
    assert format_table(demo["table"], markdown=True) in README.read_text()


def test_a_readme_is_brought_up_to_date_between_its_markers(run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo table: begin -->\nold\n<!-- demo table: end -->\nafter\n")
    update_readme(run, readme)
    table = format_table(json.loads((run / "report.json").read_text())["table"], markdown=True)
    assert readme.read_text() == f"before\n<!-- demo table: begin -->\n{table}\n<!-- demo table: end -->\nafter\n"
    assert (tmp_path / "docs" / "demo.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the markers"):
        update_readme(run, readme)
