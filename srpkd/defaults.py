"""Default weights of the distillation losses, as chosen by the study on generated images (docs/study.md)."""

from __future__ import annotations

# by kind of task: the trainer's models, and srpkd.distill, which has no GAN loss to balance;
# pix2pix's L1 loss weighs ten times as much as CycleGAN's cycle losses, hence the factor of ten
KD_WEIGHT = {"pix2pix": 300.0, "cycle_gan": 30.0, "distill": 10.0}
SRP_WEIGHT = {"pix2pix": 5400.0, "cycle_gan": 540.0, "distill": 180.0}
