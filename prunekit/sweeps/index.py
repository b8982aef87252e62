"""`sweep.csv` and `sweep.html`: a row a run, written anew whenever a run ends."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.errors import ConfigError, DataError, suggest
from prunekit.runtime.files import write_text
from prunekit.sweeps.record import DONE, FOLDER, Record, Records

if TYPE_CHECKING:
    from prunekit.report import Report

Figures = dict[str, float]
PERPLEXITY = "perplexity"  # the geometric mean of all `perplexity.<corpus>`
DECODE = "decode_tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A run and its figures.

    Attributes:
        record: what became of the run.
        figures: name → figure of the last model that was measured; empty where there is no report.
        dense: the same of the dense model, where it was measured beside.
    """

    record: Record
    figures: Figures
    dense: Figures


def write_index(sweep: Path) -> list[Record]:
    """Write `sweep.csv` and `sweep.html` from what the runs left; the records of all runs.

    Runs that end at once in several processes take turns, so that none is left out.
    """
    from filelock import FileLock

    from prunekit.sweeps.page import render_page

    records = Records(sweep)
    if not (sweep / FOLDER).is_dir():
        return []
    with FileLock(sweep / FOLDER / "lock"):
        lines = [read_line(sweep, record) for record in records.all()]
        write_text(sweep / "sweep.csv", to_csv(lines))
        write_text(sweep / "sweep.html", render_page(lines, sweep.name))
    return [line.record for line in lines]


def read_line(sweep: Path, record: Record) -> Line:
    """A run and the figures of its report, if it has one."""
    from prunekit.report import Report

    path = sweep / record.folder / "report.json"
    if record.status != DONE or not path.is_file():
        return Line(record=record, figures={}, dense={})
    try:
        report = Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, DataError):  # changed by hand, or removed meanwhile
        return Line(record=record, figures={}, dense={})
    models = report.models or ()
    dense = figures_of(report, "dense") if "dense" in models[:-1] else {}
    return Line(record=record, figures=figures_of(report), dense=dense)


def figures_of(report: Report, model: str | None = None) -> Figures:
    """The figures of a model in a report, by their names in sweep.csv.

    Args:
        report: the report.
        model: the column of the report; None: the last one.
    """
    column = model or (report.models or ("",))[-1]
    found = {name: value for name, value in _list_figures(report, column) if value is not None}
    perplexities = [value for name, value in found.items() if name.startswith("perplexity.")]
    if perplexities:
        found[PERPLEXITY] = math.exp(math.fsum(map(math.log, perplexities)) / len(perplexities))
    return found


def _list_figures(report: Report, column: str) -> Iterator[tuple[str, float | None]]:
    """Yield the name and the value of each figure that a report may have of a model."""
    if column != "dense":
        yield "removed", report.ratio.achieved if report.ratio else None
    yield "parameters", (report.parameters or {}).get(column)
    yield "weight_bytes", (report.weight_bytes or {}).get(column)
    yield "macs", (report.macs or {}).get(column)
    for corpus, perplexity in (report.perplexity or {}).items():
        yield f"perplexity.{corpus}", perplexity.columns.get(column)
    for name, task in (report.tasks or {}).items():
        score = task.columns.get(column)
        yield f"tasks.{name}", score.value if score else None
    if report.latency is not None:
        yield "prefill_tokens_per_second", report.latency.prefill_tokens_per_second.get(column)
        yield DECODE, report.latency.decode_tokens_per_second.get(column)


def objective_of(folder: Path, names: str | Sequence[str]) -> float | tuple[float, ...]:
    """What a sweep that searches is told of a run: one figure, or several.

    Args:
        folder: the folder of the run.
        names: one figure or several, by their names in sweep.csv.

    Raises:
        ConfigError: a figure that the run's report does not have.
    """
    from prunekit.report import Report

    path = folder / "report.json"
    report = Report.from_json(path.read_text(encoding="utf-8")) if path.is_file() else Report()
    figures = figures_of(report)
    wanted = [names] if isinstance(names, str) else [str(name) for name in names]
    for name in wanted:
        if name not in figures:
            raise ConfigError(f"objective: no figure {name!r}: {suggest(name, list(figures))}")
    values = tuple(figures[name] for name in wanted)
    return values[0] if len(values) == 1 else values


def swept_of(lines: Sequence[Line]) -> list[str]:
    """The swept keys of all runs, in their order."""
    return list(dict.fromkeys(key for line in lines for key in line.record.values))


def columns_of(lines: Sequence[Line]) -> list[str]:
    """The names of the figures of all runs, those of a kind beside each other."""
    names = dict.fromkeys(name for line in lines for name in line.figures)
    several = sum(name.startswith("perplexity.") for name in names) > 1
    shown = [name for name in names if several or name != PERPLEXITY]
    kinds = list(dict.fromkeys(name.partition(".")[0] for name in shown))
    return sorted(shown, key=lambda name: kinds.index(name.partition(".")[0]))


def to_csv(lines: Sequence[Line]) -> str:
    """The text of sweep.csv; a figure that a run has not is an empty cell."""
    swept, figures = swept_of(lines), columns_of(lines)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", *swept, "status", *figures, "seconds", "folder", "error"])
    for line in lines:
        record = line.record
        own: Mapping[str, float] = line.figures
        seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
        measured = [own.get(name, "") for name in figures]
        values = [record.values.get(key, "") for key in swept]
        ends = [seconds, record.folder, record.error or ""]
        rows.writerow([record.number, *values, record.status, *measured, *ends])
    return text.getvalue()
