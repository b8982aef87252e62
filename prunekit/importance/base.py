"""What an importance is: a score per unit from the whole model, or a choice per layer from its inputs' moments.

Units are scored structure by structure: a structure W_i of a group (LLM-Pruner, section 3.2) is one matrix's slice
along one of its dims, its module's bias with it. The group's score aggregates the structures' scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError, suggest
from prunekit.graph import CoupledGroup, CouplingGraph, Member
from prunekit.importance.aggregation import Aggregation, Normalisation, aggregate, normalise

Batch = Mapping[str, Any]
Place = tuple[str, int]


class Importance:
    """A way of telling which units matter least."""


@dataclass(frozen=True, kw_only=True)
class ScoreImportance(Importance, ABC):
    """Scores every unit on the model as it is; low scores go first.

    `aggregation` over a group's structures: sum, mean, max, prod, first or last (in execution order); `normalisation`
    of each group's scores: none, mean (by their mean), parameters (by the parameters a unit's removal frees).
    """

    aggregation: Aggregation = "sum"
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        for key, known in (("aggregation", get_args(Aggregation)), ("normalisation", get_args(Normalisation))):
            if (value := getattr(self, key)) not in known:
                raise ConfigError(f"importance.{key}: unknown {value!r}: {suggest(str(value), list(known))}")

    @abstractmethod
    def structures(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Group name → float64 scores [structures ≥ 1, num_units] ≥ 0, in execution order."""

    def score(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Group name → float64 scores [num_units]."""
        found = self.structures(model, graph, groups, batches)
        return {
            g.name: normalise(aggregate(found[g.name], self.aggregation), self.normalisation, g.parameters_per_unit)
            for g in groups
        }


class LayerImportance(Importance, ABC):
    """Chooses a layer's units from the second moments of its consumer's inputs, after the layers before it were cut."""

    @abstractmethod
    def choose(self, weight: Tensor, inverse: Tensor, index: Tensor, count: int) -> list[int]:
        """`count` units of `index` [units, width] to remove from the consumer W [d, n], given A = (H + λI)⁻¹ [n, n]."""


def by_structure(graph: CouplingGraph, group: CoupledGroup, positions: Callable[[Member], Tensor | None]) -> Tensor:
    """Scores [structures, num_units], float64, from a score [size] for each position along a member's dim.

    `positions(member)` is None for a member that doesn't count. A vector (bias, norm) joins its module's matrix.
    """
    rows: dict[Place, Tensor] = {}
    vectors: list[tuple[Member, Tensor]] = []
    for member in group.members:
        if member.parameter in graph.buffers or (scores := positions(member)) is None:
            continue
        units = scores.double().cpu()[member.index].sum(1)
        if len(graph.shapes[member.parameter]) == 1:
            vectors.append((member, units))
        else:
            rows[member.parameter, member.dim] = units
    for member, units in vectors:
        module = member.parameter.rpartition(".")[0]
        beside = [p for p in rows if p[0].rpartition(".")[0] == module and p[1] == member.dim]
        place = beside[0] if beside else (member.parameter, member.dim)
        rows[place] = rows[place] + units if beside else units
    if not rows:
        raise ConfigError(f"{group.name}: this importance can score none of its parameters")
    return torch.stack(list(rows.values()))


def along(scores: Tensor, dim: int) -> Tensor:
    """Sum elementwise scores over all dims but one: float64 [size of that dim]."""
    others = [d for d in range(scores.ndim) if d != dim]
    return scores.sum(others, dtype=torch.float64) if others else scores.double()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
