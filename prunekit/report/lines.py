"""The figures of lines, in matplotlib; markers and line styles tell the same as the colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunekit.report import words
from prunekit.report.palette import LIGHT, MARKERS, SERIES, STYLES, place
from prunekit.report.panels import layers_of, legend, legend_columns, new_figure, percent_axes
from prunekit.report.parts import CurvePoint, LayerError, SearchRound
from prunekit.report.units import Units, by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
_LOOKS = (3, 4, 1, 2, 0)  # the looks of corpora, in order; the models have the first three


def draw_ratios(entries: Sequence[Units]) -> Figure:
    """Draw a panel for each kind: the share removed in each layer, and the policy's, if known."""
    layered = by_kind(entries)
    kinds = layered or {"groups": list(entries)}
    figure, panels = new_figure([1.6] * len(kinds), 0.45)
    limits = layers_of(layered) if layered else (0, len(entries) - 1)
    top = 100 * max(max(entry.removed, entry.planned or 0) for entry in entries)
    for panel, (kind, own) in zip(panels, kinds.items(), strict=True):
        _draw_ratio_panel(panel, own, 5 if limits[1] - limits[0] < 40 else 3.5)
        panel.set_title(words.shorten(kind, 30))
        percent_axes(panel, limits, min(103.0, 1.12 * top) or 1)
    panels[-1].set_xlabel("layer" if layered else "group, in order")
    legend(panels[0])
    return figure


def _draw_ratio_panel(panel: Axes, entries: Sequence[Units], marker_size: float) -> None:
    places = [i if entry.index is None else entry.index for i, entry in enumerate(entries)]
    planned = [
        (x, 100 * entry.planned)
        for x, entry in zip(places, entries, strict=True)
        if entry.planned is not None
    ]
    if planned:
        xs, ys = zip(*planned, strict=True)
        panel.plot(xs, ys, "--", color=LIGHT["soft"], linewidth=1.6, label="policy")
    removed = [100 * entry.removed for entry in entries]
    look: dict[str, Any] = {"color": LIGHT["pruned"], "markersize": marker_size, "clip_on": False}
    panel.plot(places, removed, "o", label="removed", **look)


def draw_errors(rows: Sequence[LayerError], columns: Sequence[str]) -> Figure:
    """Draw a line for each model over the layers, on a logarithmic scale if errors span decades."""
    from matplotlib.ticker import MaxNLocator

    figure, (panel,) = new_figure([2.7])
    for column in columns:
        points = [(float(row.index), row.columns[column]) for row in rows if column in row.columns]
        _plot(panel, points, column, place(column, columns))
    panel.set(
        xlabel="layer",
        ylabel="relative squared error",
        xlim=(rows[0].index - 0.6, rows[-1].index + 0.6),
    )
    panel.grid(axis="y")
    panel.tick_params(length=0)
    values = [row.columns[column] for row in rows for column in columns if column in row.columns]
    if not _scale_logarithmically(panel, values):
        panel.set_ylim(0, 1.08 * max(values) or 1)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    legend(panel)
    return figure


def draw_search(rounds: Sequence[SearchRound]) -> Figure:
    """Draw a line for each round: the best KL over all evaluations so far."""
    figure, (panel,) = new_figure([2.4])
    before = 0
    for i, part in enumerate(rounds):
        points = [(float(before + p.evaluations), p.divergence) for p in part.curve]
        _plot(panel, points, f"round {i + 1}", _LOOKS[i % len(_LOOKS)])
        before += part.evaluations
    panel.set(xlabel="candidates judged", ylabel="KL to the dense model")
    panel.grid(axis="y")
    panel.tick_params(length=0)
    legend(panel)
    return figure


def _plot(panel: Axes, points: Points, name: str, look: int, markers: int = 40) -> None:
    """Draw a line with about `markers` markers; `look` is an index into the palette's lists."""
    xs, ys = zip(*points, strict=True)
    panel.plot(
        xs,
        ys,
        linestyle=STYLES[look],
        marker=MARKERS[look],
        markevery=max(1, len(points) // markers),
        color=LIGHT[SERIES[look]],
        markersize=4.5,
        label=name,
    )


def _scale_logarithmically(panel: Axes, values: Sequence[float]) -> bool:
    """Take a logarithmic scale where the values span more than a decade and a half.

    Its ticks are at 1, 3, 10 …, or at decades only where there are more than three.
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


def corpora(curve: Sequence[CurvePoint]) -> list[str]:
    """The corpora that a curve has perplexities on."""
    measured = [
        corpus
        for point in curve
        for corpus, value in (point.perplexity or {}).items()
        if value is not None
    ]
    return list(dict.fromkeys(measured))


def losses_of(curve: Sequence[CurvePoint]) -> dict[str, Points]:
    """Training and validation, where they were measured: (step, loss)."""
    training = [(float(p.step), p.loss) for p in curve if p.loss is not None]
    validation = [
        (float(p.step), p.validation_loss) for p in curve if p.validation_loss is not None
    ]
    lines = {"training": training, "validation": validation}
    return {name: points for name, points in lines.items() if points}


def perplexities_of(curve: Sequence[CurvePoint]) -> dict[str, Points]:
    """Corpus → (step, perplexity)."""
    lines: dict[str, Points] = {corpus: [] for corpus in corpora(curve)}
    for point in curve:
        for corpus, value in (point.perplexity or {}).items():
            if value is not None:
                lines[corpus].append((float(point.step), value))
    return lines


def draw_curve(curve: Sequence[CurvePoint], best: int | None) -> Figure:
    """Draw losses above, perplexities below, over the steps; the step that was kept is marked."""
    parts = {"loss": losses_of(curve), "perplexity": perplexities_of(curve)}
    parts = {what: lines for what, lines in parts.items() if lines}
    heights = [1.8 + 0.2 * len(lines) / legend_columns(list(lines)) for lines in parts.values()]
    figure, panels = new_figure(heights, 0.2, sharex=True)
    for panel, (what, lines) in zip(panels, parts.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            _plot(panel, points, words.shorten(name, 40), _look(what, name, i), markers=25)
        panel.set_ylabel(what)
        panel.grid(axis="y")
        panel.tick_params(length=0)
        _scale_logarithmically(panel, [y for points in lines.values() for _, y in points])
        legend(panel)
        if best is not None:
            panel.axvline(best, color=LIGHT["soft"], linewidth=1, linestyle=":")
    if best is not None:
        panels[0].set_title(f"kept: step {best:,} (dotted)", color=LIGHT["soft"], fontsize=9)
    panels[-1].set_xlabel("step")
    return figure


def _look(what: str, name: str, number: int) -> int:
    """The look of a line: that of training is its own, that of validation is the first corpus's."""
    if what == "loss":
        return 0 if name == "training" else _LOOKS[0]
    return _LOOKS[number % len(_LOOKS)]
