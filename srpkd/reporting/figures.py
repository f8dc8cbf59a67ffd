"""The style of all plots, and their conversion to PNG."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# grey, as a rule for the teacher; then the colour-blind safe palette of Okabe and Ito (2008)
VARIANT_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")


def style_axes(axes: Axes) -> None:
    """Apply small ticks and a faint grid, and remove the upper and the right spine."""
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(color="#000000", alpha=0.09, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def to_png(figure: Figure, dpi: int) -> bytes:
    """Render a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()
