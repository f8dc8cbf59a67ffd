"""Does the relation loss help, and in which form, at which layer, with which weight? ``python -m srpkd.study``.

Choosing: on one generated world, one thing after the other, by the mean over the seeds. First the weight of output
distillation; upon it the weight of feature matching (FitNet), and the form and weight of the relation loss; then the
layers that it compares. Judging: on other worlds, each with textures, colours, training scenes, a teacher and a seed of
its own. Students that are compared start alike and see the same images in the same order, so their scores are compared
pair by pair: an effect is claimed where the 95 % confidence interval of the mean difference does not hold 0.

Every student is a run of ``srpkd.train`` in a folder of its own. A study that was stopped goes on: what is there is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from .arguments import positive
from .checkpoint import CheckpointError, atomic_write
from .config import (
    RESUME_OPTIONS,
    TrainConfig,
    as_flags,
    check_keys,
    parse_arguments,
    read_config,
    read_preset,
    teacher_config,
    to_yaml,
)
from .data import DataError
from .extras import require
from .fit import Diverged
from .report import ARM_COLOURS
from .results import device_name
from .state import has_state
from .train import run

Options = dict[str, Any]

NOTHING: Options = {"lambda_kd": 0.0, "lambda_srp": 0.0, "lambda_feature": 0.0}
# Weights beside an L1 loss to the target that weighs 100. An untrained student is 0.5 from its teacher's output (L1),
# 0.7 from its features (MSE), and its row-normalised relations are 0.03 apart in l1. Every form of the relation loss is
# tried from a tenth of what output distillation of weight 100 begins with to about as much.
OUTPUT_WEIGHTS = (10.0, 30.0, 100.0, 300.0)
FEATURE_WEIGHTS = (10.0, 30.0, 100.0)
RELATION_FORMS: tuple[tuple[Options, tuple[float, ...]], ...] = (
    ({"normalize": "row", "distance": "l1"}, (100.0, 300.0, 1000.0)),
    ({"normalize": "row", "distance": "l2"}, (2000.0, 6000.0, 20000.0)),
    ({"normalize": "row", "distance": "huber", "delta": 0.03}, (15000.0,)),
    ({"normalize": "cosine", "distance": "l1"}, (15.0, 50.0, 150.0)),
    ({"normalize": "cosine", "distance": "l2"}, (60.0, 200.0, 600.0)),
    ({"normalize": "none", "distance": "l1"}, (1.0,)),
)
# Of a ResNet whose encoder ends at model.9, with factors of the weight that was chosen there: amid and behind the
# blocks, two at once; and half-way down and up, where row-normalised relations, of four times as many pixels, are
# smaller.
LAYERS: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = (
    (("model.12",), (1.0,)),
    (("model.15",), (1.0,)),
    (("model.9", "model.15"), (1.0,)),
    (("model.6",), (1.0, 3.0)),
    (("model.18",), (1.0, 3.0)),
)


class Setting(NamedTuple):
    """A task to judge on: a preset, what is different from it, the factor of all chosen weights, and the score.

    CycleGAN's cycle loss weighs a tenth of pix2pix's L1 loss, and so do the others beside it. No unpaired image says
    which colour is which class, and CycleGAN settles on any mapping: a student of it is held to its teacher's.
    """

    preset: str
    options: Options
    factor: float
    metric: str  # as in metrics.jsonl
    label: str


SETTINGS = {
    "few pairs": Setting("demo", {}, 1.0, "mIoU", "mIoU %"),
    "many pairs": Setting("demo", {"max_dataset_size": None}, 1.0, "mIoU", "mIoU %"),
    "unpaired": Setting("demo-unpaired", {}, 0.1, "teacher_psnr A to B", "PSNR to teacher dB"),
}
CHOOSING = "few pairs"
EXTENSIONS = 3  # times that a larger weight is tried because the largest was the best
OWN_OPTIONS = {  # what the study itself says of every run
    "name", "runs_dir", "seed", "seeds", "arms", "resume", "teacher", "teacher_B", "dataroot", "world_variant", "model",
    "dataset_mode", "direction", "time_budget", "layers", "normalize", "distance", "delta", *NOTHING,
}  # fmt: skip


class Difference(NamedTuple):
    """Mean of paired differences, and the 95 % confidence interval of it."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "too few pairs to say"
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How much better `ours` are than `theirs`, scores of the same worlds and seeds in the same order.

    The interval is Student's t: it holds for differences that scatter about normally. Of one pair there is none (NaN).

    Raises:
        ValueError: they are not as many.
        ImportError: scipy is missing.
    """
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(gains), len(gains)
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    stats = require("scipy.stats", "study", "a confidence interval")
    reach = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(gains) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach)


# --- training -------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What a study's command line says; see ``parser``."""

    runs_dir: str
    seeds: int
    settings: dict[str, int]  # what is judged, and on how many worlds
    workers: int
    options: Options


def teacher(study: Study, setting: str, world: int) -> TrainConfig:
    """The run of a world's teacher. All paired settings share it."""
    config = _config(study, setting, world, NOTHING)
    seen = replace(teacher_config(config), teacher_netG=None, max_dataset_size=config.teacher_max_dataset_size)
    return replace(seen, name=f"teacher-{config.model}-world{world}", seed=world)


def students(study: Study, setting: str, world: int, seed: int, seeds: int, options: Options) -> TrainConfig:
    """The run of a world's students of `seeds` seeds from `seed` on, all alike otherwise."""
    config = _config(study, setting, world, SETTINGS[setting].options | options)
    name = f"{setting.replace(' ', '-')}-world{world}-seed{seed}-{spelled(options).replace(' ', '-')}"
    # one that learns nothing from a teacher goes without, as the trainer wants it
    taught_by = str(_folder(teacher(study, setting, world))) if config.learns_from_teacher else None
    return replace(config, name=name, teacher=taught_by, teacher_netG=None, seed=seed, seeds=seeds)


def _config(study: Study, setting: str, world: int, options: Options) -> TrainConfig:
    preset = read_preset(SETTINGS[setting].preset)
    for name in ("arms", "seeds", "time_budget"):
        preset.pop(name, None)
    # what a student learns hangs on no default of the trainer's, since those are chosen from this
    form = {"normalize": "row", "distance": "l1", "delta": 1.0}
    common = {"world_variant": world, "runs_dir": study.runs_dir, "samples": 2} | form
    return TrainConfig(**preset | common | study.options | options).resolved()


def spelled(options: Options) -> str:
    """Options in a few words, such as "kd 100, srp 300 row l2"."""
    words = []
    for name, value in options.items():
        if name == "layers":
            words.append(" and ".join(value))
        elif isinstance(value, str):
            words.append(value)
        elif value:
            words.append(f"{name.removeprefix('lambda_')} {value:g}")
    return " ".join(words) or "alone"


def train(study: Study, setting: str, runs: Sequence[TrainConfig]) -> list[list[float]]:
    """Do those runs that are not finished, a few at a time: the setting's scores of each, seed by seed.

    Raises:
        ValueError: a folder of a run's name holds something else.
        DataError, CheckpointError, Diverged: as ``srpkd.train.run``.
    """
    missing = [config for config in runs if not is_finished(config)]
    if study.workers == 1 or len(missing) < 2:
        for config in tqdm(missing, desc="runs", disable=not missing):
            train_one(config)
    else:
        # a run at a time in each process; forked ones would inherit torch's threads
        context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // study.workers)
        with ProcessPoolExecutor(study.workers, context, _begin_worker, (threads,)) as pool:
            waiting = [pool.submit(train_one, config) for config in missing]
            try:
                for done in tqdm(waiting, desc="runs"):
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [scores(config, SETTINGS[setting].metric) for config in runs]


def _begin_worker(threads: int) -> None:
    """Have so many threads, and end when the study does, however it is ended."""
    torch.set_num_threads(threads)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def train_one(config: TrainConfig) -> None:
    """Do a run, or what is left of it; what it prints goes to a file beside its folder."""
    folder = _folder(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stopped = str(folder) if has_state(folder) else None
    with (
        open(folder.with_name(f"{folder.name}.log"), "a", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        run(replace(config, resume=stopped))


def is_finished(config: TrainConfig) -> bool:
    """Whether a run is there, whole.

    Raises:
        ValueError: its folder is there, but is of other options, or can neither be read nor gone on with.
    """
    folder = _folder(config)
    if not folder.exists():
        return False
    try:
        there = read_config(str(folder / "config.yaml"))
        finished = json.loads((folder / "report.json").read_text())["status"] == "finished"
    except (ValueError, OSError, KeyError) as error:
        if has_state(folder):
            return False  # stopped before its page was written
        raise ValueError(f"{folder} is in the way: it is not a run that can be gone on with; move it away") from error
    wanted = yaml.safe_load(to_yaml(config))
    moved = RESUME_OPTIONS | {"teacher"}  # which lies beside it, wherever that is
    if changed := [name for name in wanted if name not in moved and wanted[name] != there.get(name)]:
        differences = ", ".join(f"{name} was {there.get(name)!r} and is {wanted[name]!r}" for name in changed)
        raise ValueError(f"{folder} is of another study: {differences}; take another --runs_dir")
    return finished


def scores(config: TrainConfig, metric: str) -> list[float]:
    """A finished run's students by this metric, seed by seed."""
    lines = map(json.loads, (_folder(config) / "metrics.jsonl").read_text().splitlines())
    return [values[metric] for values in lines if metric in values]


def _folder(config: TrainConfig) -> Path:
    return Path(config.runs_dir, config.name)


# --- choosing and judging -------------------------------------------------------------------------------------------


def choose(study: Study, world: int = 1) -> list[dict[str, Any]]:
    """The steps of choosing, in order: what was tried, its scores by seed, and what was chosen.

    Returns:
        [{"step", "base", "tried": [{"options", "scores"}], "chosen"}]: `base` is what `tried` is compared with.
    """
    train(study, CHOOSING, [teacher(study, CHOOSING, world)])
    steps: list[dict[str, Any]] = []

    def step(name: str, base: Options, weight: str, candidates: Sequence[Options]) -> Options:
        """Try the candidates, and larger weights as long as the largest of its kind is the best."""
        tried = list(candidates)
        for _ in range(1 + EXTENSIONS):
            runs = [students(study, CHOOSING, world, 0, study.seeds, options) for options in (base, *tried)]
            base_scores, *found = train(study, CHOOSING, runs)
            best = tried[max(range(len(tried)), key=lambda number: statistics.fmean(found[number]))]
            if any(best | {weight: other[weight]} == other and other[weight] > best[weight] for other in tried):
                break
            tried.append(best | {weight: 3 * best[weight]})
        steps.append(
            {
                "step": name,
                "base": {"options": base, "scores": base_scores},
                "tried": [{"options": options, "scores": own} for options, own in zip(tried, found)],
                "chosen": best,
            }
        )
        return best

    kinds = [NOTHING | {"lambda_kd": weight} for weight in OUTPUT_WEIGHTS]
    output = step("output distillation", NOTHING, "lambda_kd", kinds)
    kinds = [output | {"lambda_feature": weight} for weight in FEATURE_WEIGHTS]
    step("feature matching", output, "lambda_feature", kinds)
    kinds = [output | {"lambda_srp": weight} | form for form, weights in RELATION_FORMS for weight in weights]
    relation = step("relation loss: form and weight", output, "lambda_srp", kinds)
    kinds = [
        relation | {"lambda_srp": relation["lambda_srp"] * factor, "layers": {name: name for name in names}}
        for names, factors in LAYERS
        for factor in factors
    ]
    step("relation loss: layers", output, "lambda_srp", [relation, *kinds])
    return steps


def arms_of(steps: Sequence[Mapping[str, Any]], factor: float) -> dict[str, Options]:
    """The students that are judged: what was chosen, together and by itself; all weights times `factor`."""
    chosen = {step["step"]: step["chosen"] for step in steps}
    both, output = chosen["relation loss: layers"], chosen["output distillation"]
    feature = chosen["feature matching"]
    arms = {
        "alone": NOTHING,
        "output": output,
        "output + SRP": both,
        "output + FitNet": feature,
        "SRP": both | {"lambda_kd": 0.0},
        "FitNet": feature | {"lambda_kd": 0.0},
    }
    return {
        arm: {name: value * factor if name in NOTHING else value for name, value in options.items()}
        for arm, options in arms.items()
    }


def judge(study: Study, setting: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Train what was chosen on worlds 2, 3, ..., each with its own teacher and seed.

    Returns:
        {"setting", "worlds", "teachers": scores, "arms": {name: {"options", "scores"}}}, scores by world; a teacher
        has no likeness to itself.
    """
    worlds = range(2, 2 + study.settings[setting])
    arms = arms_of(steps, SETTINGS[setting].factor)
    if SETTINGS[setting].metric.startswith("teacher"):
        del arms["alone"]  # who has no teacher has no likeness to it
    teachers = train(study, setting, [teacher(study, setting, world) for world in worlds])
    pairs = [(arm, world) for world in worlds for arm in arms]
    found = train(study, setting, [students(study, setting, world, 1000 * world, 1, arms[arm]) for arm, world in pairs])
    by_arm = {arm: [own[0] for (name, _), own in zip(pairs, found) if name == arm] for arm in arms}
    return {
        "setting": setting,
        "worlds": list(worlds),
        "teachers": [own[0] for own in teachers if own],
        "arms": {arm: {"options": options, "scores": by_arm[arm]} for arm, options in arms.items()},
    }


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
    scores = {arm: entry["scores"] for arm, entry in judged["arms"].items()}
    count, label = len(judged["worlds"]), SETTINGS[judged["setting"]].label
    bases = [arm for arm in ("alone", "output") if arm in scores]
    lines = [f"### {judged['setting'].capitalize()}", ""]
    lines += [f"| student | its options | {label} | {' | '.join(f'minus {base}' for base in bases)} |"]
    lines += [f"| --- | --- | ---: |{' ---: |' * len(bases)}"]
    if judged["teachers"]:
        lines += [f"| teacher | | {_mean(judged['teachers'])} |{' |' * len(bases)}"]
    for arm, own in scores.items():
        cells = [str(difference(own, scores[base])) if arm != base else "" for base in bases]
        lines.append(f"| {arm} | {spelled(judged['arms'][arm]['options'])} | {_mean(own)} | {' | '.join(cells)} |")
    lines += ["", f"Mean ± standard deviation over {count} world{'s' if count > 1 else ''}.", ""]
    for arm, base in (
        ("output", "alone"),
        ("SRP", "alone"),
        ("FitNet", "alone"),
        ("output + SRP", "output"),
        ("output + FitNet", "output"),
        ("output + SRP", "output + FitNet"),
    ):
        if base in scores:
            gain = difference(scores[arm], scores[base])
            wins = sum(a > b for a, b in zip(scores[arm], scores[base]))
            lines.append(f"- {arm} minus {base}: {gain}, better in {wins} of {count}: **{gain.verdict}**")
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
    arms = [arm for arm in dict.fromkeys(arm for entry in judged for arm in entry["arms"]) if arm != "output"]
    for plot, entry in zip(plots, judged):
        base = entry["arms"]["output"]["scores"]
        for place, arm in enumerate(arms):
            if arm not in entry["arms"]:
                continue
            own, colour = entry["arms"][arm]["scores"], ARM_COLOURS[1 + place]
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
    plots[0].set_yticks(range(len(arms)), arms)
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


# --- the command line -----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="srpkd study",
        description="Whether the relation loss helps on generated images: weights are chosen on one world and judged "
        "on others. Takes hours on a CPU; a study that was stopped goes on when it is called again.",
        epilog='example, on a GPU: srpkd study --options "{world_size: 128, batch_size: 8}" --workers 1',
    )
    add = result.add_argument
    add("--runs_dir", default="runs/study", help="where its runs are kept, and the report (default: %(default)s)")
    add("--seeds", type=positive, default=5, help="students of each kind in choosing (default: %(default)s)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is judged (default: all)")
    add(
        "--worlds",
        nargs="+",
        type=positive,
        default=[6],
        help="worlds that each is judged on, or one number for all (6)",
    )
    add(
        "--workers",
        type=positive,
        default=min(2, os.cpu_count() or 1),
        help="runs at a time (default here: %(default)s)",
    )
    add("--options", default="{}", metavar="YAML", help="options of srpkd train that all runs have, {name: value, ...}")
    add("--docs", type=Path, metavar="FOLDER", help="write the report there too")
    return result


def common_options(text: str) -> Options:
    """The options of all runs, from YAML; a value of the wrong type ends the process, as on srpkd train's command line.

    Raises:
        ValueError: it is not a mapping of options, or has some that are the study's own.
    """
    try:
        options = check_keys(yaml.safe_load(text), "--options")
    except yaml.YAMLError as error:
        raise ValueError(f"--options {text}: is not YAML: {error}") from error
    if own := sorted(OWN_OPTIONS & options.keys()):
        raise ValueError(f"--options: {', '.join(own)} cannot be given, the study sets it in every run by itself")
    checked = parse_arguments(["--preset=demo", *as_flags(options)])
    return {name: getattr(checked, name) for name in options}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Options or folders that cannot be used end it with one message."""
    given = parser().parse_args(arguments)
    try:
        worlds = given.worlds * len(given.settings) if len(given.worlds) == 1 else given.worlds
        if len(worlds) != len(given.settings):
            raise ValueError(f"--worlds: expected one number, or {len(given.settings)}, one for each of the settings")
        options = common_options(given.options)
        require("scipy.stats", "study", "a confidence interval")
        study = Study(given.runs_dir, given.seeds, dict(zip(given.settings, worlds)), given.workers, options)
        device = teacher(study, CHOOSING, 1).torch_device
        steps = choose(study)
        result = {
            "command": shlex.join(["srpkd", "study", *(sys.argv[1:] if arguments is None else arguments)]),
            "environment": {
                "torch": torch.__version__, "python": platform.python_version(), "device": device_name(device),
            },
            "choice": steps,
            "judged": [judge(study, setting, steps) for setting in study.settings],
        }  # fmt: skip
        report = write(result, Path(given.runs_dir))
        if given.docs:
            report = write(result, given.docs)
    except (ValueError, TypeError, OSError, ImportError, DataError, CheckpointError, Diverged) as error:
        sys.exit(f"error: {error}")
    print(f"{render(result)}\nreport: {report}")


if __name__ == "__main__":
    main()
