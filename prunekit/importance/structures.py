"""Scores of positions summed to scores of units, structure by structure."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.graph import CoupledGroup, CouplingGraph, Member
from prunekit.graph.structures import members_of


def by_structure(
    graph: CouplingGraph, group: CoupledGroup, positions: Callable[[Member], Tensor | None]
) -> Tensor:
    """Scores [structures, num_units], float64, from a score [size] for each position along a
    member's dim.

    `positions(member)` is None for a member that doesn't count. A vector (bias, norm) joins its
    module's matrix. In a stack of layers the parameters of one name in each layer are a structure.
    """
    scored = (
        (member, positions(member))
        for member in members_of(graph, group)
        if member.parameter not in graph.buffers
    )
    found = [(member, scores.double().cpu()) for member, scores in scored if scores is not None]
    if not found:
        raise ConfigError(f"{group.name}: this importance can score none of its parameters")
    if group.kind == "layer":
        return _by_layer(group, found)
    vectors = [len(graph.shapes[member.parameter]) == 1 for member, _ in found]
    rows = {
        (m.parameter, m.dim): scores[m.index].sum(1)
        for (m, scores), v in zip(found, vectors, strict=True)
        if not v
    }
    for member, scores in (pair for pair, vector in zip(found, vectors, strict=True) if vector):
        module = member.parameter.rpartition(".")[0]
        beside = [p for p in rows if p[0].rpartition(".")[0] == module and p[1] == member.dim]
        place = beside[0] if beside else (member.parameter, member.dim)
        rows[place] = rows.get(place, 0) + scores[member.index].sum(1)
    return torch.stack(list(rows.values()))


def _by_layer(group: CoupledGroup, found: Sequence[tuple[Member, Tensor]]) -> Tensor:
    rows: dict[str, Tensor] = {}
    for member, scores in found:
        layer, _, rest = member.parameter[len(group.module) + 1 :].partition(".")
        rows.setdefault(rest, torch.zeros(group.num_units, dtype=torch.float64))[int(layer)] += (
            scores.sum()
        )
    return torch.stack(list(rows.values()))
