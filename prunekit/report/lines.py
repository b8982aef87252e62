"""The figures of lines, in matplotlib; nothing is told by colour alone, but by panels, markers and
line styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.report import words
from prunekit.report.palette import LIGHT, MARKERS, SERIES, STYLES, place
from prunekit.report.panels import layers_of, legend, legend_columns, new_figure, percent_axes
from prunekit.report.units import Units, by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MEASURED = ("loss", "validation_loss", "perplexity")
_LOOKS = (3, 4, 1, 2, 0)  # of corpora; the models have the first three


def ratios(entries: Sequence[Units]) -> Figure:
    """A panel a kind: the share removed in each layer, and the policy's curve where there is one."""
    kinds = by_kind(entries) or {"groups": list(entries)}
    figure, panels = new_figure([1.6] * len(kinds), 0.45)
    limits = layers_of(kinds) if by_kind(entries) else (0, len(entries) - 1)
    top = 100 * max(max(e.removed, e.planned or 0) for own in kinds.values() for e in own)
    size = 5 if limits[1] - limits[0] < 40 else 3.5
    for panel, (kind, own) in zip(panels, kinds.items(), strict=True):
        places = [i if e.index is None else e.index for i, e in enumerate(own)]
        planned = [
            (x, 100 * e.planned) for x, e in zip(places, own, strict=True) if e.planned is not None
        ]
        if planned:
            panel.plot(
                *zip(*planned, strict=True),
                "--",
                color=LIGHT["soft"],
                linewidth=1.6,
                label="policy",
            )
        removed = [100 * e.removed for e in own]
        panel.plot(
            places,
            removed,
            "o",
            color=LIGHT["pruned"],
            markersize=size,
            clip_on=False,
            label="removed",
        )
        panel.set_title(words.shorten(kind, 30))
        percent_axes(panel, limits, min(103.0, 1.12 * top) or 1)
    panels[-1].set_xlabel("layer" if by_kind(entries) else "group, in order")
    legend(panels[0])
    return figure


def errors(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> Figure:
    """A line a model over the layers; a logarithmic scale where the errors span decades."""
    from matplotlib.ticker import MaxNLocator

    figure, (panel,) = new_figure([2.7])
    values = [row[c] for row in rows for c in columns if row.get(c) is not None]
    for column in columns:
        points = [(row["index"], row[column]) for row in rows if row.get(column) is not None]
        _line(panel, points, column, place(column, columns))
    panel.set(
        xlabel="layer",
        ylabel="relative squared error",
        xlim=(rows[0]["index"] - 0.6, rows[-1]["index"] + 0.6),
    )
    panel.grid(axis="y")
    panel.tick_params(length=0)
    if not _logarithmic(panel, values):
        panel.set_ylim(0, 1.08 * max(values) or 1)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    legend(panel)
    return figure


def _line(
    panel: Axes, points: Sequence[tuple[float, float]], name: str, look: int, markers: int = 40
) -> None:
    every = max(1, len(points) // markers)
    xs, ys = zip(*points, strict=True)
    colour, style = LIGHT[SERIES[look]], STYLES[look]
    panel.plot(
        xs,
        ys,
        linestyle=style,
        marker=MARKERS[look],
        markevery=every,
        color=colour,
        markersize=4.5,
        label=name,
    )


def _logarithmic(panel: Axes, values: Sequence[float]) -> bool:
    """Where the values span more than a decade and a half, a logarithmic scale with ticks 1, 3, 10
    or by decades.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    if low <= 0 or high <= 30 * low:
        return False
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return True


def corpora(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The corpora a curve has perplexities on."""
    measured = [row.get("perplexity") or {} for row in rows]
    return list(
        dict.fromkeys(
            name for values in measured for name, value in values.items() if value is not None
        )
    )


def curve(rows: Sequence[Mapping[str, Any]], best: int | None) -> Figure:
    """Losses above, perplexities below, over the steps; the step that was kept is marked."""
    losses = {
        "training": (_points(rows, "loss"), 0),
        "validation": (_points(rows, "validation_loss"), _LOOKS[0]),
    }
    losses = {name: line for name, line in losses.items() if line[0]}
    names = corpora(rows)
    scores = {
        c: (_points([r.get("perplexity") or {} for r in rows], c, rows), _LOOKS[i % 5])
        for i, c in enumerate(names)
    }
    parts = [(what, lines) for what, lines in (("loss", losses), ("perplexity", scores)) if lines]
    figure, panels = new_figure(
        [1.8 + 0.2 * len(lines) / legend_columns(list(lines)) for _, lines in parts], 0.2, True
    )
    for panel, (what, lines) in zip(panels, parts, strict=True):
        for name, (points, look) in lines.items():
            _line(panel, points, words.shorten(name, 40), look, markers=25)
        panel.set_ylabel(what)
        panel.grid(axis="y")
        panel.tick_params(length=0)
        _logarithmic(panel, [y for points, _ in lines.values() for _, y in points])
        legend(panel)
        if best is not None:
            panel.axvline(best, color=LIGHT["soft"], linewidth=1, linestyle=":")
    if best is not None:
        panels[0].set_title(f"kept: step {best:,} (dotted)", color=LIGHT["soft"], fontsize=9)
    panels[-1].set_xlabel("step")
    return figure


def _points(
    rows: Sequence[Mapping[str, Any]], key: str, steps: Sequence[Mapping[str, Any]] | None = None
) -> list[tuple[float, float]]:
    pairs = zip(steps or rows, rows, strict=True)
    return [(step["step"], row[key]) for step, row in pairs if row.get(key) is not None]
