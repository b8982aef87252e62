"""The figures of bars, in matplotlib; nothing is told by colour alone, but by panels, hatches and
figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.report import words
from prunekit.report.palette import HATCHES, LIGHT, SERIES, place
from prunekit.report.panels import NAMED, layers_of, legend, new_figure, percent_axes
from prunekit.report.tasks import AVERAGE
from prunekit.report.units import Units, by_kind, outside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def kept(entries: Sequence[Units]) -> Figure:
    """A panel a kind, a bar a layer; groups outside of layers under them, by name where they are
    few.
    """
    kinds, others = by_kind(entries), outside(entries)
    few = len(others) <= NAMED
    heights = [1.45] * len(kinds) + ([0.45 + 0.26 * len(others) if few else 1.45] if others else [])
    figure, panels = new_figure(heights, 0.25)
    for panel, (kind, own) in zip(panels, kinds.items(), strict=False):
        _upright(panel, [e.index or 0 for e in own], own, layers_of(kinds))
        panel.set_title(f"{words.shorten(kind, 32)}: {_total(own)} kept")
        panel.set_xlabel("layer" if kind == list(kinds)[-1] else "")
    if others and few:
        _lying(panels[-1], others)
    elif others:
        _upright(panels[-1], list(range(len(others))), others, (0, len(others) - 1))
        panels[-1].set_xlabel("group, in order")
    if others:
        panels[-1].set_title(
            f"{'groups outside of layers' if kinds else 'groups'}: {_total(others)} units kept"
        )
    return figure


def _total(own: Sequence[Units]) -> str:
    return f"{sum(e.kept for e in own):,} of {sum(e.total for e in own):,}"


def _upright(
    panel: Axes, places: Sequence[int], own: Sequence[Units], limits: tuple[int, int]
) -> None:
    panel.bar(places, 100, 0.8, color=LIGHT["track"], linewidth=0)
    panel.bar(places, [100 * e.share for e in own], 0.8, color=LIGHT["pruned"], linewidth=0)
    gone = [x for x, e in zip(places, own, strict=True) if not e.kept]
    panel.plot(gone, [8] * len(gone), "x", color=LIGHT["ink"], markersize=5, markeredgewidth=1.4)
    if limits[1] - limits[0] < NAMED:
        for x, entry in zip(places, own, strict=True):
            panel.text(
                x, 103, f"{entry.kept:,}", ha="center", va="bottom", fontsize=9, color=LIGHT["soft"]
            )
    percent_axes(panel, limits, 118 if limits[1] - limits[0] < NAMED else 104)


def _lying(panel: Axes, own: Sequence[Units]) -> None:
    from matplotlib.ticker import PercentFormatter

    places = list(range(len(own)))
    panel.barh(places, 100, 0.62, color=LIGHT["track"], linewidth=0)
    panel.barh(places, [100 * e.share for e in own], 0.62, color=LIGHT["pruned"], linewidth=0)
    for y, entry in enumerate(own):
        panel.text(
            101,
            y,
            f"{entry.kept:,} of {entry.total:,}",
            va="center",
            fontsize=9,
            color=LIGHT["soft"],
        )
    panel.set_yticks(places, [words.shorten(e.kind, 32) for e in own])
    panel.set(xlim=(0, 118), ylim=(len(own) - 0.5, -0.5), xticks=(0, 25, 50, 75, 100))
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.tick_params(length=0)


def scores(tasks: Mapping[str, Mapping[str, Any]], columns: list[str]) -> Figure:
    """Lying bars, a group a task and a bar a model, with the standard error; the average below, set
    apart.
    """
    from matplotlib.ticker import PercentFormatter

    shown = [column for column in columns if any(column in task for task in tasks.values())]
    places = [i + 0.35 * (name == AVERAGE and i > 0) for i, name in enumerate(tasks)]
    figure, (panel,) = new_figure([0.21 * len(shown) * len(tasks) + 0.9])
    height, furthest = 0.8 / len(shown), 0.0
    for k, column in enumerate(shown):
        look = place(column, columns)
        style: Any = {
            "color": LIGHT[SERIES[look]],
            "hatch": HATCHES[look],
            "edgecolor": LIGHT["paper"],
        }
        offset = (k - (len(shown) - 1) / 2) * height
        bars = [
            (y + offset, t[column])
            for y, t in zip(places, tasks.values(), strict=True)
            if column in t
        ]
        panel.barh(
            [y for y, _ in bars],
            [100 * e["value"] for _, e in bars],
            0.88 * height,
            label=column,
            linewidth=0,
            **style,
        )
        for y, entry in bars:
            furthest = max(
                furthest, _reading(panel, y, 100 * entry["value"], 100 * (entry.get("stderr") or 0))
            )
    panel.set_yticks(places, [words.shorten(name, 28) for name in tasks])
    panel.set(xlim=(0, 1.1 * furthest or 1), ylim=(places[-1] + 0.5, -0.5))
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.grid(axis="x")
    panel.tick_params(length=0)
    if AVERAGE in tasks and len(tasks) > 1:
        panel.axhline(places[-1] - 0.675, color=LIGHT["soft"], linewidth=0.8)
    legend(panel)
    return figure


def _reading(panel: Axes, y: float, value: float, error: float) -> float:
    """The error bar and the value behind it; returns where the bar ends."""
    if error:
        panel.errorbar(
            value, y, xerr=error, color=LIGHT["paper"], linewidth=2.8
        )  # so that it is seen on the bar
        panel.errorbar(value, y, xerr=error, color=LIGHT["ink"], linewidth=1, capsize=2)
    panel.annotate(
        f"{value:.1f}",
        (value + error, y),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
    return value + error
