"""What an importance is: a score per unit from the whole model, or a choice per layer from its
inputs' moments.

Units are scored structure by structure: a structure W_i of a group (LLM-Pruner, section 3.2) is one
matrix's slice along one of its dims, its module's bias with it. The group's score aggregates the
structures' scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, suggest
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.aggregation import Aggregation, Normalisation, aggregate, normalise
from prunekit.obs.inverse import Problem


class Importance:
    """A way of telling which units matter least."""


@dataclass(frozen=True, kw_only=True)
class ScoreImportance(Importance, ABC):
    """Scores every unit on the model as it is; low scores go first.

    `aggregation` over a group's structures: sum, mean, max, prod, first or last (in execution
    order); `normalisation` of each group's scores: none, mean (by their mean), parameters (by the
    parameters a unit's removal frees).
    """

    aggregation: Aggregation = "sum"
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        for key, known in (
            ("aggregation", get_args(Aggregation)),
            ("normalisation", get_args(Normalisation)),
        ):
            if (value := getattr(self, key)) not in known:
                raise ConfigError(
                    f"importance.{key}: unknown {value!r}: {suggest(str(value), list(known))}"
                )

    @abstractmethod
    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Group name → float64 scores [structures ≥ 1, num_units] ≥ 0, in execution order."""

    def score(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Group name → float64 scores [num_units]."""
        found = self.structures(model, graph, groups, batches)
        return {group.name: self.combine(group, found[group.name]) for group in groups}

    def combine(self, group: Group, structures: Tensor) -> Tensor:
        """Scores [structures, num_units] → [num_units]."""
        combined = aggregate(structures, self.aggregation).clone()
        return normalise(combined, self.normalisation, group.parameters_per_unit)


class LayerImportance(Importance, ABC):
    """Chooses a layer's units from the second moments of its consumer's inputs, after the layers
    before it were cut.
    """

    @abstractmethod
    def choose(self, problems: Sequence[Problem], count: int) -> list[int]:
        """`count` units of a group to remove, given its consumers: W [d, n], A = (H + λI)⁻¹ [n, n]
        and the columns.
        """
