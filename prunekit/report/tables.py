"""The report's tables, as text: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunekit.report import words
from prunekit.report.parts import CurvePoint, TaskScores
from prunekit.report.record import Report
from prunekit.report.tasks import average_last, difference, is_share, members, score
from prunekit.report.units import Units, units

Row = tuple[str, ...]
Style = Callable[[float | None], str]
_LONG = 12  # rows from which on a table is folded
_STEPS = 100  # rows a curve's table may have


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row.

    Attributes:
        caption: what the table shows.
        header: the heads of the columns.
        rows: the cells, as many in each row as there are heads.
        left: how many columns hold words.
        folded: whether it is shown on demand only, since it may be long.
        strong: whether the last column is what counts.
    """

    caption: str
    header: Row
    rows: tuple[Row, ...]
    left: int = 1
    folded: bool = False
    strong: bool = False


def left_out(report: Report) -> Table | None:
    """The groups that could not be cut, and why."""
    rows = tuple(
        (entry.groups, words.count(entry.count), entry.reason) for entry in report.left_out or ()
    )
    if not rows:
        return None
    return Table(
        caption="Groups that can't be cut and stay whole",
        header=("groups", "number", "reason"),
        rows=rows,
        folded=len(rows) > _LONG,
    )


def large_tokens(report: Report) -> Table | None:
    """How much of each Hessian the largest tokens own, and where these are."""
    rows = tuple(
        (
            entry.group,
            f"{entry.permille:.1%}",
            f"{entry.percent:.1%}",
            ", ".join(f"{place} ({count})" for place, count in entry.positions.items()),
        )
        for entry in report.large_tokens or ()
    )
    if not rows:
        return None
    return Table(
        caption="The share of the Hessian's trace that the largest tokens own",
        header=("group", "0.1 % of tokens", "1 % of tokens", "positions of the 0.1 % (how many)"),
        rows=rows,
    )


def header(report: Report) -> Row:
    """The heads of `rows`: an empty one, the models, and `change` if there are several models."""
    models = report.models or ()
    return ("", *models, "change") if len(models) > 1 else ("", *models)


def rows(report: Report) -> list[Row]:
    """The rows of the summary: name, a cell for each model, the last model against the first."""
    models, width = report.models or (), len(header(report))
    if not models:
        return []  # nothing was measured: the shares were settled alone
    cells = [_row(report, name, values, style) for name, values, style in _list_figures(report)]
    for name, task in average_last(report).items():
        share = is_share(task, models)
        scores = [score(task, column, share) for column in models]
        row = (f"{name}, {task.metric}", *scores, difference(task, models, share))
        cells.append(row[:width])
    return cells


def _list_figures(report: Report) -> Iterator[tuple[str, Mapping[str, float], Style]]:
    """Yield each measured figure: name, column → value, and the function that formats it."""
    latency = report.latency
    yield "parameters", report.parameters or {}, words.count
    yield "weights", report.weight_bytes or {}, words.memory
    yield "MACs", report.macs or {}, words.macs
    for corpus, values in (report.perplexity or {}).items():
        yield f"perplexity, {corpus}", values.columns, words.decimal
    prefill = latency.prefill_tokens_per_second if latency else {}
    decode = latency.decode_tokens_per_second if latency else {}
    yield "prefill, tokens/s", prefill, words.decimal
    yield "decode, tokens/s", decode, words.decimal
    yield "peak memory, evaluation", report.evaluation_bytes or {}, words.memory


def _row(report: Report, name: str, values: Mapping[str, float], style: Style) -> Row:
    given = [values.get(column) for column in report.models or ()]
    return (name, *map(style, given), words.change(given[0], given[-1]))[: len(header(report))]


def summary(report: Report) -> Table:
    """`rows` that have a figure, under their heads."""
    measured = tuple(row for row in rows(report) if set(row[1:]) != {words.NONE})
    models = report.models or ()
    several = len(models) > 1
    caption = f"Change: {models[-1]} against {models[0]}" if several else "What was measured"
    return Table(caption=caption, header=header(report), rows=measured, strong=several)


def layers(report: Report) -> Table | None:
    """A row for each layer and kind: units kept and in all, share removed, share of the policy."""
    entries = units(report)
    if not entries:
        return None
    planned = any(entry.planned is not None for entry in entries)
    return Table(
        caption="Units kept in every layer",
        header=("layer", "kind", "kept", "of", *(["policy"] if planned else []), "removed"),
        rows=tuple(_layer(entry, planned) for entry in entries),
        left=2,
        folded=len(entries) > _LONG,
    )


def _layer(entry: Units, planned: bool) -> Row:
    index = words.NONE if entry.index is None else str(entry.index)
    counts = (words.count(entry.kept), words.count(entry.total))
    policy = [words.percent(entry.planned)] if planned else []
    return (index, entry.kind, *counts, *policy, words.percent(entry.removed))


def policy_note(entries: Sequence[Units]) -> str:
    """A sentence on the policy's curve; empty without a curve."""
    if all(entry.planned is None for entry in entries):
        return ""
    return "The policy gives proportions; its curve is scaled to what was removed."


def error_columns(report: Report) -> list[str]:
    """The models whose layers' errors the report has."""
    measured = {column for row in report.layer_error or () for column in row.columns}
    return [column for column in report.models or () if column in measured]


def errors(report: Report) -> Table | None:
    """A row for each layer: the relative squared error of its output."""
    columns = error_columns(report)
    if not columns:
        return None
    cells = tuple(
        (str(row.index), *(words.decimal(row.columns.get(column)) for column in columns))
        for row in report.layer_error or ()
    )
    caption = "Relative squared error of every layer's output"
    return Table(caption=caption, header=("layer", *columns), rows=cells, folded=len(cells) > _LONG)


def tasks(report: Report) -> list[Table]:
    """Two tables of scores at most: of the tasks, and of the members of task groups."""
    parts = [("Scores with their standard errors", average_last(report), False)]
    parts += [("Members of task groups", members(report), True)]
    head = ("task", "metric", "shots", "samples", *(report.models or ()))
    return [
        Table(
            caption=caption,
            header=head,
            rows=tuple(_task(report, name, task) for name, task in own.items()),
            left=2,
            folded=fold,
        )
        for caption, own, fold in parts
        if own
    ]


def _task(report: Report, name: str, task: TaskScores) -> Row:
    models = report.models or ()
    share = is_share(task, models)
    name = f"{task.of}: {name}" if task.of else name
    known = (task.metric, words.count(task.fewshot), words.count(task.samples))
    return (name, *known, *(score(task, column, share) for column in models))


# The figures of a step: their heads, and how they are written.
_CURVE: dict[str, tuple[str, Callable[[CurvePoint], str]]] = {
    "tokens": ("tokens", lambda point: words.count(point.tokens)),
    "learning_rate": ("learning rate", lambda point: words.significant(point.learning_rate)),
    "loss": ("training loss", lambda point: words.decimal(point.loss)),
    "validation_loss": ("validation loss", lambda point: words.decimal(point.validation_loss)),
}


def curve(report: Report) -> Table | None:
    """A row for each logged step; if there are more than a hundred, evenly spread ones."""
    points = report.recovery.curve if report.recovery else ()
    if not points:
        return None
    every = -(-len(points) // _STEPS)
    shown = [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]
    keys = [key for key in _CURVE if any(getattr(point, key) is not None for point in points)]
    corpora = list(dict.fromkeys(c for point in points for c in point.perplexity or {}))
    cells = tuple(
        (words.count(point.step), *(_CURVE[key][1](point) for key in keys))
        + tuple(words.decimal((point.perplexity or {}).get(corpus)) for corpus in corpora)
        for point in shown
    )
    named = [f"perplexity, {corpus}" for corpus in corpora]
    thinned = f"; one row in {every}, all are in report.json" if every > 1 else ""
    return Table(
        caption=f"Recovery, step by step{thinned}",
        header=("step", *(_CURVE[key][0] for key in keys), *named),
        rows=cells,
        folded=len(cells) > _LONG,
    )


def settings(report: Report) -> Table | None:
    """The settings of the recovery."""
    given = report.recovery.settings if report.recovery else {}
    if not given:
        return None
    cells = tuple(
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in given.items()
    )
    caption, head = "Settings of recovery", ("setting", "value")
    return Table(caption=caption, header=head, rows=cells, left=2, folded=True)


def modules(report: Report) -> Table | None:
    """Multiply-adds by kind of module."""
    given = report.macs_by_module or {}
    names = list(dict.fromkeys(name for values in given.values() for name in values))
    if not names:
        return None
    cells = []
    for name in names:
        values = {column: own[name] for column, own in given.items() if name in own}
        cells.append(_row(report, name, values, words.macs))
    return Table(caption="MACs by module", header=header(report), rows=tuple(cells))


def stages(report: Report) -> Table | None:
    """Wall-clock time and peak memory of the run's stages."""
    seconds, peaks = report.seconds or {}, report.peak_memory_bytes or {}
    cells = tuple(
        (name, words.duration(seconds.get(name)), words.memory(peaks.get(name)))
        for name in dict.fromkeys([*seconds, *peaks])
    )
    if not cells:
        return None
    return Table(caption="Stages of the run", header=("stage", "time", "peak memory"), rows=cells)
