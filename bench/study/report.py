"""The study's report: Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from srpkd.files import atomic_write
from srpkd.reporting.curves import VARIANT_COLOURS

from .plan import SETTINGS, spelled
from .statistics import difference

# --- the report -----------------------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """The report in Markdown: what was found on the other worlds first, then how the weights were chosen."""
    lines = ["# Does the relation loss help?", ""]
    lines += [
        INTRODUCTION.format(**result["environment"], command=result["command"]),
        "",
        "![Differences](study.png)",
        "",
    ]
    lines += ["## Judged on other worlds", ""]
    for judged in result["judged"]:
        lines += _judged(judged)
    lines += ["## Chosen on world 1", "", CHOICE.format(seeds=len(result["choice"][0]["base"]["scores"])), ""]
    for step in result["choice"]:
        lines += _chosen(step)
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """\
This page is written by `{command}`.

Students of a seventh of their teacher's parameters turn photos of generated scenes into label maps; the score is the
mean intersection over union of the six classes, in percent, or, of unpaired students, the likeness to their teacher's
output, since without pairs CycleGAN settles on any mapping of classes to colours. What was chosen on one world
(below) is judged on others, whose textures, colours, training scenes, teachers and seeds are their own. Students of
one world start alike and see the same images in the same order, so that they are compared pair by pair. In brackets
stands the 95 % confidence interval of the mean difference (Student's t, over worlds, each comparison by itself): a
claim is made only where it does not hold 0. Everything is on small images, after short training; {device}, torch
{torch}."""
CHOICE = """\
Means over {seeds} seeds of one world's students, which saw a dozen pairs, and differences to the student named first.
The best of many that were tried looks better than it is: that is why it is judged elsewhere. The relation loss had more
tries than feature matching had."""


def _judged(judged: Mapping[str, Any]) -> list[str]:
    scores = {variant: entry["scores"] for variant, entry in judged["variants"].items()}
    count, label = len(judged["worlds"]), SETTINGS[judged["setting"]].label
    bases = [variant for variant in ("alone", "output") if variant in scores]
    lines = [f"### {judged['setting'].capitalize()}", ""]
    lines += [f"| student | its options | {label} | {' | '.join(f'minus {base}' for base in bases)} |"]
    lines += [f"| --- | --- | ---: |{' ---: |' * len(bases)}"]
    if judged["teachers"]:
        lines += [f"| teacher | | {_mean(judged['teachers'])} |{' |' * len(bases)}"]
    for variant, own in scores.items():
        cells = [str(difference(own, scores[base])) if variant != base else "" for base in bases]
        lines.append(
            f"| {variant} | {spelled(judged['variants'][variant]['options'])} | {_mean(own)} | {' | '.join(cells)} |"
        )
    lines += ["", f"Mean ± standard deviation over {count} world{'s' if count > 1 else ''}.", ""]
    for variant, base in (
        ("output", "alone"),
        ("SRP", "alone"),
        ("FitNet", "alone"),
        ("output + SRP", "output"),
        ("output + FitNet", "output"),
        ("output + SRP", "output + FitNet"),
    ):
        if base in scores:
            gain = difference(scores[variant], scores[base])
            wins = sum(a > b for a, b in zip(scores[variant], scores[base]))
            lines.append(f"- {variant} minus {base}: {gain}, better in {wins} of {count}: **{gain.verdict}**")
    return [*lines, ""]


def _chosen(step: Mapping[str, Any]) -> list[str]:
    base = step["base"]
    lines = [
        f"### {step['step'].capitalize()}",
        "",
        "| student | mIoU % | difference | |",
        "| --- | ---: | ---: | --- |",
    ]
    lines.append(f"| {spelled(base['options'])} | {_mean(base['scores'])} | | |")
    for entry in step["tried"]:
        gain = difference(entry["scores"], base["scores"])
        mark = "chosen" if entry["options"] == step["chosen"] else ""
        lines.append(f"| {spelled(entry['options'])} | {_mean(entry['scores'])} | {gain} | {mark} |")
    return [*lines, ""]


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def draw(result: Mapping[str, Any]) -> bytes:
    """The differences to output distillation, world by world and with their intervals, as PNG."""
    judged = result["judged"]
    figure = Figure(figsize=(4.2 * len(judged), 2.9), layout="constrained")
    plots = figure.subplots(1, len(judged), sharey=True, squeeze=False)[0]
    variants = [
        variant
        for variant in dict.fromkeys(variant for entry in judged for variant in entry["variants"])
        if variant != "output"
    ]
    for plot, entry in zip(plots, judged):
        base = entry["variants"]["output"]["scores"]
        for place, variant in enumerate(variants):
            if variant not in entry["variants"]:
                continue
            own, colour = entry["variants"][variant]["scores"], VARIANT_COLOURS[1 + place]
            gain = difference(own, base)
            plot.plot(
                [a - b for a, b in zip(own, base)], [place] * len(own), "o", color=colour, alpha=0.3, markersize=4
            )
            reach = 0.0 if math.isnan(gain.low) else gain.high - gain.mean
            plot.errorbar(gain.mean, place, xerr=reach, fmt="D", color=colour, capsize=4, markersize=6)
        plot.axvline(0, color="#555555", linewidth=1)
        plot.set_title(f"{entry['setting']}, {len(entry['worlds'])} worlds", fontsize=10)
        plot.set_xlabel(f"{SETTINGS[entry['setting']].label}, minus that of output", fontsize=9)
        plot.spines[["top", "right"]].set_visible(False)
    plots[0].set_yticks(range(len(variants)), variants)
    plots[0].invert_yaxis()
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write study.json, study.md and study.png, and give the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "study.json": json.dumps(result, indent=1).encode(),
        "study.png": draw(result),
        "study.md": render(result).encode(),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / "study.md"
