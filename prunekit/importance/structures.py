"""What importances share: scores of positions summed to scores of units, structure by structure."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, LayerStack, Member
from prunekit.model.updates import is_transposed
from prunekit.runtime.numbers import at_least_float32


def sum_by_structure(
    graph: CouplingGraph, group: Group, positions: Callable[[Member], Tensor | None]
) -> Tensor:
    """Sum a score for each position along the members' dims over the positions that a unit owns.

    Args:
        graph: the graph of the group.
        group: whose structures are scored.
        positions: a member → scores [size of its dim], or None for a member that does not count. A
            structure of which no member counts is left out.

    Returns:
        float64 [structures, num_units], in execution order.

    Raises:
        ConfigError: not one member counts.
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


def scale_by_inputs(model: nn.Module, name: str, norm: Tensor) -> Tensor:
    """|w_ij| ‖x_j‖₂ of the weight that has this name, of its shape, given the norms ‖x‖₂ [in]."""
    weight = at_least_float32(model.get_parameter(name).detach())
    norm = norm.to(weight)
    transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
    return weight.abs() * (norm[:, None] if transposed else norm)


def expect_stacks(importance: str, groups: Sequence[Group]) -> list[LayerStack]:
    """The groups, all of them stacks of whole layers; ConfigError where one is not."""
    stacks = []
    for group in groups:
        if not isinstance(group, LayerStack):
            raise ConfigError(
                f"importance={importance} scores whole layers (groups=layer), not {group.name}"
            )
        stacks.append(group)
    return stacks
