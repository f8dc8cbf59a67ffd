"""Datasets: image folders and their validation, synthetic scenes, and batches of either."""

from typing import Literal

Direction = Literal["AtoB", "BtoA"]  # which side of the data a generator takes as its input
