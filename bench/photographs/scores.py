"""The scores of generators on photographs that they have not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure, visual_information_fidelity

from bench.study.runs import run_folder
from srpkd.metrics.pixels import psnr
from srpkd.models.checkpoints import load_generator
from srpkd.training.extension import stage_folder

from .images import grid_crops, partition, read_pairs, read_photographs
from .plan import VARIANTS, Study, dataset_folder, run_config

# name -> (label, digits after the point); larger is better
METRICS = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM %", 2), "vif": ("VIF %", 2)}
BATCH = 16


def run_scores(study: Study, task: str, number: int) -> dict[str, Any]:
    """Return the mean scores over the test crops: {"tested": names of the photographs, "scores": {network: {metric}}}.

    The networks are "input", the unchanged input, "teacher", and the variants.
    """
    source, target = _test_pairs(study, task, number)
    outputs = _outputs(study, task, number, source)
    return {
        "tested": partition(number)[1],
        "scores": {network: score(images, target) for network, images in outputs.items()},
    }


def examples(study: Study, task: str, number: int) -> dict[str, Tensor]:
    """Return the test crop of the largest contrast of each test photograph, (P, 3, H, W) in [-1, 1].

    The keys are the networks of ``run_scores``, and "target".
    """
    source, target = _test_pairs(study, task, number)
    contrast = target.std((1, 2, 3))
    chosen, start = [], 0
    for photograph in read_photographs(partition(number)[1]).values():
        end = start + len(grid_crops({"": photograph}, study.size))
        chosen.append(start + int(contrast[start:end].argmax()))
        start = end
    return _outputs(study, task, number, source[chosen]) | {"target": target[chosen]}


def _test_pairs(study: Study, task: str, number: int) -> tuple[Tensor, Tensor]:
    return read_pairs(dataset_folder(study, task, number) / "test")


@torch.no_grad()
def _outputs(study: Study, task: str, number: int, source: Tensor) -> dict[str, Tensor]:
    config = run_config(study, task, number)
    folders = {"teacher": run_folder(config) / "teacher"}
    folders |= {variant: stage_folder(run_folder(config), config, variant, 0) for variant in VARIANTS}
    found = {"input": source}
    for name, folder in folders.items():
        network = load_generator(folder / "latest_net_G.pth").eval()
        found[name] = torch.cat([network(part) for part in source.split(BATCH)])
    return found


def score(output: Tensor, target: Tensor) -> dict[str, float]:
    """Return the mean scores of images (P, 3, H, W) in [-1, 1].

    PSNR in dB; SSIM (Wang et al., 2004) and VIF, the visual information fidelity in the pixel domain (Sheikh and Bovik,
    2006), in percent. The images are rounded to 8 bits, as they are when they are saved. SSIM is that of torchmetrics,
    as in the recorded results: unlike ``srpkd.metrics.pixels.ssim``, it counts windows across the edges too.
    """
    output, target = (((images + 1) * 127.5).round().clamp(0, 255) for images in (output, target))
    ssim = structural_similarity_index_measure(output, target, data_range=255.0)
    assert isinstance(ssim, Tensor)
    return {
        "psnr": sum(psnr(a, b, 255.0) for a, b in zip(output, target)) / len(output),
        "ssim": 100 * float(ssim),
        "vif": 100 * float(visual_information_fidelity(output, target)),
    }
