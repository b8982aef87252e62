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

from prunekit.compensation.solver import Problem
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
        return {group.name: self.combine(group, found[group.name]) for group in groups}

    def combine(self, group: CoupledGroup, structures: Tensor) -> Tensor:
        """Scores [structures, num_units] → [num_units]."""
        combined = aggregate(structures, self.aggregation).clone()
        return normalise(combined, self.normalisation, group.parameters_per_unit)


class LayerImportance(Importance, ABC):
    """Chooses a layer's units from the second moments of its consumer's inputs, after the layers before it were cut."""

    @abstractmethod
    def choose(self, problems: Sequence[Problem], count: int) -> list[int]:
        """`count` units of a group to remove, given its consumers: W [d, n], A = (H + λI)⁻¹ [n, n] and the columns."""


def members_of(graph: CouplingGraph, group: CoupledGroup) -> tuple[Member, ...]:
    """A group's members; of a stack of layers, every parameter inside them, each as one member of its layer alone."""
    if group.kind != "layer":
        return group.members
    inside = [name for name in graph.shapes if name.startswith(f"{group.module}.") and name not in graph.buffers]
    return tuple(
        Member(parameter=name, dim=0, role="producer", index=torch.arange(graph.shapes[name][0])[None])
        for name in inside
        if graph.shapes[name]
    )


def by_structure(graph: CouplingGraph, group: CoupledGroup, positions: Callable[[Member], Tensor | None]) -> Tensor:
    """Scores [structures, num_units], float64, from a score [size] for each position along a member's dim.

    `positions(member)` is None for a member that doesn't count. A vector (bias, norm) joins its module's matrix. In a
    stack of layers the parameters of one name in each layer are a structure.
    """
    scored = (
        (member, positions(member)) for member in members_of(graph, group) if member.parameter not in graph.buffers
    )
    found = [(member, scores.double().cpu()) for member, scores in scored if scores is not None]
    if not found:
        raise ConfigError(f"{group.name}: this importance can score none of its parameters")
    if group.kind == "layer":
        return _by_layer(group, found)
    vectors = [len(graph.shapes[member.parameter]) == 1 for member, _ in found]
    rows = {
        (m.parameter, m.dim): scores[m.index].sum(1) for (m, scores), v in zip(found, vectors, strict=True) if not v
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
        rows.setdefault(rest, torch.zeros(group.num_units, dtype=torch.float64))[int(layer)] += scores.sum()
    return torch.stack(list(rows.values()))


def along(scores: Tensor, dim: int) -> Tensor:
    """Sum elementwise scores over all dims but one: float64 [size of that dim]."""
    others = [d for d in range(scores.ndim) if d != dim]
    return scores.sum(others, dtype=torch.float64) if others else scores.double()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
