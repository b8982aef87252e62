"""What an importance is: a score per unit from the whole model, or a choice per layer from its inputs' moments."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.graph import CoupledGroup, CouplingGraph, Member

Batch = Mapping[str, Any]


class ScoreImportance(ABC):
    """Scores every unit once, on the dense model; low scores go first."""

    @abstractmethod
    def score(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Group name → float64 scores [num_units]."""


class LayerImportance(ABC):
    """Chooses a layer's units from the second moments of its consumer's inputs, after the layers before it were cut."""

    @abstractmethod
    def choose(self, weight: Tensor, inverse: Tensor, index: Tensor, count: int) -> list[int]:
        """`count` units of `index` [units, width] to remove from the consumer W [d, n], given A = (H + λI)⁻¹ [n, n]."""


Importance = ScoreImportance | LayerImportance


def sum_members(
    model: nn.Module, group: CoupledGroup, element_scores: Callable[[Member, Tensor], Tensor | None]
) -> Tensor:
    """Σ over members and their slices of an elementwise score: float64 [num_units].

    `element_scores(member, parameter)` gives a tensor of the parameter's shape, or None to leave the member out.
    """
    parameters = dict(model.named_parameters())
    total = torch.zeros(group.num_units, dtype=torch.float64)
    for member in group.members:
        if member.parameter in parameters:
            scores = element_scores(member, parameters[member.parameter].detach())
            if scores is not None:
                total += per_unit(scores, member).cpu()
    return total


def per_unit(scores: Tensor, member: Member) -> Tensor:
    """Sum elementwise scores of a parameter's shape over each unit's slice: float64 [num_units]."""
    others = [dim for dim in range(scores.ndim) if dim != member.dim]
    positions = scores.double().sum(others) if others else scores.double()
    return positions[member.index.to(positions.device)].sum(1)
