"""Select weights, the form of the relation loss and its layers on one data set, and evaluate them on others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import NO_DISTILLATION, SELECTION_SETTING, SETTINGS, Options, Study, student_run, teacher_run
from .runs import train

# Weights beside an L1 loss to the target with weight 100. Before training, a student's distance is 0.5 to its teacher's
# output (L1), 0.7 to its features (MSE), and 0.03 to its row-normalised relations (l1). The weights of each relation
# loss start where its initial value is a tenth of that of output distillation with weight 100, and end near equality.
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
# Layers of a ResNet whose encoder ends at model.9, each with factors of the weight that was selected for model.9: in
# the middle of the residual blocks and after them, and two layers at once; then halfway down and halfway up, where the
# maps have four times as many pixels and row-normalised relations are smaller.
LAYERS: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = (
    (("model.12",), (1.0,)),
    (("model.15",), (1.0,)),
    (("model.9", "model.15"), (1.0,)),
    (("model.6",), (1.0, 3.0)),
    (("model.18",), (1.0, 3.0)),
)
MAX_EXTENSIONS = 3  # larger weights to try after the given ones, while the largest is the best


def select(study: Study, dataset: int = 1) -> list[dict[str, Any]]:
    """Select output distillation, feature matching and the relation loss, in this order.

    Returns:
        One {"step", "base", "tried": [{"options", "scores"}], "chosen"} per step, scores by seed; the differences of
        `tried` are relative to `base`.
    """
    train(study, SELECTION_SETTING, [teacher_run(study, SELECTION_SETTING, dataset)])
    steps: list[dict[str, Any]] = []

    def select_from(name: str, base: Options, weight: str, candidates: Sequence[Options]) -> Options:
        """Return the best candidate; while it has the largest weight of its kind, also try three times this weight."""
        tried = list(candidates)
        for _ in range(1 + MAX_EXTENSIONS):
            runs = [
                student_run(study, SELECTION_SETTING, dataset, 0, study.seeds, options) for options in (base, *tried)
            ]
            base_scores, *found = train(study, SELECTION_SETTING, runs)
            best = tried[max(range(len(tried)), key=lambda index: statistics.fmean(found[index]))]
            if any(best | {weight: other[weight]} == other and other[weight] > best[weight] for other in tried):
                break
            tried.append(best | {weight: 3 * best[weight]})
        steps.append(
            {
                "step": name,
                "base": {"options": base, "scores": base_scores},
                "tried": [{"options": options, "scores": scores} for options, scores in zip(tried, found)],
                "chosen": best,
            }
        )
        return best

    candidates = [NO_DISTILLATION | {"lambda_kd": weight} for weight in OUTPUT_WEIGHTS]
    output = select_from("output distillation", NO_DISTILLATION, "lambda_kd", candidates)
    candidates = [output | {"lambda_feature": weight} for weight in FEATURE_WEIGHTS]
    select_from("feature matching", output, "lambda_feature", candidates)
    candidates = [output | {"lambda_srp": weight} | form for form, weights in RELATION_FORMS for weight in weights]
    relation = select_from("relation loss: form and weight", output, "lambda_srp", candidates)
    candidates = [
        relation | {"lambda_srp": relation["lambda_srp"] * factor, "layers": {name: name for name in names}}
        for names, factors in LAYERS
        for factor in factors
    ]
    select_from("relation loss: layers", output, "lambda_srp", [relation, *candidates])
    return steps


def variants_of(steps: Sequence[Mapping[str, Any]], factor: float) -> dict[str, Options]:
    """Return the variants to evaluate: each selected loss with and without output distillation.

    Args:
        factor: factor of all weights.
    """
    chosen = {step["step"]: step["chosen"] for step in steps}
    output, feature = chosen["output distillation"], chosen["feature matching"]
    relation = chosen["relation loss: layers"]
    variants = {
        "alone": NO_DISTILLATION,
        "output": output,
        "output + SRP": relation,
        "output + FitNet": feature,
        "SRP": relation | {"lambda_kd": 0.0},
        "FitNet": feature | {"lambda_kd": 0.0},
    }
    return {
        variant: {name: value * factor if name in NO_DISTILLATION else value for name, value in options.items()}
        for variant, options in variants.items()
    }


def evaluate(study: Study, setting: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Train the selected variants on the data sets 2, 3, ..., each with its own teacher and seed.

    Returns:
        {"setting", "datasets", "teachers": scores, "variants": {name: {"options", "scores"}}}, scores by data set;
        "teachers" is empty if the score is relative to the teacher.
    """
    datasets = list(range(2, 2 + study.settings[setting]))
    variants = variants_of(steps, SETTINGS[setting].factor)
    if SETTINGS[setting].compares_with_teacher:
        del variants["alone"]  # it has no teacher
    teachers = train(study, setting, [teacher_run(study, setting, dataset) for dataset in datasets])
    pairs = [(variant, dataset) for dataset in datasets for variant in variants]
    found = train(
        study,
        setting,
        [student_run(study, setting, dataset, 1000 * dataset, 1, variants[variant]) for variant, dataset in pairs],
    )
    scores: dict[str, list[float]] = {variant: [] for variant in variants}
    for (variant, _), own in zip(pairs, found):
        scores[variant].append(own[0])
    return {
        "setting": setting,
        "datasets": datasets,
        "teachers": [own[0] for own in teachers if own],
        "variants": {variant: {"options": options, "scores": scores[variant]} for variant, options in variants.items()},
    }
