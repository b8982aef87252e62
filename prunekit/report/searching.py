"""What a report shows of a search: the cuts compared, the shares they give, the rounds."""

from __future__ import annotations

from prunekit.report import words
from prunekit.report.parts import SearchFigures
from prunekit.report.record import Report
from prunekit.report.tables import Table

_LONG = 12  # rows from which on a table is folded


def search_of(report: Report) -> SearchFigures | None:
    """The search of the report's policy, if it searched."""
    return report.policy.search if report.policy else None


def tell_search(report: Report) -> str:
    """The verdict of a search, and what it took, in two sentences."""
    search = search_of(report)
    if search is None:
        return ""
    parts = [f"{count} ({name.replace('_', ' ')})" for name, count in search.samples.items()]
    verdict = search.verdict[:1].upper() + search.verdict[1:]
    return (
        f"{verdict}. {search.evaluations:,} candidates were judged, for as much as "
        f"{search.passes:.0f} forward passes over the calibration set; samples: {', '.join(parts)}."
    )


def search_tables(report: Report) -> list[Table]:
    """Three tables: the cuts that were compared, their shares, the rounds."""
    search = search_of(report)
    return [] if search is None else [_cuts(search), _shares(search), _rounds(search)]


def _cuts(search: SearchFigures) -> Table:
    rows = [
        (
            f"{name} (taken)" if name == search.taken else name,
            words.decimal(cut.fitness),
            words.decimal(cut.held_out),
            f"{words.decimal(cut.lead)} ± {words.decimal(cut.lead_error)}",
        )
        for name, cut in search.cuts.items()
    ]
    return Table(
        caption="Seeds and winners: KL to the dense model",
        header=("cut", "KL where candidates were judged", "held-out KL", "best winner's lead"),
        rows=tuple(rows),
    )


def _shares(search: SearchFigures) -> Table:
    rows = [
        (
            group,
            *(words.percent(cut.shares.get(group)) for cut in search.cuts.values()),
            words.decimal(search.prices.get(group)),
        )
        for group in next(iter(search.cuts.values())).shares
    ]
    return Table(
        caption="The share removed from each group, and the KL of replacing it alone",
        header=("group", *search.cuts, "KL alone"),
        rows=tuple(rows),
        folded=len(rows) > _LONG,
    )


def _rounds(search: SearchFigures) -> Table:
    rows = [
        (
            str(number),
            words.percent(part.step, 2),
            words.memory(part.database_bytes),
            words.count(part.evaluations),
            words.decimal(part.curve[0].divergence),
            words.decimal(part.curve[-1].divergence),
        )
        for number, part in enumerate(search.rounds, 1)
    ]
    return Table(
        caption="The rounds of the search",
        header=("round", "step", "database", "candidates", "KL at first", "KL at last"),
        rows=tuple(rows),
    )
