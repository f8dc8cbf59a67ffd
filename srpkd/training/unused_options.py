"""Options that other options leave without an effect: a run names them before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.networks import ResnetGenerator, define_generator
from .distributed import launched_world_size
from .option_groups import OPTIONS
from .options import ResolvedConfig

Reason = Callable[[ResolvedConfig], str]  # why a stage of these options does not use an option, in words, or ""


def unused_options(
    config: ResolvedConfig,
    teacher: ResolvedConfig | None,
    variants: Mapping[str, ResolvedConfig],
    teachers: Mapping[str, nn.Module],
) -> list[str]:
    """Return a line for each option that has another value than its default, and that no stage uses.

    Args:
        config: options of the run.
        teacher: options of the teacher that the run trains, or None.
        variants: name -> options of a student.
        teachers: teachers that were loaded from files, by direction.
    """
    stages = list(variants.values())
    if teacher:
        stages.append(replace(teacher, teacher_netG=None))  # its losses have no teacher
    lines = []
    rules: dict[tuple[str, ...], Reason] = {
        **RULES,
        ("rectify",): partial(_no_negative_relations, teachers),
        ("train_mode_norm",): partial(_no_batch_norm, teachers),
    }
    if not teacher:
        rules[OF_TRAINED_TEACHER] = lambda _: "the run trains no teacher"
    for names, reason in rules.items():
        reasons = [reason(options) for options in stages]
        for name in names:
            if all(reasons):
                lines += _line(name, config, reasons[0])
            for variant in config.variants:
                if name in config.variants[variant]:
                    options = variants[variant]
                    lines += [f"variant {variant!r}: {line}" for line in _line(name, options, reason(options))]
    return lines


def _line(name: str, config: ResolvedConfig, reason: str) -> list[str]:
    """Return the line for an option that a reason makes unused, if there is a reason, or []."""
    value, default = getattr(config, name), config.dependent_defaults().get(name, OPTIONS[name].default)
    return [f"{name}={value} has no effect on training: {reason}"] if reason and value != default else []


def _if(condition: Callable[[ResolvedConfig], Any], reason: str) -> Reason:
    """Return a rule: the reason, in which {option} is its value, if the condition holds."""
    return lambda config: reason.format(**vars(config)) if condition(config) else ""


def _no_relation_loss(config: ResolvedConfig) -> str:
    if not config.distils:
        return "there is no teacher"
    return "" if config.lambda_srp else "lambda_srp is 0"


def _no_taps(config: ResolvedConfig) -> str:
    return "" if config.lambda_feature and config.distils else _no_relation_loss(config)


def _no_threshold(config: ResolvedConfig) -> str:
    reason = "" if config.distance == "huber" else f"distance is {config.distance}, and only huber has a threshold"
    return _no_relation_loss(config) or reason


def _no_norms(config: ResolvedConfig) -> str:
    return _no_relation_loss(config) or ("normalize is none" if config.normalize == "none" else "")


def _one_image(config: ResolvedConfig) -> str:
    images = config.batch_size if config.scope == "global" else config.batch_size // launched_world_size()
    return _no_relation_loss(config) or ("" if images > 1 else "the loss sees batches of one image")


def _no_dropout_layer(config: ResolvedConfig) -> str:
    with torch.device("meta"):
        network = define_generator(config.netG, dropout=True)
    has_dropout = any(isinstance(module, nn.Dropout) for module in network.modules())
    return "" if has_dropout else f"netG {config.netG} is too small for dropout"


def _no_negative_relations(teachers: Mapping[str, nn.Module], config: ResolvedConfig) -> str:
    is_resnet = [config.netG.startswith("resnet"), *(isinstance(net, ResnetGenerator) for net in teachers.values())]
    if config.teacher_netG:
        is_resnet.append(config.teacher_netG.startswith("resnet"))
    ends_in_relu = config.layers is None and all(is_resnet)
    reason = "the default layer of a ResNet ends in a ReLU, so no relation is negative" if ends_in_relu else ""
    return _no_relation_loss(config) or reason


def _no_batch_norm(teachers: Mapping[str, nn.Module], config: ResolvedConfig) -> str:
    # batch norms that normalise each image are affine, too
    has_weights = any(getattr(module, "affine", False) for teacher in teachers.values() for module in teacher.modules())
    return "" if has_weights or config.norm == "batch" else "the generators have no batch norm"


OF_TRAINED_TEACHER = ("teacher_ngf", "teacher_n_epochs", "teacher_n_epochs_decay", "teacher_max_dataset_size")
RULES: dict[tuple[str, ...], Reason] = {
    ("preprocess", "load_size", "crop_size"): _if(
        lambda config: config.is_synthetic, "generated images are not read from files"
    ),
    ("synthetic_size", "synthetic_pairs", "synthetic_test_pairs", "synthetic_variant"): _if(
        lambda config: not config.is_synthetic, "only dataroot :synthetic: generates images"
    ),
    ("load_size",): _if(
        lambda config: not config.is_synthetic and config.preprocess in ("crop", "none"),
        "preprocess {preprocess} does not scale images to a given size",
    ),
    ("crop_size",): _if(
        lambda config: not config.is_synthetic and config.preprocess == "none", "preprocess none does not crop"
    ),
    ("n_layers_D",): _if(lambda config: config.netD != "n_layers", "netD is {netD}; use netD n_layers"),
    ("no_dropout",): _no_dropout_layer,
    ("init_gain",): _if(
        lambda config: config.init_type == "kaiming" and config.norm == "instance", "init_type kaiming has no scale"
    ),
    ("pool_size", "lambda_A", "lambda_B", "lambda_identity"): _if(
        lambda config: config.model != "cycle_gan", "model is {model}, and only cycle_gan uses it"
    ),
    ("lambda_L1",): _if(lambda config: config.model != "pix2pix", "model is {model}, and only pix2pix uses it"),
    ("layers",): _no_taps,
    ("normalize", "distance", "backend"): _no_relation_loss,
    ("delta",): _no_threshold,
    ("scope",): _one_image,
    ("detach_norms",): _no_norms,
    ("time_budget",): _if(lambda config: config.seeds <= 2, "two seeds always run, and seeds is {seeds}"),
    ("channels_last",): _if(
        lambda config: config.is_one_image_on_cpu, "PyTorch's gradients of one image in this format are wrong on a CPU"
    ),
    ("force_bf16",): _if(lambda config: config.precision != "bf16", "precision is {precision}"),
}
