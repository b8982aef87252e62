"""What the tracer found, for people: a table, a GraphML file, and a picture of one layer's
couplings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.report import words

if TYPE_CHECKING:
    from prunekit.graph import CoupledGroup, CouplingGraph


def print_groups(graph: CouplingGraph) -> None:
    """One row a group: name, kind, layer, units, parameters per unit, members with shapes, prunable
    or why not.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("group", "kind", "layer", "units", "parameters/unit", "members", "prunable")
    for group in graph.groups:
        layer = "–" if group.layer is None else str(group.layer)
        cells = (group.kind, layer, str(group.num_units), f"{group.parameters_per_unit:,}")
        table.add_row(group.name, *cells, "\n".join(_members(graph, group)), _verdict(group))
    Console(highlight=False, width=None if Console().is_terminal else 200).print(table)


def print_comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """Two plans side by side (`prunekit.jobs.diff`): a row a group."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="units that two plans remove")
    for name in ("group", "first", "second", "both", "both / either"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for row in rows:
        cells = (words.count(row["first"]), words.count(row["second"]), words.count(row["both"]))
        table.add_row(row["group"], *cells, words.percent(row["jaccard"]))
    Console(highlight=False, width=None if Console().is_terminal else 120).print(table)


def _verdict(group: CoupledGroup) -> str:
    if not group.prunable:
        return f"no: {group.reason}"
    return "yes" if group.exact else f"yes, inexact: {group.reason}"


def _members(graph: CouplingGraph, group: CoupledGroup, most: int = 8) -> list[str]:
    lines = []
    for member in group.members[:most]:
        shape = "×".join(map(str, graph.shapes[member.parameter]))
        arrow = "→" if member.role == "consumer" else "←"  # read from the units, or makes them
        lines.append(f"{arrow} {member.parameter}[{member.dim}] {shape}")
    more = len(group.members) - most
    return [*lines, f"… and {more} more"] if more > 0 else lines


def write_couplings(graph: CouplingGraph, folder: Path) -> None:
    """`graph.graphml`, and `layer.svg`: what cuts into the first layer (into everything where there
    are no layers).
    """
    import networkx

    folder.mkdir(parents=True, exist_ok=True)
    networkx.write_graphml(graph.to_networkx(), folder / "graph.graphml")
    prunable = [group for group in graph.groups if group.prunable]
    first = min(
        (g for g in prunable if g.layer is not None),
        key=lambda group: group.layer or 0,
        default=None,
    )
    prefix = (
        ""
        if first is None
        else first.module[: f"{first.module}.".index(f".{first.layer}.")] + f".{first.layer}."
    )
    here = [
        replace(
            group,
            members=tuple(
                member for member in group.members if member.parameter.startswith(prefix)
            ),
        )
        for group in prunable
    ]
    _draw(graph, [group for group in here if group.members], prefix, folder / "layer.svg")


def _draw(graph: CouplingGraph, groups: list[CoupledGroup], prefix: str, path: Path) -> None:
    """Groups on the left, the parameters they cut on the right; solid lines make the units, dashed
    ones read them.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    parameters = list(
        dict.fromkeys(member.parameter for group in groups for member in group.members)
    )
    height = max(len(parameters), 2 * len(groups), 2)
    figure, axes = pyplot.subplots(figsize=(10, 0.42 * height + 1), layout="constrained")
    right = {name: height * (1 - (i + 0.5) / len(parameters)) for i, name in enumerate(parameters)}
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
    for i, group in enumerate(groups):
        y, colour = height * (1 - (i + 0.5) / len(groups)), colours[i % len(colours)]
        for member in group.members:
            style = "--" if member.role == "consumer" else "-"
            axes.plot([0.36, 0.6], [y, right[member.parameter]], style, color=colour, linewidth=1.3)
        text = f"{group.name}\n{group.kind}, {group.num_units} units"
        axes.text(0.35, y, text, ha="right", va="center", color=colour, fontweight="bold")
    for name, y in right.items():
        text = f"{name.removeprefix(prefix)}  {'×'.join(map(str, graph.shapes[name]))}"
        axes.text(0.61, y, text, ha="left", va="center", fontsize=9)
    axes.set(xlim=(0, 1.15), ylim=(0, height))
    title = "what is cut together: solid lines make the units, dashed lines read them"
    axes.set_title(f"{prefix.rstrip('.') or 'the model'}: {title}", fontsize=10)
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
