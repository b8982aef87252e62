"""What the model itself demands of a cut: units that must stay, widths its kernels can run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from prunekit.allocation.scope import Scope
from prunekit.config import RunConfig
from prunekit.graph import Group
from prunekit.model.names import experts_per_token
from prunekit.surgery import shapes


def floors(model: nn.Module, groups: Sequence[Group]) -> dict[str, int]:
    """Units that a model needs: as many experts as a token is sent to."""
    needed = experts_per_token(getattr(model, "config", None))
    if needed is None:
        return {}
    return {group.name: needed for group in groups if group.kind == "expert"}


def multiples(
    model: nn.Module, groups: Sequence[Group], config: RunConfig, scope: Scope
) -> dict[str, int]:
    """What a group's kept units must be a multiple of: rows of stacked experts' weights go in 16
    bytes, in bf16 too.
    """
    stacked = {
        name: max(16 // min(parameter.element_size(), 2), 1)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvNd)
    }
    aligned = scope.width_multiple if scope.width_multiple > 1 else shapes.ALIGNMENT
    found = shapes.alignments(groups, aligned) if config.shapes == "aligned" else {}
    for group in groups:
        for member in group.members if group.kind != "expert" else ():
            if member.parameter in stacked and member.dim > 0:
                found[group.name] = math.lcm(found.get(group.name, 1), stacked[member.parameter])
    return found


def added_biases(model: nn.Module, groups: Sequence[Group]) -> int:
    """How many parameters the biases have that consumers lack."""
    found = {}
    for member in (member for group in groups for member in group.consumers):
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        if getattr(module, "bias", None) is None:
            found[member.parameter] = model.get_parameter(member.parameter).shape[1 - member.dim]
    return sum(found.values())
