"""The reports' pictures: what each needs, what it says in words, and the file it goes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.report import bars, lines, words
from prunekit.report.svg import STYLE, standalone, to_svg
from prunekit.report.tasks import average_last, is_share
from prunekit.report.units import by_kind, outside, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`name`.svg; `label` is the text alternative, `draw` makes the figure under `STYLE`."""

    name: str
    label: str
    draw: Callable[[], Figure]

    def svg(self) -> str:
        """The `<svg>` for a page; the same bytes for the same figures."""
        from matplotlib import style

        with style.context(["default", STYLE]):
            return to_svg(self.draw(), self.name, self.label)


def pictures(report: Mapping[str, Any]) -> dict[str, Picture]:
    """Name → picture, of layers, ratio, error, curve and tasks those whose figures the report has."""
    found = (_layers(report), _ratio(report), _error(report), _curve(report), _tasks(report))
    return {picture.name: picture for picture in found if picture}


def write_pictures(report: Mapping[str, Any], folder: Path) -> None:
    """Every picture as a file of its own, `<name>.svg`, that follows the reader's choice of light
    or dark.
    """
    for name, picture in pictures(report).items():
        (folder / f"{name}.svg").write_text(standalone(picture.svg()), encoding="utf-8")


def _layers(report: Mapping[str, Any]) -> Picture | None:
    entries = units(report)
    if not entries:
        return None
    told = [
        f"{kind} {words.span([e.share for e in own])}" for kind, own in by_kind(entries).items()
    ]
    told += [f"{entry.kind} {entry.share:.0%}" for entry in outside(entries)[:6]]
    label = f"Bars, the share of units kept in each layer: {', '.join(told)}."
    return Picture(name="layers", label=label, draw=lambda: bars.kept(entries))


def _ratio(report: Mapping[str, Any]) -> Picture | None:
    entries = units(report)
    if not entries:
        return None
    told = [
        f"{kind} {words.span([e.removed for e in own])}" for kind, own in by_kind(entries).items()
    ]
    what = "planned and removed" if any(e.planned is not None for e in entries) else "removed"
    label = f"Lines, the share of units {what} in each layer" + (
        f": {', '.join(told)} removed." if told else "."
    )
    return Picture(name="ratio", label=label, draw=lambda: lines.ratios(entries))


def _error(report: Mapping[str, Any]) -> Picture | None:
    rows = report.get("layer_error") or []
    columns = [c for c in report["models"] if any(row.get(c) is not None for row in rows)]
    if not columns:
        return None
    told = []
    for column in columns:
        worst = max(
            (row for row in rows if row.get(column) is not None), key=lambda row: row[column]
        )
        told.append(f"{column} at most {words.decimal(worst[column])}, in layer {worst['index']}")
    label = f"Lines, each layer's output error against the dense model: {'; '.join(told)}."
    return Picture(name="error", label=label, draw=lambda: lines.errors(rows, columns))


def _curve(report: Mapping[str, Any]) -> Picture | None:
    recovery = report.get("recovery") or {}
    rows = [
        row for row in recovery.get("curve") or [] if any(row.get(key) for key in lines.MEASURED)
    ]
    if not rows:
        return None
    told = []
    for key, name in (("loss", "training loss"), ("validation_loss", "validation loss")):
        if values := [row[key] for row in rows if row.get(key) is not None]:
            told.append(f"{name} from {words.decimal(values[0])} to {words.decimal(values[-1])}")
    for corpus in lines.corpora(rows):
        values = [
            value
            for row in rows
            if (value := (row.get("perplexity") or {}).get(corpus)) is not None
        ]
        told.append(
            f"perplexity on {corpus} from {words.decimal(values[0])} to {words.decimal(values[-1])}"
        )
    label = f"Lines over the steps of recovery: {'; '.join(told)}."
    return Picture(
        name="curve", label=label, draw=lambda: lines.curve(rows, recovery.get("best_step"))
    )


def _tasks(report: Mapping[str, Any]) -> Picture | None:
    shown = {
        name: task
        for name, task in average_last(report).items()
        if is_share(task, report["models"])
    }
    if not shown:
        return None
    told = []
    for name, task in shown.items():
        values = [f"{c} {task[c]['value']:.1%}" for c in report["models"] if c in task]
        told.append(f"{name} {', '.join(values)}")
    label = f"Bars with their standard errors, the score in each task: {'; '.join(told)}."
    return Picture(
        name="tasks", label=label, draw=lambda: bars.scores(shown, list(report["models"]))
    )
