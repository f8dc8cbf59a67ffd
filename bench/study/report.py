"""The study's report: Markdown, JSON and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srpkd.files import write_file, write_json
from srpkd.reporting.figures import to_png

from .comparison import describe_difference, draw_differences, mean_and_deviation, paired_difference
from .plan import SETTINGS, describe_options

INTRODUCTION = """\
Students with 1/7 of their teacher's parameters translate photos of generated scenes into label maps. The score is the
mean intersection over union of the six classes, in percent. Without pairs, CycleGAN may learn any mapping of classes to
colours, so the score of unpaired students is the PSNR to their teacher's output.

The loss, its weight and its layer are selected on one data set (below) and evaluated on others, which differ in
textures, colours, training scenes, teacher and seed. Students of one data set start from the same weights and see the
same images in the same order, so their scores are compared in pairs. Brackets contain the 95 % confidence interval of
the mean difference (Student's t over data sets, separately for each comparison). An effect is claimed only if the
interval excludes 0. All images are small and training is short. Hardware: {device}; torch {torch}.

This page is written by `{command}`."""
SELECTION = """\
Mean and standard deviation over {seeds} seeds, for students that see 12 pairs of one data set, and differences to the
student in the first row. The best of many candidates looks better than it is, so it is evaluated on other data sets.
The relation loss had more candidates than feature matching."""
COMPARISONS = (
    ("output", "alone"),
    ("SRP", "alone"),
    ("FitNet", "alone"),
    ("output + SRP", "output"),
    ("output + FitNet", "output"),
    ("output + SRP", "output + FitNet"),
)


def render(result: Mapping[str, Any]) -> str:
    """Return the report as Markdown: the evaluation on other data sets, then the selection."""
    lines = ["# Does the relation loss help?", ""]
    lines += [*_results(result["judged"]), ""]
    lines += [INTRODUCTION.format(**result["environment"], command=result["command"]), ""]
    lines += ["![Differences to output distillation](study.png)", "", "## Evaluation on other data sets", ""]
    for judged in result["judged"]:
        lines += _evaluation(judged)
    seeds = len(result["choice"][0]["base"]["scores"])
    lines += ["## Selection on data set 1", "", SELECTION.format(seeds=seeds), ""]
    for step in result["choice"]:
        lines += _selection(step)
    return "\n".join(lines).rstrip() + "\n"


def _results(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of what the relation loss and feature matching add to output distillation, by setting."""
    lines = ["What each loss adds to output distillation, on data sets that no option was selected on:", ""]
    lines += ["| | SRP | FitNet | SRP instead of FitNet |", "| --- | ---: | ---: | ---: |"]
    for entry in judged:
        output, srp, fitnet = (
            entry["variants"][name]["scores"] for name in ("output", "output + SRP", "output + FitNet")
        )
        cells = [str(paired_difference(*pair)) for pair in ((srp, output), (fitnet, output), (srp, fitnet))]
        lines.append(f"| {entry['setting']}, {SETTINGS[entry['setting']].label} | {' | '.join(cells)} |")
    return lines


def _evaluation(judged: Mapping[str, Any]) -> list[str]:
    """Return the section of one setting: a table of the variants, and the verdicts."""
    scores = {variant: entry["scores"] for variant, entry in judged["variants"].items()}
    count, label = len(judged["datasets"]), SETTINGS[judged["setting"]].label
    bases = [variant for variant in ("alone", "output") if variant in scores]
    lines = [f"### {judged['setting'].capitalize()}", ""]
    lines += [f"| student | options | {label} | {' | '.join(f'minus {base}' for base in bases)} |"]
    lines += [f"| --- | --- | ---: |{' ---: |' * len(bases)}"]
    if judged["teachers"]:
        lines += [f"| teacher | | {_mean(judged['teachers'])} |{' |' * len(bases)}"]
    for variant, own in scores.items():
        differences = [str(paired_difference(own, scores[base])) if variant != base else "" for base in bases]
        options = describe_options(judged["variants"][variant]["options"])
        lines.append(f"| {variant} | {options} | {_mean(own)} | {' | '.join(differences)} |")
    lines += ["", f"Mean ± standard deviation over {count} data set{'s' if count > 1 else ''}.", ""]
    for variant, base in COMPARISONS:
        if base in scores:
            lines.append(f"- {variant} minus {base}: {describe_difference(scores[variant], scores[base])}")
    return [*lines, ""]


def _selection(step: Mapping[str, Any]) -> list[str]:
    """Return the section of one step: a table of the candidates."""
    base = step["base"]
    lines = [f"### {step['step'].capitalize()}", ""]
    lines += ["| student | mIoU % | difference | |", "| --- | ---: | ---: | --- |"]
    lines.append(f"| {describe_options(base['options'])} | {_mean(base['scores'])} | | |")
    for entry in step["tried"]:
        gain = paired_difference(entry["scores"], base["scores"])
        mark = "selected" if entry["options"] == step["chosen"] else ""
        lines.append(f"| {describe_options(entry['options'])} | {_mean(entry['scores'])} | {gain} | {mark} |")
    return [*lines, ""]


def _mean(values: Sequence[float]) -> str:
    return mean_and_deviation(values, 1)


def draw(result: Mapping[str, Any]) -> bytes:
    """Plot the differences to output distillation, per data set and with their intervals, and return the PNG."""
    judged = result["judged"]
    variants = list(dict.fromkeys(name for entry in judged for name in entry["variants"] if name != "output"))
    figure = Figure(figsize=(2.9 * len(judged), 2.6), layout="constrained")
    panels = figure.subplots(1, len(judged), sharey=True, squeeze=False)[0]
    for axes, entry in zip(panels, judged):
        _draw_setting(axes, entry, variants)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].invert_yaxis()
    return to_png(figure, dpi=150)


def _draw_setting(axes: Axes, entry: Mapping[str, Any], variants: Sequence[str]) -> None:
    """Plot one setting: a line per variant, with a dot per data set and the mean with its interval."""
    base = entry["variants"]["output"]["scores"]
    scores = [entry["variants"][variant]["scores"] if variant in entry["variants"] else None for variant in variants]
    draw_differences(axes, scores, base)
    axes.set_title(f"{entry['setting']}, {len(entry['datasets'])} data sets", fontsize=10)
    axes.set_xlabel(f"{SETTINGS[entry['setting']].label},\ndifference to output", fontsize=9)


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write study.json, study.png and study.md, and return the path of study.md."""
    write_json(folder / "study.json", result)
    write_file(folder / "study.png", draw(result))
    return write_file(folder / "study.md", render(result).encode())
