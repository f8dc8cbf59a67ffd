"""The scores of generators on photographs that they have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure, visual_information_fidelity

from bench.study.runs import run_folder
from srpkd.metrics.pixels import psnr
from srpkd.models.checkpoints import load_generator
from srpkd.training.extension import stage_folder

from .images import partition, read_pairs
from .plan import VARIANTS, Study, dataset_folder, run_config

# name -> (label, digits after the point); larger is better
METRICS = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM %", 2), "vif": ("VIF %", 2)}
BATCH = 16


def run_scores(study: Study, task: str, number: int) -> dict[str, Any]:
    """Return the mean scores over the test crops: {"tested": names of the photographs, "scores": {network: {metric}}}.

    The networks are "input", the unchanged input, "teacher", and the variants.
    """
    config = run_config(study, task, number)
    source, target = read_pairs(dataset_folder(study, task, number) / "test")
    found = {"input": score(source, target)}
    files = {"teacher": run_folder(config) / "teacher"}
    files |= {variant: stage_folder(run_folder(config), config, variant, 0) for variant in VARIANTS}
    for name, folder in files.items():
        found[name] = score(_outputs(folder / "latest_net_G.pth", source), target)
    return {"tested": partition(number)[1], "scores": found}


@torch.no_grad()
def _outputs(file: Path, source: Tensor) -> Tensor:
    network = load_generator(file).eval()
    return torch.cat([network(part) for part in source.split(BATCH)])


def score(output: Tensor, target: Tensor) -> dict[str, float]:
    """Return the mean scores of images (P, 3, H, W) in [-1, 1].

    PSNR in dB; SSIM (Wang et al., 2004) and VIF, the visual information fidelity in the pixel domain (Sheikh and Bovik,
    2006), in percent. The images are rounded to 8 bits, as they are when they are saved.
    """
    output, target = (((images + 1) * 127.5).round().clamp(0, 255) for images in (output, target))
    ssim = structural_similarity_index_measure(output, target, data_range=255.0)
    assert isinstance(ssim, Tensor)
    return {
        "psnr": sum(psnr(a, b, 255.0) for a, b in zip(output, target)) / len(output),
        "ssim": 100 * float(ssim),
        "vif": 100 * float(visual_information_fidelity(output, target)),
    }
