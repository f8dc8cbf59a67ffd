"""Spread and speed of estimates from sampled columns.

    python -m bench columns                                      measure, and print the table of all rows
    python -m bench columns --page docs/sampled-columns.md       put the table between the markers of the page

The features are smooth random maps. The student's are a random 1 x 1 convolution of 24 such maps. Spreads are root mean
squares of the deviation from the exact value over several draws, relative to the exact value: of the loss, of the
gradient of the features, and of the gradient of the convolution's weights, which sums over all pixels. Times are of
loss and gradient, exact and estimated in turns.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from srpkd import relation_loss
from srpkd.arguments import positive
from srpkd.files import expand_user
from srpkd.kernels import NORMALIZATIONS
from srpkd.kernels.formulas import Normalize
from srpkd.reporting.table import format_table

from . import cases, machine, results
from .markers import between_markers, put_between_markers
from .measure import seconds_of
from .results import Row, number

RESULTS = results.FOLDER / "columns.csv"
KEY = ("pixels", "channels", "normalize", "distance", "columns", "device")
NAME = "columns table"  # in the page's markers
INPUTS = 24  # channels of the maps that the student's convolution reads
TABLE_COLUMNS = [
    {"key": "pixels", "label": "N", "format": ","},
    {"key": "normalize", "label": "normalize"},
    {"key": "columns", "label": "m", "format": ","},
    {"key": "loss", "label": "loss ± %", "format": ".2f"},
    {"key": "weights", "label": "weight gradient ± %", "format": ".1f"},
    {"key": "features", "label": "feature gradient ± %", "format": ".0f"},
    {"key": "times_faster", "label": "x exact speed", "format": ".1f"},
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", type=positive, nargs="+", default=[64, 256], metavar="H", help="of H x H maps (default: 64 256)")
    add("--columns", type=positive, nargs="+", default=[64, 256, 1024], metavar="M", help="default: 64 256 1024")
    add("--channels", type=cases.parse_channels, default=(64, 256), metavar="C_s/C_t", help="default: 64/256")
    add("--normalize", nargs="+", choices=NORMALIZATIONS, default=["cosine", "row"], help="default: cosine row")
    add("--draws", type=positive, default=16, metavar="K", help="estimates of each loss (default: %(default)s)")
    add("--repeats", type=positive, default=3, metavar="K", help="timed calls (default: %(default)s)")
    add("--page", type=expand_user, metavar="FILE", help="put the table between the markers of this file")
    cases.add_device(parser)
    results.add_csv(parser, RESULTS, KEY, "--out")


def run(options: argparse.Namespace) -> None:
    """Measure and write the rows, and put the table of all rows into the page, or print it."""
    device = cases.device_of(options)
    if options.page:
        between_markers(options.page, NAME)  # raises before anything is measured
    for size in options.sizes:
        for normalize in options.normalize:
            rows = measure(size, options.channels, normalize, options.columns, options.draws, options.repeats, device)
            results.upsert(options.out, rows, KEY)
            print(f"{size} x {size}, {normalize}: {len(rows)} rows", flush=True)
    text = table(results.read(options.out))
    if options.page:
        put_between_markers(options.page, NAME, text)
    print(options.page or text, options.out, sep="\n")


def smooth_maps(channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Return random maps (1, C, H, W) whose neighbouring pixels are similar."""
    noise = torch.randn(1, channels, size, size, generator=generator)
    width = 2 * (size // 16) + 1
    smooth = F.avg_pool2d(noise, width, 1, width // 2)
    return smooth / smooth.std() + 0.3 * torch.randn(noise.shape, generator=generator) + 0.3


def measure(
    size: int,
    channels: tuple[int, int],
    normalize: Normalize,
    columns: list[int],
    draws: int,
    repeats: int,
    device: str,
) -> list[dict[str, Any]]:
    """Return a row for each number of columns."""
    generator = torch.Generator().manual_seed(0)
    inputs, teacher = (smooth_maps(count, size, generator).to(device) for count in (INPUTS, channels[1]))
    weights = (torch.randn(channels[0], INPUTS, 1, 1, generator=generator) / INPUTS**0.5).to(device)
    columns_generator = torch.Generator(device).manual_seed(0)

    def gradients(columns: int | None) -> dict[str, Tensor]:
        """Return the loss (), and its gradients for the student's features and for the weights of the convolution."""
        student = F.conv2d(inputs, weights).requires_grad_()
        generator = columns_generator if columns else None
        loss = relation_loss(student, teacher, normalize=normalize, distance="l1", columns=columns, generator=generator)
        (gradient,) = torch.autograd.grad(loss, student)
        of_weights = torch.einsum("bihw,bohw->oi", inputs, gradient)
        return {"loss": loss.detach(), "features": gradient, "weights": of_weights}

    exact = gradients(None)
    drawn = {count: spread([gradients(count) for _ in range(draws)], exact) for count in columns}
    times = [
        {count: seconds_of(partial(gradients, count), device) for count in (None, *columns)} for _ in range(repeats)
    ]
    return [
        {"pixels": size**2, "channels": "/".join(map(str, channels)), "normalize": normalize, "distance": "l1"}
        | {"columns": count, "device": machine.device_name(device), "draws": draws}
        | {f"{name}_spread": value for name, value in drawn[count].items()}
        | {"times_faster": statistics.median(time[None] / time[count] for time in times)}
        | machine.versions()
        for count in columns
    ]


def spread(estimates: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the root mean square of the deviation of estimates, relative to the exact value, by name."""
    found = {}
    for name, expected in exact.items():
        squares = [(estimate[name] - expected).square().sum().item() for estimate in estimates]
        found[name] = statistics.fmean(squares) ** 0.5 / expected.norm().item()
    return found


def table(rows: list[Row]) -> str:
    """Return the table of the page as Markdown, a part per device, channels and number of draws."""
    parts = []
    for (device, channels, draws), own in results.group_by(rows, ["device", "channels", "draws"]).items():
        cells = [
            {"pixels": int(row["pixels"]), "normalize": row["normalize"], "columns": int(row["columns"])}
            | {name: 100 * float(row[f"{name}_spread"]) for name in ("loss", "weights", "features")}
            | {"times_faster": number(row, "times_faster")}
            for row in own
        ]
        note = f"Maps of {channels} channels, l1, {draws} draws; {device}; "
        note += f"commit {results.distinct(own, 'commit')}."
        parts.append(format_table({"columns": TABLE_COLUMNS, "rows": cells, "notes": [note]}, markdown=True))
    return "\n\n".join(parts)
