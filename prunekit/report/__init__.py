"""The report of a run: JSON for programs, Markdown with a picture for people, a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, str, str, str]


def to_json(report: Mapping[str, Any]) -> str:
    """`report.json`."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def rows(report: Mapping[str, Any]) -> list[Row]:
    """(what, dense, pruned, change) of everything measured on both models."""
    found = [_row("parameters", report["parameters"], "{:,.0f}")]
    if "weight_bytes" in report:
        found.append(_row("weight bytes", report["weight_bytes"], "{:,.0f}"))
    for name, values in report.get("perplexity", {}).items():
        found.append(_row(f"perplexity, {name}", values, "{:.2f}"))
    if "tokens_per_second" in report:
        found.append(_row("tokens/s (prefill)", report["tokens_per_second"], "{:,.0f}"))
    return found


def _row(name: str, values: Mapping[str, Any], style: str) -> Row:
    dense, pruned = values["dense"], values["pruned"]
    return name, style.format(dense), style.format(pruned), f"{pruned / dense - 1:+.1%}" if dense else "–"


def render_markdown(report: Mapping[str, Any]) -> str:
    """`report.md`."""
    lines = [f"# {report['method']}, {report['ratio']['achieved']:.2%} of all parameters removed", ""]
    lines += ["| | dense | pruned | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(report)]
    lines += ["", "![kept units per layer](layers.svg)", "", "| layer | kept |", "|---|---|"]
    for layer in report["layers"]:
        kept = [f"{k} {v['kept']} of {v['total']}" for k, v in layer.items() if k != "index"]
        lines.append(f"| {'–' if layer['index'] is None else layer['index']} | {', '.join(kept)} |")
    for name, values in report.get("perplexity", {}).items():
        lines += ["", f"Perplexity on {name}: {values['protocol']}."]
    for name, text in (report.get("samples") or {}).items():
        if text:
            lines += ["", f"Sample, {name}:", "", "```", text, "```"]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())
    made = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines += ["", f"{_aim(report)}, seed {report['seed']}; {seconds}; {made}."]
    return "\n".join(lines) + "\n"


def _aim(report: Mapping[str, Any]) -> str:
    if target := report.get("target"):
        return (
            f"Target {target['limit']:,g} {target['measure']} of {target['dense']:,g}, reached {target['achieved']:,g}"
        )
    return f"Target ratio {report['ratio']['target']}"


def write_pictures(report: Mapping[str, Any], folder: Path) -> None:
    """`layers.svg`: the share of units kept in every layer."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "prunekit"
    kinds = sorted({key for layer in report["layers"] for key in layer if key != "index"})
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    width = 0.8 / max(len(kinds), 1)
    for k, (kind, colour) in enumerate(zip(kinds, ["#0072B2", "#E69F00"] * math.ceil(len(kinds) / 2), strict=False)):
        shares = [100 * v["kept"] / v["total"] if (v := layer.get(kind)) else 0 for layer in report["layers"]]
        places = [i + (k - (len(kinds) - 1) / 2) * width for i in range(len(shares))]
        axes.bar(places, shares, width, label=kind, color=colour, hatch="//" * (k % 2), edgecolor="white")
    axes.set(xlabel="layer", ylabel="units kept, %", ylim=(0, 100))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=max(len(kinds), 1))
    figure.savefig(folder / "layers.svg", metadata={"Date": None})
    pyplot.close(figure)


def print_summary(report: Mapping[str, Any], folder: Path) -> None:
    """The table, the two lines that load the result, the samples."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", *(("dense", "pruned", "change")), title=f"{report['method']}, ratio {report['ratio']['achieved']:.4f}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(report):
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"import prunekit\nmodel = prunekit.from_pretrained({str(folder / 'model')!r})", markup=False)
    for name, text in (report.get("samples") or {}).items():
        if text:
            console.print(f"\n{name}:\n{text}", markup=False)
    console.print(f"\n{folder}: model/, plan.json, report.json, report.md", markup=False)
