"""A finished run's folder, and the page as a browser parses it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from srpkd.reporting.pictures import mark_pixel, relation_picture, save_image

VARIANTS = ("alone", "kd", "kd + srp", "kd + features")
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


def voronoi_image(rng: np.random.Generator, size: int = 32) -> torch.Tensor:
    """Return an image of random coloured cells, (3, size, size) in [-1, 1]."""
    centres, colours = rng.uniform(0, size, (9, 2)), rng.uniform(-1, 1, (9, 3))
    pixels = np.stack(np.mgrid[:size, :size], axis=-1)[:, :, None]
    return torch.tensor(colours[((pixels - centres) ** 2).sum(-1).argmin(-1)]).permute(2, 0, 1)


def metrics_line(stage: str, step: int, **values: float) -> str:
    """Return a line of metrics.jsonl."""
    return json.dumps({"stage": stage, "step": step, "epoch": 1, "seconds": 0.1 * step, **values}) + "\n"


def fill_run(run: Path, **changes: object) -> Path:
    """Write the files of a finished run into a folder; `changes` replace values of report.json."""
    rng = np.random.default_rng(0)
    labels = ["input", "teacher", *(f"student: {variant}" for variant in VARIANTS), "truth"]
    samples, relations = [], []
    for i in range(2):
        scene, feature = voronoi_image(rng), torch.tensor(rng.normal(size=(6, 8, 8)))
        files = [f"images/{i:03d}_{k}.png" for k in range(len(labels))]
        for file in files:
            save_image(scene + 0.1 * torch.randn_like(scene), run / file)
        maps = [f"images/relation_{i:03d}_{k}.png" for k in range(2)]
        save_image(mark_pixel(scene, (3, 4), (8, 8)), run / maps[0])
        save_image(relation_picture(feature, (3, 4), (32, 32), "row"), run / maps[1])
        entries = [{"label": label, "file": file} for label, file in zip(labels, files)]
        samples.append({"caption": f"test pair {i}", "images": entries})
        panels = [{"label": label, "file": file} for label, file in zip(["input", "teacher"], maps)]
        relations.append({"caption": f"pixel (3, 4) of test pair {i}", "panels": panels})
    (run / "config.yaml").write_text("preset: demo\nngf: 16\n")
    with (run / "metrics.jsonl").open("w") as file:
        for stage in ("teacher", *(f"{variant} seed {k}" for variant in VARIANTS for k in range(2))):
            for step in range(1, 61):
                occasional = {"mIoU": step} if step % 20 == 0 else {}
                losses = {"G_GAN": rng.uniform(0.5, 1.5), "G_L1": 50 / step}
                file.write(metrics_line(stage, step, **losses, **occasional))
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
    """The tags, links and text of a page."""

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
