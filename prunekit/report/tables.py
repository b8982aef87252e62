"""The report's tables, as text: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.report import words
from prunekit.report.tasks import average_last, difference, is_share, members, score
from prunekit.report.units import Units, units

Row = tuple[str, ...]
_LONG = 12  # rows from which on a table is folded
_STEPS = 100  # rows a curve's table may have


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row, the first `left` columns hold words. `folded`:
    it may be long; `strong`: the last column is what counts.
    """

    caption: str
    header: Row
    rows: tuple[Row, ...]
    left: int = 1
    folded: bool = False
    strong: bool = False


def header(report: Mapping[str, Any]) -> Row:
    """The heads of `rows`: nothing, the models, `change` where there are two or more."""
    models = tuple(report["models"])
    return ("", *models, "change") if len(models) > 1 else ("", *models)


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The summary: (what, a cell a model …, the last model against the first) of everything
    measured.
    """
    found = [_row(report, name, values, style) for name, values, style in _measured(report)]
    for name, task in average_last(report).items():
        share = is_share(task, report["models"])
        cells = [score(task, column, share) for column in report["models"]]
        name = f"{name}, {task['metric']}" if "metric" in task else name
        found.append(
            (name, *cells, difference(task, report["models"], share))[: len(header(report))]
        )
    return found


def _measured(
    report: Mapping[str, Any],
) -> Iterator[tuple[str, Mapping[str, Any], Callable[[Any], str]]]:
    latency = report.get("latency") or {}
    yield "parameters", report.get("parameters") or {}, words.count
    yield "weights", report.get("weight_bytes") or {}, words.memory
    yield "MACs", report.get("macs") or {}, words.macs
    for corpus, values in (report.get("perplexity") or {}).items():
        yield f"perplexity, {corpus}", values, words.decimal
    for phase in ("prefill", "decode"):
        yield f"{phase}, tokens/s", latency.get(f"{phase}_tokens_per_second") or {}, words.decimal
    yield "peak memory, evaluation", report.get("evaluation_bytes") or {}, words.memory


def _row(
    report: Mapping[str, Any], name: str, values: Mapping[str, Any], style: Callable[[Any], str]
) -> Row:
    given = [values.get(column) for column in report["models"]]
    return (name, *map(style, given), words.change(given[0], given[-1]))[: len(header(report))]


def summary(report: Mapping[str, Any]) -> Table:
    """`rows` that have a figure, under their heads."""
    measured = tuple(row for row in rows(report) if set(row[1:]) != {words.NONE})
    models = report["models"]
    caption = (
        f"Change: {models[-1]} against {models[0]}" if len(models) > 1 else "What was measured"
    )
    return Table(caption=caption, header=header(report), rows=measured, strong=len(models) > 1)


def layers(report: Mapping[str, Any]) -> Table | None:
    """A row a layer: kept and total units of every kind, the share removed, the policy's share
    where it is known.
    """
    entries = units(report)
    if not entries:
        return None
    planned = any(entry.planned is not None for entry in entries)
    found = tuple(
        (
            "–" if e.index is None else str(e.index),
            e.kind,
            words.count(e.kept),
            words.count(e.total),
        )
        + ((words.percent(e.planned),) if planned else ())
        + (words.percent(e.removed),)
        for e in entries
    )
    head = ("layer", "kind", "kept", "of", *(("policy",) if planned else ()), "removed")
    return Table(
        caption="Units kept in every layer",
        header=head,
        rows=found,
        left=2,
        folded=len(found) > _LONG,
    )


def policy_note(entries: Sequence[Units]) -> str:
    """What the policy's curve means, where there is one."""
    if all(entry.planned is None for entry in entries):
        return ""
    return "The policy gives proportions; its curve is scaled to what was removed."


def errors(report: Mapping[str, Any]) -> Table | None:
    """A row a layer: the relative squared error of its output."""
    given = report.get("layer_error") or []
    columns = [
        column for column in report["models"] if any(row.get(column) is not None for row in given)
    ]
    if not columns:
        return None
    found = tuple(
        (str(row["index"]), *(words.decimal(row.get(column)) for column in columns))
        for row in given
    )
    caption = "Relative squared error of every layer's output"
    return Table(caption=caption, header=("layer", *columns), rows=found, folded=len(found) > _LONG)


def tasks(report: Mapping[str, Any]) -> list[Table]:
    """The tasks with their metric, shots and number of samples; members of groups in a table of
    their own.
    """
    parts = [("Scores with their standard errors", average_last(report), False)]
    parts += [("Members of task groups", members(report), True)]
    head = ("task", "metric", "shots", "samples", *report["models"])
    return [
        Table(
            caption=caption,
            header=head,
            rows=tuple(_task(report, *item) for item in own.items()),
            left=2,
            folded=fold,
        )
        for caption, own, fold in parts
        if own
    ]


def _task(report: Mapping[str, Any], name: str, task: Mapping[str, Any]) -> Row:
    share = is_share(task, report["models"])
    name = f"{task['of']}: {name}" if "of" in task else name
    known = (
        task.get("metric", words.NONE),
        words.count(task.get("fewshot")),
        words.count(task.get("samples")),
    )
    return (name, *known, *(score(task, column, share) for column in report["models"]))


_CURVE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens": ("tokens", words.count),
    "learning_rate": ("learning rate", "{:.3g}".format),
    "loss": ("training loss", words.decimal),
    "validation_loss": ("validation loss", words.decimal),
}


def curve(report: Mapping[str, Any]) -> Table | None:
    """A row a logged step; evenly thinned where there are more than a hundred."""
    given = (report.get("recovery") or {}).get("curve") or []
    if not given:
        return None
    every = -(-len(given) // _STEPS)
    shown = [row for i, row in enumerate(given) if i % every == 0 or i == len(given) - 1]
    keys = [key for key in _CURVE if any(row.get(key) is not None for row in given)]
    corpora = list(dict.fromkeys(corpus for row in given for corpus in row.get("perplexity") or {}))
    found = tuple(
        (words.count(row["step"]), *(_cell(row.get(key), _CURVE[key][1]) for key in keys))
        + tuple(words.decimal((row.get("perplexity") or {}).get(corpus)) for corpus in corpora)
        for row in shown
    )
    head = (
        "step",
        *(_CURVE[key][0] for key in keys),
        *(f"perplexity, {corpus}" for corpus in corpora),
    )
    caption = "Recovery, step by step" + (
        f"; one row in {every}, all are in report.json" if every > 1 else ""
    )
    return Table(caption=caption, header=head, rows=found, folded=len(found) > _LONG)


def _cell(value: Any, style: Callable[[Any], str]) -> str:
    return words.NONE if value is None else style(value)


def settings(report: Mapping[str, Any]) -> Table | None:
    """How recovery was done."""
    given = (report.get("recovery") or {}).get("settings") or {}
    found = tuple((key, v if isinstance(v, str) else json.dumps(v)) for key, v in given.items())
    return (
        Table(
            caption="Settings of recovery",
            header=("setting", "value"),
            rows=found,
            left=2,
            folded=True,
        )
        if found
        else None
    )


def modules(report: Mapping[str, Any]) -> Table | None:
    """MACs by kind of module."""
    given = report.get("macs_by_module") or {}
    names = list(dict.fromkeys(name for values in given.values() for name in values))
    found = tuple(
        _row(report, n, {c: v[n] for c, v in given.items() if n in v}, words.macs) for n in names
    )
    return Table(caption="MACs by module", header=header(report), rows=found) if found else None


def stages(report: Mapping[str, Any]) -> Table | None:
    """Wall-clock time and peak memory of the run's stages."""
    seconds, peaks = report.get("seconds") or {}, report.get("peak_memory_bytes") or {}
    names = dict.fromkeys([*seconds, *peaks])
    found = tuple(
        (name, words.duration(seconds.get(name)), words.memory(peaks.get(name))) for name in names
    )
    return (
        Table(caption="Stages of the run", header=("stage", "time", "peak memory"), rows=found)
        if found
        else None
    )
