"""A traced model for people: a table of its groups, a GraphML file, a picture of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from prunekit.graph import CoupledGroup, CouplingGraph
    from prunekit.plan import Overlap

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def print_groups(graph: CouplingGraph) -> None:
    """Print a table of the groups: members, and the reason where a group can't be pruned."""
    from rich.console import Console
    from rich.table import Table

    table = Table("group", "kind", "layer", "units", "parameters/unit", "members", "prunable")
    for group in graph.groups:
        layer = "–" if group.layer is None else str(group.layer)
        cells = (group.kind, layer, str(group.num_units), f"{group.parameters_per_unit:,}")
        table.add_row(group.name, *cells, "\n".join(_members(graph, group)), _verdict(group))
    Console(highlight=False, width=None if Console().is_terminal else 200).print(table)


def print_comparison(rows: Sequence[Overlap]) -> None:
    """Print two plans side by side, a row a group."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="units that two plans remove")
    for name in ("group", "first", "second", "both", "both / either"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for row in rows:
        cells = (words.count(row.first), words.count(row.second), words.count(row.both))
        table.add_row(row.group, *cells, words.percent(row.jaccard))
    Console(highlight=False, width=None if Console().is_terminal else 120).print(table)


def _verdict(group: CoupledGroup) -> str:
    """Whether the group can be pruned, and why not, or why only inexactly."""
    if not group.prunable:
        return f"no: {group.reason}"
    return "yes" if group.exact else f"yes, inexact: {group.reason}"


def _members(graph: CouplingGraph, group: CoupledGroup, most: int = 8) -> list[str]:
    """A line for each member, with its shape; the arrow of a consumer leaves the units."""
    lines = []
    for member in group.members[:most]:
        arrow = "→" if member.role == "consumer" else "←"
        shape = _shape(graph, member.parameter)
        lines.append(f"{arrow} {member.parameter}[{member.dim}] {shape}")
    more = len(group.members) - most
    return [*lines, f"… and {more} more"] if more > 0 else lines


def write_couplings(graph: CouplingGraph, folder: Path) -> None:
    """Write `graph.graphml`, and `layer.svg`: the couplings of the first layer.

    Where no group lies in a layer the picture shows the whole model.
    """
    import networkx

    folder.mkdir(parents=True, exist_ok=True)
    networkx.write_graphml(graph.to_networkx(), folder / "graph.graphml")
    prunable = [group for group in graph.groups if group.prunable]
    prefix = _first_layer(prunable)
    groups = []
    for group in prunable:
        inside = [member for member in group.members if member.parameter.startswith(prefix)]
        if inside:
            groups.append(replace(group, members=tuple(inside)))
    _draw(graph, groups, prefix, folder / "layer.svg")


def _first_layer(groups: Sequence[CoupledGroup]) -> str:
    """The beginning of the names of the first layer's parameters; empty without layers."""
    inside = [group for group in groups if group.layer is not None]
    if not inside:
        return ""
    first = min(inside, key=lambda group: group.layer or 0)
    number = f".{first.layer}."
    return first.module[: f"{first.module}.".index(number)] + number


def _draw(graph: CouplingGraph, groups: list[CoupledGroup], prefix: str, path: Path) -> None:
    """Draw groups on the left, the parameters they cut on the right.

    Solid lines go to parameters that make the units, dashed ones to those that read them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    members = [member for group in groups for member in group.members]
    parameters = list(dict.fromkeys(member.parameter for member in members))
    height = max(len(parameters), 2 * len(groups), 2)
    figure = Figure(figsize=(10, 0.42 * height + 1), layout="constrained")
    axes = figure.subplots()
    right = {name: height * (1 - (i + 0.5) / len(parameters)) for i, name in enumerate(parameters)}
    for i, group in enumerate(groups):
        y = height * (1 - (i + 0.5) / len(groups))
        _draw_group(axes, group, y, right, _COLOURS[i % len(_COLOURS)])
    for name, y in right.items():
        text = f"{name.removeprefix(prefix)}  {_shape(graph, name)}"
        axes.text(0.61, y, text, ha="left", va="center", fontsize=9)
    axes.set(xlim=(0, 1.15), ylim=(0, height))
    title = "what is cut together: solid lines make the units, dashed lines read them"
    axes.set_title(f"{prefix.rstrip('.') or 'the model'}: {title}", fontsize=10)
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "layer"}):
        figure.savefig(path, metadata={"Date": None})


def _draw_group(
    axes: Axes, group: CoupledGroup, y: float, right: Mapping[str, float], colour: str
) -> None:
    """Draw one group's name at a height, and its lines to the heights of its parameters."""
    for member in group.members:
        style = "--" if member.role == "consumer" else "-"
        axes.plot([0.36, 0.6], [y, right[member.parameter]], style, color=colour, linewidth=1.3)
    text = f"{group.name}\n{group.kind}, {group.num_units} units"
    axes.text(0.35, y, text, ha="right", va="center", color=colour, fontweight="bold")


def _shape(graph: CouplingGraph, parameter: str) -> str:
    return "×".join(map(str, graph.shapes[parameter]))
