"""The report of the study on photographs: Markdown, JSON and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from bench.study.comparison import describe_difference, draw_differences, mean_and_deviation, paired_difference
from srpkd.files import write_file, write_json
from srpkd.reporting.figures import to_png

from .images import PHOTOGRAPHS, TASKS, TESTED
from .plan import VARIANTS
from .scores import METRICS

INTRODUCTION = """\
**Result**: {shown} of {intervals} confidence intervals of a difference exclude 0; about {by_chance} would by chance.

[The study on generated scenes](study.md) selects the relation loss, its weight and its layer. This page applies the
same options, unchanged, to {count} colour photographs that come inside scikit-image, scikit-learn and matplotlib. Each
partition trains a teacher and its students on crops of {trained} photographs ({pairs} crops of {size} x {size} pixels,
the same for teacher and students) and tests them on crops of the {tested} others, which no network has seen. Students
have 1/7 of their teacher's parameters, start from the same weights and see the same crops in the same order, so their
scores are compared in pairs.

Brackets contain the 95 % confidence interval of the mean difference (Student's t over partitions, separately for each
comparison). An effect is claimed only if the interval excludes 0. The partitions share photographs, so they are less
independent than the intervals assume. There are few photographs, the crops are small, and training is short.

The tasks are those in which a teacher is clearly better than its input on photographs that it has not seen. Colouring
gray photographs is not among them: the output of a teacher that had seen eight photographs was further from the target
than the gray image. Hardware: {device}; torch {torch}.

This page is written by `{command}`."""
PICTURES = """\
![Differences to output distillation](photographs.png)

![Inputs, outputs and targets of one partition](photographs-examples.png)

Of each test photograph of the first partition, the crop of the largest contrast."""
COMPARISONS = (
    ("output", "alone"),
    ("output + SRP", "output"),
    ("output + FitNet", "output"),
    ("output + SRP", "output + FitNet"),
)


def render(result: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    gains = [
        paired_difference(scores_of(runs, variant, metric), scores_of(runs, base, metric))
        for runs in result["tasks"].values()
        for variant, base in COMPARISONS
        for metric in METRICS
    ]
    introduction = INTRODUCTION.format(
        **result["environment"],
        command=result["command"],
        count=len(PHOTOGRAPHS),
        trained=len(PHOTOGRAPHS) - TESTED,
        tested=TESTED,
        pairs=result["pairs"],
        size=result["size"],
        shown=sum(gain.low > 0 or gain.high < 0 for gain in gains) or "none",
        intervals=len(gains),
        by_chance=round(len(gains) / 20),
    )
    lines = ["# Does it help on photographs?", "", introduction, "", PICTURES]
    for task, runs in result["tasks"].items():
        lines += ["", f"## {task.capitalize()}: {TASKS[task].words}", "", *_table(runs), "", *_verdicts(runs)]
    return "\n".join(lines) + "\n"


def scores_of(runs: Sequence[Mapping[str, Any]], network: str, metric: str) -> list[float]:
    """Return a network's scores by partition."""
    return [run["scores"][network][metric] for run in runs]


def _table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    labels = [label for label, _ in METRICS.values()]
    lines = [f"| image | {' | '.join(labels)} |", f"| --- |{' ---: |' * len(METRICS)}"]
    for network in ("input", "teacher", *VARIANTS):
        cells = [mean_and_deviation(scores_of(runs, network, name), digits) for name, (_, digits) in METRICS.items()]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return [*lines, "", f"Mean ± standard deviation over {len(runs)} partition{'s' if len(runs) > 1 else ''}."]


def _verdicts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for variant, base in COMPARISONS:
        parts = []
        for metric, (label, _) in METRICS.items():
            ours, theirs = scores_of(runs, variant, metric), scores_of(runs, base, metric)
            parts.append(f"{label} {describe_difference(ours, theirs)}")
        lines += [f"- {variant} minus {base}:", *(f"    - {part}" for part in parts)]
    return lines


def draw_examples(tasks: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Draw images (P, 3, H, W) in [-1, 1] of each task, one row per P and one column per network; return the PNG."""
    columns = list(next(iter(tasks.values())))
    rows = [row for images in tasks.values() for row in zip(*(images[column] for column in columns))]
    figure = Figure(figsize=(1.25 * len(columns), 1.25 * len(rows) + 0.3), layout="constrained")
    for number, axes in enumerate(figure.subplots(len(rows), len(columns), squeeze=False).flat):
        row, column = divmod(number, len(columns))
        axes.imshow((rows[row][column].permute(1, 2, 0).clamp(-1, 1) + 1).numpy() / 2)
        axes.axis("off")
        if row == 0:
            axes.set_title(columns[column], fontsize=8)
    return to_png(figure, dpi=80)


def draw(result: Mapping[str, Any]) -> bytes:
    """Plot the differences to output distillation, per partition and with their intervals, and return the PNG."""
    variants = [name for name in VARIANTS if name != "output"]
    tasks = result["tasks"]
    figure = Figure(figsize=(2.9 * len(METRICS), 1.9 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(METRICS), sharey=True, squeeze=False)
    for row, (task, runs) in zip(panels, tasks.items()):
        for axes, (metric, (label, _)) in zip(row, METRICS.items()):
            base = scores_of(runs, "output", metric)
            draw_differences(axes, [scores_of(runs, variant, metric) for variant in variants], base)
            axes.set_title(f"{task}: {label}", fontsize=10)
            axes.set_xlabel("difference to output", fontsize=9)
        row[0].set_yticks(range(len(variants)), variants)
    panels[0, 0].set_ylim(len(variants) - 0.5, -0.5)
    return to_png(figure, dpi=150)


def write(result: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Path:
    """Write photographs.md, .json and .png, and photographs-examples.png of ``scores.examples`` for each task.

    Returns:
        The path of photographs.md.
    """
    write_json(folder / "photographs.json", result)
    write_file(folder / "photographs.png", draw(result))
    write_file(folder / "photographs-examples.png", draw_examples(tasks))
    return write_file(folder / "photographs.md", render(result).encode())
