"""The report as sections of text, tables, pictures and samples, whatever they look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunekit.report import tables, words
from prunekit.report.pictures import Picture, pictures
from prunekit.report.record import Report
from prunekit.report.searching import search_tables, tell_search
from prunekit.report.tables import Table
from prunekit.report.units import units


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One prompt and what each model made of it.

    Attributes:
        prompt: the text that the models began with.
        mode: how tokens were chosen, in words.
        answers: column → text.
    """

    prompt: str
    mode: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A command, verbatim."""

    text: str


Block = str | Items | Code | Table | Picture | Answers


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and the blocks under it; there is at least one."""

    title: str
    blocks: tuple[Block, ...]


def title(report: Report) -> str:
    """What was done, in a line."""
    parts = [report.method] if report.method else []
    if report.vocabulary:
        parts.append("{dense:,} tokens cut to {pruned:,}".format(**report.vocabulary.tokens))
    if report.ratio:
        parts.append(f"{report.ratio.achieved:.2%} of {_whole(report)} removed")
    if report.task == "prune":
        return ", ".join(parts) or "prune"
    if not report.ratio:
        parts += (report.models or ())[-1:]
    return ": ".join(filter(None, [report.task, ", ".join(parts)]))


def _whole(report: Report) -> str:
    """What the ratio is a share of, in words."""
    return "the parameters left" if report.vocabulary else "all parameters"


def aim(report: Report) -> str:
    """The target and what was reached; empty where nothing was pruned."""
    if target := report.target:
        asked = f"{target.limit:,g} {target.measure} of {target.dense:,g}"
        return f"Target: {asked}; {target.achieved:,g} reached."
    ratio = report.ratio
    if ratio is None or ratio.target is None:
        return ""
    return f"Target: {ratio.target:.2%} of {_whole(report)}; {ratio.achieved:.2%} removed."


def tell_vocabulary(report: Report) -> str:
    """Tell in words which tokens went; empty where all stayed."""
    own = report.vocabulary
    if own is None:
        return ""
    return (
        f"Vocabulary: {own.distinct_tokens:,} different tokens occur in {', '.join(own.corpora)}; "
        f"with what leads to them, {own.tokens['pruned']:,} of {own.tokens['dense']:,} stay."
    )


def document(report: Report, drawn: Mapping[str, Picture] | None = None) -> list[Section]:
    """The sections that the report has figures for, in order; `drawn` are its `pictures`."""
    drawn = pictures(report) if drawn is None else drawn
    sections: dict[str, list[Block | None]] = {
        "Warnings": [Items(report.warnings) if report.warnings else None],
        "Summary": [
            aim(report),
            tell_vocabulary(report),
            _summary(report),
            _protocols(report),
            _tell_float64(report),
        ],
        "What was kept": [
            drawn.get("layers"),
            _tell_removed_whole(report),
            _tell_steps(report),
            tables.left_out(report),
        ],
        "Ratio by layer": [
            tables.policy_note(units(report)),
            drawn.get("ratio"),
            tables.layers(report),
        ],
        "Large tokens": [tables.large_tokens(report)],
        "Search": [tell_search(report), drawn.get("search"), *search_tables(report)],
        "Error by layer": [_error_formula(drawn), drawn.get("error"), tables.errors(report)],
        "Recovery": [
            _recovery(report),
            drawn.get("curve"),
            tables.curve(report),
            tables.settings(report),
        ],
        "Tasks": [drawn.get("tasks"), *tables.tasks(report)],
        "Samples": [*_samples(report)],
        "Cost": [tables.modules(report), tables.stages(report)],
        "To repeat it": [Code(report.command) if report.command else None, _versions(report)],
    }
    filled = {name: tuple(block for block in blocks if block) for name, blocks in sections.items()}
    return [Section(title=name, blocks=blocks) for name, blocks in filled.items() if blocks]


def _summary(report: Report) -> Table | None:
    table = tables.summary(report)
    return table if table.rows else None


def _tell_removed_whole(report: Report) -> str:
    """Tell in words which groups are removed whole: the crosses in the picture."""
    layers: dict[str, list[str]] = {}
    for entry in units(report):
        if not entry.kept and entry.index is not None:
            layers.setdefault(entry.kind, []).append(str(entry.index))
    told = "; ".join(f"{kind} of layer {', '.join(indices)}" for kind, indices in layers.items())
    return f"Removed whole (crosses): {told}." if told else ""


def _tell_steps(report: Report) -> str:
    """Tell in words what the numbers of units are multiples of; empty where any number may stay."""
    steps = {kind: step for kind, step in (report.steps or {}).items() if step > 1}
    told = ", ".join(f"{step} ({kind})" for kind, step in steps.items())
    return f"A group keeps all of its units or a multiple of: {told}." if told else ""


def _error_formula(drawn: Mapping[str, Picture]) -> str:
    if "error" not in drawn:
        return ""
    return "Each layer's output against the dense model's: ‖output − dense‖² / ‖dense‖²."


def _protocols(report: Report) -> Items | None:
    """How the summary's figures were measured."""
    protocols = {
        f"Perplexity, {corpus}": values.protocol
        for corpus, values in (report.perplexity or {}).items()
    }
    protocols["MACs"] = report.macs_protocol
    protocols["Speed"] = report.latency.protocol if report.latency else None
    lines = tuple(f"{name}: {told.rstrip('.')}." for name, told in protocols.items() if told)
    return Items(lines) if lines else None


def _tell_float64(report: Report) -> str:
    """Tell how many Hessians took float64; empty where none did."""
    count = sum((report.float64 or {}).values())
    return f"Hessians that took float64 to invert: {count:,}." if count else ""


def _recovery(report: Report) -> str:
    """How far the recovery went, in a sentence."""
    recovery = report.recovery
    if recovery is None:
        return ""
    early = ["stopped early"] if recovery.stopped_early else []
    parts = [f"{recovery.steps:,} steps", *early, f"step {recovery.best_step:,} was kept"]
    return f"{'; '.join(parts)}."


def _samples(report: Report) -> list[Answers]:
    samples = []
    for row in report.samples or ():
        answers = {
            column: words.plain(row.columns[column])
            for column in report.models or ()
            if column in row.columns
        }
        prompt, mode = words.plain(row.prompt), words.plain(row.mode)
        samples.append(Answers(prompt=prompt, mode=mode, answers=answers))
    return samples


def _versions(report: Report) -> str:
    """The seed and the versions of packages, in a sentence."""
    parts = [] if report.seed is None else [f"seed {report.seed}"]
    parts += [f"{name} {version}" for name, version in (report.versions or {}).items()]
    return f"{', '.join(parts)}." if parts else ""
