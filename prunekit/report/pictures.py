"""The reports' pictures: their figures, a text alternative, and the file that each goes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report import bars, lines, words
from prunekit.report.record import Report
from prunekit.report.searching import search_of
from prunekit.report.svg import STYLE, standalone, to_svg
from prunekit.report.tables import error_columns
from prunekit.report.tasks import average_last, is_share
from prunekit.report.units import by_kind, outside, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, which is drawn when its SVG is first asked for.

    Attributes:
        name: the file is `<name>.svg`.
        label: the text alternative.
        draw: makes the figure, under the style of reports.
    """

    name: str
    label: str
    draw: Callable[[], Figure]

    def svg(self) -> str:
        """The `<svg>` for a page; the same bytes for the same figures."""
        return self._svg

    @cached_property
    def _svg(self) -> str:
        from matplotlib import style

        with style.context(["default", STYLE]):
            return to_svg(self.draw(), self.name, self.label)


def pictures(report: Report) -> dict[str, Picture]:
    """Name → picture: layers, ratio, search, error, curve, tasks, as far as there are figures."""
    makers = (_layers, _ratio, _search, _error, _curve, _tasks)
    drawn = [make(report) for make in makers]
    return {picture.name: picture for picture in drawn if picture}


def write_pictures(drawn: Mapping[str, Picture], folder: Path) -> None:
    """Write every picture as a file, `<name>.svg`, light or dark as its reader prefers."""
    for name, picture in drawn.items():
        (folder / f"{name}.svg").write_text(standalone(picture.svg()), encoding="utf-8")


def _layers(report: Report) -> Picture | None:
    """The share kept in each layer."""
    entries = units(report)
    if not entries:
        return None
    told = [
        f"{kind} {words.span([entry.share for entry in own])}"
        for kind, own in by_kind(entries).items()
    ]
    told += [f"{entry.kind} {entry.share:.0%}" for entry in outside(entries)[:6]]
    label = f"Bars, the share of units kept in each layer: {', '.join(told)}."
    return Picture(name="layers", label=label, draw=lambda: bars.draw_kept(entries))


def _ratio(report: Report) -> Picture | None:
    """The share removed in each layer, beside the policy's."""
    entries = units(report)
    if not entries:
        return None
    told = [
        f"{kind} {words.span([entry.removed for entry in own])}"
        for kind, own in by_kind(entries).items()
    ]
    planned = any(entry.planned is not None for entry in entries)
    shares = "planned and removed" if planned else "removed"
    spans = f": {', '.join(told)} removed." if told else "."
    label = f"Lines, the share of units {shares} in each layer{spans}"
    return Picture(name="ratio", label=label, draw=lambda: lines.draw_ratios(entries))


def _search(report: Report) -> Picture | None:
    """The best KL of each round over its evaluations."""
    search = search_of(report)
    if search is None:
        return None
    told = [
        f"round {number} from {words.decimal(part.curve[0].divergence)} to "
        f"{words.decimal(part.curve[-1].divergence)}"
        for number, part in enumerate(search.rounds, 1)
    ]
    label = f"Lines, the best candidate's KL to the dense model: {'; '.join(told)}."
    return Picture(name="search", label=label, draw=lambda: lines.draw_search(search.rounds))


def _error(report: Report) -> Picture | None:
    """The error of each layer's output."""
    rows, columns = report.layer_error or (), error_columns(report)
    if not columns:
        return None
    told = []
    for column in columns:
        worst, index = max(
            (row.columns[column], -row.index) for row in rows if column in row.columns
        )
        told.append(f"{column} at most {words.decimal(worst)}, in layer {-index}")
    label = f"Lines, each layer's output error against the dense model: {'; '.join(told)}."
    return Picture(name="error", label=label, draw=lambda: lines.draw_errors(rows, columns))


def _curve(report: Report) -> Picture | None:
    """Losses and perplexities over the steps of recovery."""
    recovery = report.recovery
    if recovery is None:
        return None
    losses = {f"{name} loss": own for name, own in lines.losses_of(recovery.curve).items()}
    perplexities = lines.perplexities_of(recovery.curve)
    measured = losses | {f"perplexity on {corpus}": own for corpus, own in perplexities.items()}
    if not measured:
        return None
    told = [
        f"{name} from {words.decimal(points[0][1])} to {words.decimal(points[-1][1])}"
        for name, points in measured.items()
    ]
    label = f"Lines over the steps of recovery: {'; '.join(told)}."
    draw = lambda: lines.draw_curve(recovery.curve, recovery.best_step)  # noqa: E731
    return Picture(name="curve", label=label, draw=draw)


def _tasks(report: Report) -> Picture | None:
    """The scores that are shares, with their standard errors."""
    models = list(report.models or ())
    shown = {name: task for name, task in average_last(report).items() if is_share(task, models)}
    if not shown:
        return None
    told = []
    for name, task in shown.items():
        values = [f"{c} {task.columns[c].value:.1%}" for c in models if c in task.columns]
        told.append(f"{name} {', '.join(values)}")
    label = f"Bars with their standard errors, the score in each task: {'; '.join(told)}."
    return Picture(name="tasks", label=label, draw=lambda: bars.draw_scores(shown, models))
