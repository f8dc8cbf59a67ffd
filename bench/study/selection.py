"""Choose weights on one data set, and judge them on others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import (
    CHOOSING,
    EXTENSIONS,
    FEATURE_WEIGHTS,
    LAYERS,
    NOTHING,
    OUTPUT_WEIGHTS,
    RELATION_FORMS,
    SETTINGS,
    Options,
    Study,
    students,
    teacher,
)
from .runs import train

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


def variants_of(steps: Sequence[Mapping[str, Any]], factor: float) -> dict[str, Options]:
    """The students that are judged: what was chosen, together and by itself; all weights times `factor`."""
    chosen = {step["step"]: step["chosen"] for step in steps}
    both, output = chosen["relation loss: layers"], chosen["output distillation"]
    feature = chosen["feature matching"]
    variants = {
        "alone": NOTHING,
        "output": output,
        "output + SRP": both,
        "output + FitNet": feature,
        "SRP": both | {"lambda_kd": 0.0},
        "FitNet": feature | {"lambda_kd": 0.0},
    }
    return {
        variant: {name: value * factor if name in NOTHING else value for name, value in options.items()}
        for variant, options in variants.items()
    }


def judge(study: Study, setting: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Train what was chosen on worlds 2, 3, ..., each with its own teacher and seed.

    Returns:
        {"setting", "worlds", "teachers": scores, "variants": {name: {"options", "scores"}}}, scores by world; a teacher
        has no likeness to itself.
    """
    worlds = range(2, 2 + study.settings[setting])
    variants = variants_of(steps, SETTINGS[setting].factor)
    if SETTINGS[setting].metric.startswith("teacher"):
        del variants["alone"]  # who has no teacher has no likeness to it
    teachers = train(study, setting, [teacher(study, setting, world) for world in worlds])
    pairs = [(variant, world) for world in worlds for variant in variants]
    found = train(
        study,
        setting,
        [students(study, setting, world, 1000 * world, 1, variants[variant]) for variant, world in pairs],
    )
    by_arm = {variant: [own[0] for (name, _), own in zip(pairs, found) if name == variant] for variant in variants}
    return {
        "setting": setting,
        "worlds": list(worlds),
        "teachers": [own[0] for own in teachers if own],
        "variants": {variant: {"options": options, "scores": by_arm[variant]} for variant, options in variants.items()},
    }
