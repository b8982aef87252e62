"""Fold learned factors of units into the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.gates.places import spread, units_along
from prunekit.graph import CouplingGraph, Group, LayerStack
from prunekit.surgery.masking import members_to_zero


def is_foldable(group: Group, graph: CouplingGraph) -> bool:
    """Whether a factor on the units of a group is one on the columns of its consumers.

    It is none for whole layers, nor where a weight has another use that the factor would change.
    """
    if isinstance(group, LayerStack) or group.kind == "head_dim" or not group.consumers:
        return False
    return not any(member.elsewhere for member in members_to_zero(group, graph))


@torch.no_grad()
def fold(model: nn.Module, graph: CouplingGraph, group: Group, scales: Tensor) -> None:
    """Multiply the columns of a group's consumers by factors [num_units], in place.

    What reads a unit is multiplied by a gate of this value for good: y = W (z ∘ x) = (W diag z) x.
    """
    for member in members_to_zero(group, graph):
        weight = model.get_parameter(member.parameter).data
        shape = [-1 if dim == member.dim else 1 for dim in range(weight.ndim)]
        weight.mul_(spread(scales, units_along(member, weight)).to(weight).view(shape))
