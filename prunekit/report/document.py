"""The report as sections of text, tables, pictures and samples; Markdown and the page only differ
in how they look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.report import tables, words
from prunekit.report.pictures import Picture, pictures
from prunekit.report.tables import Table
from prunekit.report.units import units


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what each model (`answers`: column → text) made of it."""

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


Block = str | Items | Code | Table | Picture | Sample


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it; never empty."""

    title: str
    blocks: tuple[Block, ...]


def title(report: Mapping[str, Any]) -> str:
    """What was done, in a line."""
    share = (report.get("ratio") or {}).get("achieved")
    removed = "" if share is None else f"{share:.2%} of all parameters removed"
    named = [report["method"]] if report.get("method") else []
    if report["task"] == "prune":
        return ", ".join([*named, removed] if removed else named) or "prune"
    return f"{report['task']}: " + ", ".join(
        [*named, removed] if removed else [*named, *report["models"][-1:]]
    )


def aim(report: Mapping[str, Any]) -> str:
    """What was asked for and what was reached; empty where nothing was pruned."""
    if target := report.get("target"):
        reached = f"{target['achieved']:,g} reached"
        return (
            f"Target: {target['limit']:,g} {target['measure']} of {target['dense']:,g}; {reached}."
        )
    ratio = report.get("ratio") or {}
    if ratio.get("target") is None:
        return ""
    return f"Target: {ratio['target']:.2%} of all parameters; {ratio['achieved']:.2%} removed."


def document(report: Mapping[str, Any]) -> list[Section]:
    """The sections that the report has figures for, in order."""
    drawn = pictures(report)
    parts: list[tuple[str, list[Block | None]]] = [
        (
            "Warnings",
            [Items(tuple(report.get("warnings") or ())) if report.get("warnings") else None],
        ),
        ("Summary", [aim(report), _table(tables.summary(report)), _protocols(report)]),
        ("What was kept", [drawn.get("layers"), _gone(report)]),
        (
            "Ratio by layer",
            [tables.policy_note(units(report)), drawn.get("ratio"), tables.layers(report)],
        ),
        ("Error by layer", [_explain(drawn), drawn.get("error"), tables.errors(report)]),
        (
            "Recovery",
            [_recovery(report), drawn.get("curve"), tables.curve(report), tables.settings(report)],
        ),
        ("Tasks", [drawn.get("tasks"), *tables.tasks(report)]),
        ("Samples", [*_samples(report)]),
        ("Cost", [tables.modules(report), tables.stages(report)]),
        (
            "To repeat it",
            [Code(report["command"]) if report.get("command") else None, _versions(report)],
        ),
    ]
    kept = [(name, tuple(block for block in blocks if block)) for name, blocks in parts]
    return [Section(title=name, blocks=blocks) for name, blocks in kept if blocks]


def _table(table: Table) -> Table | None:
    return table if table.rows else None


def _gone(report: Mapping[str, Any]) -> str:
    """The crosses in the picture, in words."""
    gone: dict[str, list[str]] = {}
    for entry in units(report):
        if not entry.kept and entry.index is not None:
            gone.setdefault(entry.kind, []).append(str(entry.index))
    told = "; ".join(f"{kind} of layer {', '.join(indices)}" for kind, indices in gone.items())
    return f"Removed whole (crosses): {told}." if told else ""


def _explain(drawn: Mapping[str, Picture]) -> str:
    formula = "‖output − dense‖² / ‖dense‖²"
    return f"Each layer's output against the dense model's: {formula}." if "error" in drawn else ""


def _protocols(report: Mapping[str, Any]) -> Items | None:
    """How the summary's figures were measured."""
    named = [
        (f"Perplexity, {name}", values.get("protocol"))
        for name, values in (report.get("perplexity") or {}).items()
    ]
    named += [
        ("MACs", report.get("macs_protocol")),
        ("Speed", (report.get("latency") or {}).get("protocol")),
    ]
    lines = tuple(f"{name}: {protocol.rstrip('.')}." for name, protocol in named if protocol)
    return Items(lines) if lines else None


def _recovery(report: Mapping[str, Any]) -> str:
    given = report.get("recovery") or {}
    told: list[tuple[str, Callable[[Any], str]]] = [
        ("steps", lambda steps: f"{steps:,} steps"),
        ("stopped_early", lambda early: "stopped early" if early else ""),
        ("best_step", lambda step: f"step {step:,} was kept"),
    ]
    lines = [style(given[key]) for key, style in told if given.get(key) is not None]
    return "; ".join(line for line in lines if line) + "." if any(lines) else ""


def _samples(report: Mapping[str, Any]) -> list[Block | None]:
    return [
        Sample(
            prompt=words.plain(sample["prompt"]),
            mode=words.plain(sample.get("mode", "")),
            answers={
                c: words.plain(sample[c]) for c in report["models"] if sample.get(c) is not None
            },
        )
        for sample in report.get("samples") or []
    ]


def _versions(report: Mapping[str, Any]) -> str:
    seed = [f"seed {report['seed']}"] if report.get("seed") is not None else []
    found = [*seed, *(f"{name} {value}" for name, value in (report.get("versions") or {}).items())]
    return ", ".join(found) + "." if found else ""
