"""Parts that all figures have: panels, axes of layers and shares, a legend that covers nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prunekit.report.units import Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 6.2  # inches; SVG has 72 units in each
NAMED = 12  # bars up to which each gets words of its own


def new_figure(
    heights: Sequence[float], extra: float = 0.0, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with panels under each other.

    Args:
        heights: the height of each panel, in inches.
        extra: height beside the panels, in inches.
        sharex: whether the panels have one axis of x.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, sum(heights) + extra), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, sharex=sharex, height_ratios=heights)
    return figure, [row[0] for row in panels]


def layers_of(kinds: Mapping[str, Sequence[Units]]) -> tuple[int, int]:
    """The first and the last layer of all kinds."""
    indices = [entry.index or 0 for entries in kinds.values() for entry in entries]
    return min(indices), max(indices)


def percent_axes(panel: Axes, limits: tuple[int, int], top: float) -> None:
    """Whole numbers in `limits` across, percent up to `top` upwards."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panel.grid(axis="y")
    panel.tick_params(length=0)
    panel.set(xlim=(limits[0] - 0.6, limits[1] + 0.6), ylim=(0, top))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(PercentFormatter(decimals=0))


def legend(panel: Axes) -> None:
    """Above the panel, on the right; in several lines where the names are long."""
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=legend_columns(labels),
        handlelength=2.6,
    )


def legend_columns(labels: Sequence[str]) -> int:
    """How many names fit beside each other."""
    return max(1, min(len(labels), 60 // (max(map(len, labels)) + 6)))
