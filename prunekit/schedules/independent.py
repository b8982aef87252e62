"""The ablation of LLM-Pruner's table 6: each matrix loses the units that matter least to itself,
dependencies ignored.

Every structure of a group keeps as many units as the group's plan says, but its own choice of them:
their slices are moved to where the plan keeps units, so that an ordinary cut follows. Shapes fit,
meanings don't.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Member


def scatter(
    model: nn.Module,
    graph: CouplingGraph,
    structures: Mapping[str, Tensor],
    removed: Mapping[str, list[int]],
) -> None:
    """Permute the groups' members in place, given the scores [structures, num_units] of each
    structure.

    Raises:
        ConfigError: an importance that doesn't score every structure of a group.
    """
    for name, units in removed.items():
        matrices = graph[name].structures(graph)
        if len(matrices) != len(structures[name]):
            raise ConfigError(
                f"groups=independent: expected an importance that scores each of the {len(matrices)} matrices of "
                f"{name}, this one scores {len(structures[name])}"
            )
        kept = _kept(len(structures[name][0]), units)
        for scores, parts in zip(structures[name], matrices, strict=True):
            own = _kept(len(scores), scores.argsort(stable=True)[: len(units)].tolist())
            for part in parts:
                _move(model.get_parameter(part.member.parameter), part.member, own, kept)


def _move(parameter: Tensor, member: Member, own: Tensor, kept: Tensor) -> None:
    index = member.index.to(parameter.device)
    source = parameter.detach().index_select(member.dim, index[own].flatten())
    parameter.data.index_copy_(member.dim, index[kept].flatten(), source)


def _kept(size: int, removed: list[int]) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[removed] = False
    return keep.nonzero().flatten()
