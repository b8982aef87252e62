"""Scores of positions summed to scores of units, structure by structure."""

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, Member


def by_structure(
    graph: CouplingGraph, group: Group, positions: Callable[[Member], Tensor | None]
) -> Tensor:
    """Scores [structures, num_units], float64, from a score [size] for each position along a
    member's dim.

    `positions(member)` is None for a member that doesn't count; a structure of which no member
    counts is left out.
    """
    rows = []
    for structure in group.structures(graph):
        scored = [(part, positions(part.member)) for part in structure]
        row = torch.zeros(group.num_units, dtype=torch.float64)
        for part, scores in scored:
            if scores is not None:
                per_unit = scores.double().cpu()[part.member.index].sum(1)
                row.index_add_(0, part.units, per_unit)
        if any(scores is not None for _, scores in scored):
            rows.append(row)
    if not rows:
        raise ConfigError(f"{group.name}: this importance can score none of its parameters")
    return torch.stack(rows)
