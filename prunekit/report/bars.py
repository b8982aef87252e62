"""The figures of bars, in matplotlib; hatches and numbers tell the same as the colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.report import words
from prunekit.report.palette import HATCHES, LIGHT, SERIES, place
from prunekit.report.panels import NAMED, layers_of, legend, new_figure, percent_axes
from prunekit.report.parts import TaskScores
from prunekit.report.tasks import AVERAGE
from prunekit.report.units import Units, by_kind, outside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 1.45  # inches of height of a panel of upright bars


def draw_kept(entries: Sequence[Units]) -> Figure:
    """Draw a panel a kind, a bar a layer; groups outside of layers in a panel below.

    The bars of those lie, with their names, where they are few.
    """
    kinds, others = by_kind(entries), outside(entries)
    few = len(others) <= NAMED
    heights = [_PANEL] * len(kinds)
    if others:
        heights.append(0.45 + 0.26 * len(others) if few else _PANEL)
    figure, panels = new_figure(heights, 0.25)
    for panel, (kind, own) in zip(panels, kinds.items(), strict=False):
        _draw_upright(panel, [entry.index or 0 for entry in own], own, layers_of(kinds))
        panel.set_title(f"{words.shorten(kind, 32)}: {_total(own)} kept")
        panel.set_xlabel("layer" if kind == list(kinds)[-1] else "")
    if others:
        if few:
            _draw_lying(panels[-1], others)
        else:
            _draw_upright(panels[-1], range(len(others)), others, (0, len(others) - 1))
            panels[-1].set_xlabel("group, in order")
        named = "groups outside of layers" if kinds else "groups"
        panels[-1].set_title(f"{named}: {_total(others)} units kept")
    return figure


def _total(own: Sequence[Units]) -> str:
    return f"{sum(entry.kept for entry in own):,} of {sum(entry.total for entry in own):,}"


def _draw_upright(
    panel: Axes, places: Sequence[int], own: Sequence[Units], limits: tuple[int, int]
) -> None:
    """Draw a bar for each share on a track of 100%, or a cross where nothing was kept."""
    panel.bar(places, [100] * len(own), 0.8, color=LIGHT["track"], linewidth=0)
    shares = [100 * entry.share for entry in own]
    panel.bar(places, shares, 0.8, color=LIGHT["pruned"], linewidth=0)
    gone = [x for x, entry in zip(places, own, strict=True) if not entry.kept]
    panel.plot(gone, [8] * len(gone), "x", color=LIGHT["ink"], markersize=5, markeredgewidth=1.4)
    few = limits[1] - limits[0] < NAMED
    if few:
        look: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
        for x, entry in zip(places, own, strict=True):
            panel.text(x, 103, f"{entry.kept:,}", color=LIGHT["soft"], **look)
    percent_axes(panel, limits, 118 if few else 104)


def _draw_lying(panel: Axes, own: Sequence[Units]) -> None:
    """Draw a bar a group, the first one on top, with its name and its units."""
    from matplotlib.ticker import PercentFormatter

    places = list(range(len(own)))
    panel.barh(places, [100] * len(own), 0.62, color=LIGHT["track"], linewidth=0)
    shares = [100 * entry.share for entry in own]
    panel.barh(places, shares, 0.62, color=LIGHT["pruned"], linewidth=0)
    for y, entry in enumerate(own):
        told = f"{entry.kept:,} of {entry.total:,}"
        panel.text(101, y, told, va="center", fontsize=9, color=LIGHT["soft"])
    panel.set_yticks(places, [words.shorten(entry.kind, 32) for entry in own])
    panel.set(xlim=(0, 118), ylim=(len(own) - 0.5, -0.5), xticks=(0, 25, 50, 75, 100))
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.tick_params(length=0)


def draw_scores(tasks: Mapping[str, TaskScores], columns: Sequence[str]) -> Figure:
    """Draw a bar for each task and model, with standard errors; the average stands apart."""
    from matplotlib.ticker import PercentFormatter

    shown = [c for c in columns if any(c in task.columns for task in tasks.values())]
    places = [i + 0.35 * (name == AVERAGE and i > 0) for i, name in enumerate(tasks)]
    figure, (panel,) = new_figure([0.21 * len(shown) * len(tasks) + 0.9])
    height, furthest = 0.8 / len(shown), 0.0
    for number, column in enumerate(shown):
        offset = (number - (len(shown) - 1) / 2) * height
        bars = [
            (y + offset, 100 * task.columns[column].value, task.columns[column].stderr)
            for y, task in zip(places, tasks.values(), strict=True)
            if column in task.columns
        ]
        _draw_column(panel, bars, height, column, place(column, columns))
        ends = [_write_reading(panel, y, value, 100 * (error or 0)) for y, value, error in bars]
        furthest = max(furthest, *ends)
    panel.set_yticks(places, [words.shorten(name, 28) for name in tasks])
    panel.set(xlim=(0, 1.1 * furthest or 1), ylim=(places[-1] + 0.5, -0.5))
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.grid(axis="x")
    panel.tick_params(length=0)
    if AVERAGE in tasks and len(tasks) > 1:
        panel.axhline(places[-1] - 0.675, color=LIGHT["soft"], linewidth=0.8)
    legend(panel)
    return figure


def _draw_column(
    panel: Axes,
    bars: Sequence[tuple[float, float, float | None]],
    height: float,
    name: str,
    look: int,
) -> None:
    """Draw one model's bars; `look` is an index into the palette's lists."""
    panel.barh(
        [y for y, _, _ in bars],
        [value for _, value, _ in bars],
        0.88 * height,
        label=name,
        linewidth=0,
        color=LIGHT[SERIES[look]],
        hatch=HATCHES[look],
        edgecolor=LIGHT["paper"],
    )


def _write_reading(panel: Axes, y: float, value: float, error: float) -> float:
    """Draw the error bar and write the value behind it; return the end of the error bar."""
    if error:
        # A halo, so that the error bar is seen on the bar.
        panel.errorbar(value, y, xerr=error, color=LIGHT["paper"], linewidth=2.8)
        panel.errorbar(value, y, xerr=error, color=LIGHT["ink"], linewidth=1, capsize=2)
    where: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    panel.annotate(f"{value:.1f}", (value + error, y), fontsize=9, **where)
    return value + error
